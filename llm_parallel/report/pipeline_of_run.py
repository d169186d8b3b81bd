"""The pipeline schedule of a run, simulated from its layout and scaled to its measured time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from llm_parallel.config.tree import RunConfig
from llm_parallel.planner.memory import stage_layers
from llm_parallel.planner.pipeline_simulation import Timeline, simulate
from llm_parallel.planner.shapes import shape_of, strategy_of
from llm_parallel.report.runs import Run, steady, time_split
from llm_parallel.report.text import time_text

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


@dataclass(frozen=True)
class Bubble:
    """Shares of forward and backward in which the stages of a pipeline wait, on average."""

    equal: float
    """By the schedule, with stages that take the same time."""
    uneven: float | None
    """By the schedule, with the layers and the output projection that each stage has; None if the folder does not say
    them."""
    measured: float | None
    """As the run recorded it; None without log.comm_time."""
    sends: float
    """Recorded time of the messages between stages."""

    def describe(self, whole_s: float) -> str:
        """Both beside each other, and why they differ. ``whole_s``: seconds of forward and backward."""
        text = f"The schedule itself waits {self._share(self.equal, whole_s)} with equal stages"
        known = self.equal if self.uneven is None else self.uneven
        if self.uneven is not None:
            text += f", and {self._share(self.uneven, whole_s)} with this model's layers and output projection"
        if self.measured is None:
            return f"{text}. The run did not record its own bubble (log.comm_time)."
        text += f". Measured: {self._share(self.measured, whole_s)}, and {self.sends:.1%} in sends. "
        more = self.measured + self.sends - known
        if abs(more) < 0.01:
            return text + "So the schedule explains the measured bubble."
        if more > 0:
            return text + (
                f"The {more:.1%} that the schedule does not explain are sends, micro batches or processes that took "
                "longer than others (other programs on the machine, uneven samples), and the wait of all stages for "
                "the loss."
            )
        return text + (
            f"That is {-more:.1%} less: forward and backward also hold communication of other axes, which the schedule "
            "counts as work of every stage, though it does not make each stage wait for the others."
        )

    @staticmethod
    def _share(share: float, whole_s: float) -> str:
        return f"{share:.1%} of forward and backward ({time_text(share * whole_s)} a step)"


def bubble_of(run: Run, schedule: Schedule) -> Bubble:
    """The bubble by the schedule and as it was measured."""
    whole = schedule.timeline.makespan
    split = time_split(run.history)
    recorded = "compute" in split
    return Bubble(
        equal=schedule.timeline.bubble,
        uneven=_uneven(run, schedule),
        measured=split.get("pipeline bubble", 0.0) / whole if recorded else None,
        sends=split.get("pipeline sends", 0.0) / whole,
    )


def _uneven(run: Run, schedule: Schedule) -> float | None:
    """The schedule's bubble where a chunk takes as long as its layers' and output projection's FLOPs say."""
    try:
        config = RunConfig.model_validate(yaml.safe_load((run.folder / "config.yaml").read_text()))
        world = run.history.starts[-1]["size"]
        strategy = strategy_of(config, world)
    except (OSError, ValueError, KeyError, IndexError):
        return None
    if config.model.vocab_size is None:
        return None
    shape = shape_of(config.model)
    layer = shape.layer_matrices + 2 * strategy.seq * shape.heads * shape.channels * shape.seen(strategy.seq)
    work = [[layer * count for count in chunks] for chunks in stage_layers(shape, strategy)]
    work[-1][-1] += shape.vocab * shape.hidden
    twice = [[2.0 * one for one in chunks] for chunks in work]
    return simulate(work, twice, schedule.micro_batches).bubble
