"""Simulates a pipeline schedule event by event: when each model chunk runs on each micro batch, and how long stages
wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """One forward or backward of one model chunk on one micro batch. Times are in the unit of the given durations."""

    stage: int
    chunk: int
    micro_batch: int
    backward: bool
    begin: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """All events of a step, and when the last one ends."""

    events: tuple[Event, ...]
    makespan: float
    stages: int

    @property
    def bubble(self) -> float:
        """Share of the stages' time in which they wait."""
        busy = sum(event.end - event.begin for event in self.events)
        return 1.0 - busy / (self.makespan * self.stages)


def order(stage: int, stages: int, chunks: int, micro_batches: int) -> list[tuple[int, int, bool]]:
    """(chunk, micro batch, backward) in the order in which ``stage`` runs them: 1F1B, or interleaved 1F1B with several
    chunks (Narayanan et al. 2021, arXiv 2104.04473), which needs whole groups of ``stages`` micro batches."""
    total = micro_batches * chunks

    def work(number: int, backward: bool) -> tuple[int, int, bool]:
        group, inside = divmod(number, stages * chunks)
        chunk = inside // stages
        return (chunks - 1 - chunk if backward else chunk), group * stages + inside % stages, backward

    if chunks == 1:
        warm = min(stages - stage - 1, total)
        forward = [(0, number, False) for number in range(total)]
        backward = [(0, number, True) for number in range(total)]
    else:
        warm = min(2 * (stages - stage - 1) + (chunks - 1) * stages, total)
        forward = [work(number, False) for number in range(total)]
        backward = [work(number, True) for number in range(total)]
    steady = [item for pair in zip(forward[warm:], backward) for item in pair]
    return [*forward[:warm], *steady, *backward[total - warm :]]


def simulate(
    forward: Sequence[Sequence[float]], backward: Sequence[Sequence[float]], micro_batches: int, send: float = 0.0
) -> Timeline:
    """Simulates a step. ``forward[stage][chunk]`` and ``backward`` are durations; ``send`` is the time from one stage
    to the next, overlapped with compute."""
    stages, chunks = len(forward), len(forward[0])
    orders = [order(stage, stages, chunks, micro_batches) for stage in range(stages)]
    position, free = [0] * stages, [0.0] * stages
    done: dict[tuple[int, int, int, bool], float] = {}
    events: list[Event] = []
    left = sum(len(items) for items in orders)
    while left:
        before = left
        for stage in range(stages):
            while position[stage] < len(orders[stage]):
                chunk, number, is_backward = orders[stage][position[stage]]
                ready = _ready(stage, chunk, number, is_backward, stages, chunks, done, send)
                if ready is None:
                    break
                begin = max(free[stage], ready)
                end = begin + (backward if is_backward else forward)[stage][chunk]
                done[stage, chunk, number, is_backward] = free[stage] = end
                events.append(Event(stage, chunk, number, is_backward, begin, end))
                position[stage] += 1
                left -= 1
        assert left < before, "the schedule waits for itself"
    return Timeline(tuple(events), max(free), stages)


def _ready(
    stage: int, chunk: int, number: int, backward: bool, stages: int, chunks: int,
    done: dict[tuple[int, int, int, bool], float], send: float,
) -> float | None:  # fmt: skip
    """When the input is there; None while it has not been computed."""
    virtual = chunk * stages + stage
    if not backward:
        if virtual == 0:
            return 0.0
        source = divmod(virtual - 1, stages)
    elif virtual == stages * chunks - 1:
        return done.get((stage, chunk, number, False))
    else:
        source = divmod(virtual + 1, stages)
    from_chunk, from_stage = source
    found = done.get((from_stage, from_chunk, number, backward))
    return None if found is None else found + (send if from_stage != stage else 0.0)
