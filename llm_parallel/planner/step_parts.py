"""Parts of the time of a training step: of the whole step, and of one micro batch's pass through a layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by cause; they add up to ``total``."""

    compute: float
    """Matrix products and attention."""
    elementwise: float
    """Operators that memory bandwidth limits."""
    recompute: float
    """Activations computed again in backward."""
    tp: float
    """Tensor-parallel communication, and the all-to-alls of expert parallelism."""
    cp: float
    """Context-parallel communication."""
    pp: float
    """Sends between pipeline stages."""
    bubble: float
    """Waiting in the pipeline."""
    dp: float
    """Data-parallel communication."""
    optimizer: float
    """The update of the weights."""
    host: float
    """Kernel launches that are not hidden."""
    waiting: float
    """Waiting for the slowest of many nodes."""

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(self.parts().values())

    @property
    def exposed_communication(self) -> float:
        """Seconds of communication that nothing hides."""
        return self.tp + self.cp + self.pp + self.dp

    def parts(self) -> dict[str, float]:
        """Seconds by field name."""
        names = ("compute", "elementwise", "recompute", "tp", "cp", "pp", "bubble", "dp", "optimizer", "host",
                 "waiting")  # fmt: skip
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Pass:
    """Seconds of one micro batch's forward or backward through one layer, or the output, on one GPU."""

    compute: float = 0.0
    elementwise: float = 0.0
    tp: float = 0.0
    cp: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        """Seconds."""
        return self.compute + self.elementwise + self.tp + self.cp + self.host

    def __add__(self, other: Pass) -> Pass:
        return Pass(*(getattr(self, name) + getattr(other, name) for name in _PASS))

    def times(self, factor: float) -> Pass:
        """This pass, ``factor`` times."""
        return Pass(*(factor * getattr(self, name) for name in _PASS))


_PASS = ("compute", "elementwise", "tp", "cp", "host")
