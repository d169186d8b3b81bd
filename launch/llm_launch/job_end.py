"""What becomes of a SLURM job whose launcher has ended: one pure decision."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from llm_launch.slurm import Fate
from llm_launch.states import EXIT_TOO_FEW
from llm_parallel.errors import EXIT_STOPPED

GIVEN_UP = 1
"""Exit status of a job that was requeued too often for nothing."""


class Act(Enum):
    """What to do next."""

    REQUEUE = "requeue"
    """Put the job back into the queue, then ask what became of it."""
    ASK_AGAIN = "ask again"
    """Wait a moment: slurmctld does not answer."""
    END = "end"
    """End the batch script."""


@dataclass(frozen=True)
class Known:
    """All that the decision depends on."""

    status: int
    """Exit status of the run."""
    time_is_up: bool = False
    """Whether SLURM has announced the job's time limit."""
    stop_asked: bool = False
    """Whether anybody has asked the run to end, SLURM included."""
    fate: Fate | None = Fate.RUNNING
    """What SLURM says of the job; None if slurmctld does not answer."""
    asked: str = ""
    """Why this launcher has asked for a requeue; empty if it has not."""
    refusal: str = ""
    """SLURM's answer to a request that it refused."""
    waited_s: float = 0.0
    """How long slurmctld has not answered."""
    patience_s: float = 300.0
    """How long it is asked at least; at the time limit's warning as long as the warning lasts."""
    fruitless: int = 0
    """Starts of this job in a row, with this one, after which no later step was kept."""
    most_fruitless: int = 5
    """``elastic.max_fruitless``."""


@dataclass(frozen=True)
class Decision:
    """What to do. status: of the batch script, where it ends; cause: for people, empty if there is nothing to say;
    queued: whether the job is in the queue again; given_up: whether it ends although it should be there; counts:
    whether this start was the run's own, not taken from it by SLURM."""

    act: Act
    status: int
    cause: str = ""
    queued: bool = False
    given_up: bool = False
    counts: bool = True


def decide(known: Known) -> Decision:
    """Status 0 comes back for a run with all its steps alone: whatever ends before is requeued or ends with another
    status. A job that was cancelled stays so, since SLURM is asked before and after."""
    status = known.status
    if status not in (EXIT_STOPPED, EXIT_TOO_FEW):
        return Decision(Act.END, status)  # done, a mistake, an error, or a signal
    if known.fate is None:
        if known.waited_s < known.patience_s:
            return Decision(Act.ASK_AGAIN, status)
        return Decision(Act.END, status, f"slurmctld has not answered for {known.waited_s:.0f} s", given_up=True)
    if known.fate is Fate.QUEUED:
        # The batch script's own status is not 0 either, should SLURM believe it.
        cause = known.asked or "SLURM or an operator requeued it"
        return Decision(Act.END, EXIT_STOPPED, cause, queued=True, counts=bool(known.asked) and cause != PREEMPTED)
    if known.fate is Fate.OVER:
        return Decision(Act.END, EXIT_STOPPED, "SLURM has ended this job already", counts=False)
    cause = _reason(known)
    if not cause:
        return Decision(Act.END, status)  # its user asked it to stop
    if known.refusal:
        return Decision(Act.END, status, f"SLURM refuses it: {known.refusal}", given_up=True)
    if known.fruitless >= known.most_fruitless and cause != PREEMPTED:
        return Decision(Act.END, GIVEN_UP, too_often(known.fruitless, cause), given_up=True)
    return Decision(Act.REQUEUE, status, cause)


PREEMPTED = "preempted"
TIME_LIMIT = "time limit"
TOO_FEW = "too few devices"


def _reason(known: Known) -> str:
    """Why the job should go back to the queue; empty if it should not. A preemption may announce itself by the signal
    of the time limit's warning (``PreemptParameters=send_user_signal``)."""
    if known.fate is Fate.PREEMPTED:
        return PREEMPTED
    if known.time_is_up:
        return TIME_LIMIT
    return TOO_FEW if known.status == EXIT_TOO_FEW and not known.stop_asked else ""


def too_often(starts: int, cause: str) -> str:
    """The sentence about a job that makes no progress."""
    return (
        f"{starts} starts of this job in a row have not kept a later step (the last one ended by {cause}), so it is not"
        " started again (elastic.max_fruitless)"
    )
