"""Pipeline schedules, event by event, against the closed form of Narayanan et al. 2021 (arXiv 2104.04473, sec. 2.2)."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_parallel.planner.pipeline_simulation import order, simulate


@given(
    stages=st.integers(1, 8),
    chunks=st.integers(1, 4),
    groups=st.integers(1, 4),
    backward=st.sampled_from([1.0, 2.0, 3.0]),
)
def test_even_stages_have_the_closed_forms_bubble(stages: int, chunks: int, groups: int, backward: float) -> None:
    if stages == 1:
        chunks = 1
    count = stages * groups
    line = simulate([[1.0] * chunks] * stages, [[backward] * chunks] * stages, count)
    ideal = count * chunks * (1.0 + backward)
    assert line.makespan == pytest.approx(ideal + (stages - 1) * (1.0 + backward))
    assert line.bubble == pytest.approx((stages - 1) / (count * chunks + stages - 1))


@given(stages=st.integers(2, 5), count=st.integers(1, 9), data=st.data())
def test_nothing_runs_early_twice_or_at_once(stages: int, count: int, data: st.DataObject) -> None:
    times = st.floats(0.1, 3.0)
    forward = [[data.draw(times)] for _ in range(stages)]
    backward = [[data.draw(times)] for _ in range(stages)]
    line = simulate(forward, backward, count, send=0.05)
    ends = {(event.stage, event.micro_batch, event.backward): event.end for event in line.events}
    assert len(ends) == len(line.events) == 2 * stages * count
    for event in line.events:
        source = event.stage + (1 if event.backward else -1)
        if 0 <= source < stages:
            assert event.begin >= ends[source, event.micro_batch, event.backward] + 0.05 - 1e-12
        elif event.backward:
            assert event.begin >= ends[event.stage, event.micro_batch, False]
    for stage in range(stages):
        mine = sorted((event for event in line.events if event.stage == stage), key=lambda event: event.begin)
        assert all(one.end <= other.begin + 1e-12 for one, other in pairwise(mine))
    # No stage can be done before its own work, nor before the first micro batch has been through all.
    least = max(count * (one[0] + other[0]) for one, other in zip(forward, backward))
    assert line.makespan >= least - 1e-9


def test_order_is_megatrons_for_two_stages_and_two_chunks() -> None:
    # Micro batches 0 and 1 through chunk 0, then chunk 1; 2 + 2 * 1 forwards before the first backward on stage 0.
    found = order(0, 2, 2, 2)
    assert found[:4] == [(0, 0, False), (0, 1, False), (1, 0, False), (1, 1, False)]
    assert found[4:] == [(1, 0, True), (1, 1, True), (0, 0, True), (0, 1, True)]


def test_a_slow_stage_sets_the_pace() -> None:
    line = simulate([[1.0], [2.0], [1.0]], [[2.0], [4.0], [2.0]], 100)
    # It starts after one forward before it (1), waits once for the first backward (1), and one backward follows (2).
    assert line.makespan == pytest.approx(100 * 6.0 + 1.0 + 1.0 + 2.0)
