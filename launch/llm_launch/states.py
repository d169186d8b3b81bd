"""States of the controller and of a worker, and which may follow which."""

from __future__ import annotations

from enum import Enum

EXIT_TOO_FEW = 75
"""Exit status of a run that waited for devices without success; it may be started again (sysexits.h: EX_TEMPFAIL)."""


class Phase(Enum):
    """What the controller does."""

    WAITING = "waiting"
    """Too few devices, or copies of the state are awaited; a checkpoint or memory copies keep what was trained."""
    FORMING = "forming"
    """Workers have their assignment and build groups and model."""
    TRAINING = "training"
    """Every worker of the generation makes steps."""
    ABORTING = "aborting"
    """A fault was seen: workers leave their collectives, and evidence arrives."""
    PAUSING = "pausing"
    """All workers leave together after the present step, for a planned change."""
    FINISHED = "finished"
    """All steps are done and saved."""
    STOPPED = "stopped"
    """Ended on request or out of time before all steps were done, with its state saved."""
    FAILED = "failed"


_AFTER = {
    Phase.WAITING: {Phase.FORMING, Phase.STOPPED, Phase.FAILED},
    Phase.FORMING: {Phase.TRAINING, Phase.ABORTING, Phase.FINISHED, Phase.STOPPED, Phase.FAILED},
    Phase.TRAINING: {Phase.ABORTING, Phase.PAUSING, Phase.FINISHED, Phase.STOPPED, Phase.FAILED},
    Phase.ABORTING: {Phase.FORMING, Phase.WAITING, Phase.STOPPED, Phase.FAILED},
    Phase.PAUSING: {Phase.FORMING, Phase.ABORTING, Phase.WAITING, Phase.FINISHED, Phase.STOPPED, Phase.FAILED},
    Phase.FINISHED: set(),
    Phase.STOPPED: set(),
    Phase.FAILED: set(),
}
OVER = (Phase.FINISHED, Phase.STOPPED, Phase.FAILED)


def check_transition(before: Phase, after: Phase) -> None:
    """Raises AssertionError if ``after`` may not follow ``before``."""
    assert after in _AFTER[before], f"the controller may not go from {before.value} to {after.value}"


class Outcome(Enum):
    """How a worker left its generation."""

    FINISHED = "finished"
    """All steps are done and saved."""
    STOPPED = "stopped"
    """Saved after it was asked to stop, or out of time."""
    PAUSED = "paused"
    """Left after a step, as all others, for a planned change."""
    ABORTED = "aborted"
    """Left because told to, or because a peer was gone."""
    FAILED = "failed"
    """Raised an error of its own."""
