"""The pipeline schedule of a run, simulated from its layout and scaled to its measured time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_parallel.planner.pipeline_simulation import Timeline, simulate
from llm_parallel.report.runs import Run, steady

MOST_EVENTS = 3000
"""Most events of a picture; more could not be distinguished and would make a large page."""


@dataclass(frozen=True)
class Schedule:
    """One step of a pipeline, in seconds."""

    timeline: Timeline
    stages: int
    chunks: int
    micro_batches: int


def schedule_of(run: Run) -> Schedule | None:
    """The schedule of the run's configured layout; None without a pipeline, or where the folder does not say.

    It assumes that all stages take the same time, a backward takes two forwards and sending takes none, and has the
    length of the measured median of forward and backward. So it shows the order and the bubble that follows from it,
    not where time was lost."""
    sizes: list[Any] = [run.config.get(f"parallel.{name}") for name in ("tp", "cp", "pp", "vpp")]
    batches: list[Any] = [run.config.get(f"train.{name}_batch_size") for name in ("global", "micro")]
    world: Any = run.history.starts[-1].get("size") if run.history.starts else None
    if not all(isinstance(number, int) and number > 0 for number in [*sizes, *batches, world]):
        return None
    (tp, cp, stages, chunks), (batch, micro) = sizes, batches
    replicas, left = divmod(world, tp * cp * stages)
    if stages < 2 or left or batch % (micro * replicas):
        return None
    micro_batches = batch // (micro * replicas)
    if 2 * stages * chunks * micro_batches > MOST_EVENTS or (chunks > 1 and micro_batches % stages):
        return None
    unit = simulate([[1.0 / chunks] * chunks] * stages, [[2.0 / chunks] * chunks] * stages, micro_batches).makespan
    seconds = float(np.nanmedian(run.history.column("perf/forward_backward_time")[steady(run.history)]))
    forward = seconds / unit / chunks
    timeline = simulate([[forward] * chunks] * stages, [[2 * forward] * chunks] * stages, micro_batches)
    return Schedule(timeline, stages, chunks, micro_batches)
