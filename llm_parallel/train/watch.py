"""Observer of a run: at its points of a step the elastic launcher's worker copies state, compares replicas and reports
progress; in a plain run it does nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from llm_parallel.checkpoint.state import TrainState
from llm_parallel.parallel.engine import Models
from llm_parallel.train.run import Run
from llm_parallel.train.step import StepOutcome


@dataclass(frozen=True)
class Resumed:
    """The state to go on from, a description of where it came from, and the optimizer's settings that differ from those
    with which it was made, as ``field old → new``."""

    state: TrainState
    origin: str
    changed: list[str] = field(default_factory=list)


class Watch:
    """Does nothing; an elastic run overrides these methods."""

    survives_failed_saves = False
    """Whether to go on without a checkpoint that could not be saved, the disk being full for example."""
    uneven = False
    """Whether replicas may have different numbers of micro batches."""

    def restore(self, models: Models) -> Resumed | None:
        """A state to go on from that is newer than the newest checkpoint; None if there is none."""
        return None

    def opened(self, run: Run) -> None:
        """Called when model, optimizer, data and state are ready."""

    def before_step(self, run: Run) -> None:
        """Called when a step begins."""

    def before_agreement(self, own_loss: float) -> None:
        """Called when this process has computed its gradient and no process can have finished the step. ``own_loss``:
        sum of its own replica's losses if it reports them, else 0."""

    def wants_to_pause(self) -> bool:
        """Whether all processes should leave after this step."""
        return False

    def judged(self, run: Run, outcome: StepOutcome, size: int) -> None:
        """Called when the sums of the step are known and nothing was applied. May raise to have the step made again."""

    def after_step(self, run: Run) -> None:
        """Called when the step was applied or skipped, and counted."""

    @contextmanager
    def long(self) -> Iterator[None]:
        """Surrounds work that takes longer than a step: evaluation, a checkpoint."""
        yield
