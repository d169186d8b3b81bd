"""What elastic recovery gains: state survives in memory, so a failure costs the current step and a few seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llm_parallel.errors import UserError
from llm_parallel.goodput import closed_form
from llm_parallel.goodput.rates import RANGES, Job
from llm_parallel.goodput.simulate import simulate

RECOVERIES_S = (1.0, 3.0)
"""Seconds from a failure until training goes on, detection included: the best and worst case that are compared. They
are assumptions, not measured on a GPU cluster."""


def elastic_job(job: Job, step_s: float, recovery_s: float) -> Job:
    """The same job with its state copied to other nodes after every step: no checkpoint stops it, and a failure loses
    at most one step. A node that leaves is replaced, as under ``restart``.

    Raises UserError if the step is not as long as an interval may be."""
    _, least, most, _ = RANGES["interval_s"]
    if not least <= step_s <= most:
        raise UserError(f"--step-s {step_s:g} must be a number from {least:g} to {most:,.10g}")
    return replace(
        job, policy="restart", interval_s=step_s, write_s=0.0, detect_s=0.0, restart_s=recovery_s, spare_nodes=0
    )


@dataclass(frozen=True)
class Worth:
    """Goodput of a job of one size by restart from disk, and by elastic recovery in the order of ``RECOVERIES_S``."""

    gpus: int
    mtbf_s: float
    restart: float
    elastic: tuple[float, ...]
    simulated: tuple[float, ...]

    @property
    def gpus_won(self) -> float:
        """Number of GPUs that would add as much training as the slower recovery gains."""
        return self.gpus * (min(self.elastic) - self.restart)


def worth(jobs: Sequence[Job], step_s: float, seed: int = 0) -> list[Worth]:
    """Restart from disk and elastic recovery of each job."""
    found = []
    for job in jobs:
        plain = replace(job, policy="restart", spare_nodes=0)
        fast = [elastic_job(job, step_s, recovery_s) for recovery_s in RECOVERIES_S]
        found.append(
            Worth(
                job.num_gpus,
                job.mtbf_s,
                closed_form.goodput(plain),
                tuple(closed_form.goodput(one) for one in fast),
                tuple(simulate(one, seed, relative_error=0.003).goodput for one in fast),
            )
        )
    return found
