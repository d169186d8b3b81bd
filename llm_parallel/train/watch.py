"""What looks on while a run trains: the elastic launcher's worker copies state, compares replicas and reports progress
at these points of a step; a plain run does nothing there."""

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
    """State to go on from, where it came from in words, and which of the optimizer's settings are no longer those that
    it was made with, as ``field old → new``."""

    state: TrainState
    origin: str
    changed: list[str] = field(default_factory=list)


class Watch:
    """Does nothing. What differs in an elastic run overrides these."""

    survives_failed_saves = False
    """Whether to go on without a checkpoint that could not be saved, the disk being full for example."""
    uneven = False
    """Whether replicas may have different numbers of micro batches."""

    def restore(self, models: Models) -> Resumed | None:
        """State to go on from that is nearer than the newest checkpoint; None if there is none."""
        return None

    def opened(self, run: Run) -> None:
        """Model, optimizer, data and state are there."""

    def before_step(self, run: Run) -> None:
        """A step begins."""

    def before_agreement(self, own_loss: float) -> None:
        """This process has its gradient, and no process can have finished the step. ``own_loss``: sum of its own
        replica's losses if it reports them, else 0."""

    def wants_to_pause(self) -> bool:
        """Whether all processes should leave after this step."""
        return False

    def judged(self, run: Run, outcome: StepOutcome, size: int) -> None:
        """The sums of the step are known, and nothing was applied. May raise to have the step made again."""

    def after_step(self, run: Run) -> None:
        """The step was applied or skipped, and counted."""

    @contextmanager
    def long(self) -> Iterator[None]:
        """Around what takes longer than a step: evaluation, a checkpoint."""
        yield
