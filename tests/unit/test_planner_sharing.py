"""Processes on shared cores, against times worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_parallel.planner.pipeline_simulation import order, simulate
from llm_parallel.planner.sharing import IDLE, Op, share_cores


@pytest.mark.parametrize(("processes", "cores", "seconds"), [(1, 2, 3.0), (2, 2, 3.0), (4, 2, 6.0), (8, 2, 12.0)])
def test_equal_work(processes: int, cores: int, seconds: float) -> None:
    programs = [[Op(1.0, "a"), Op(2.0, "b")]] * processes
    whole, parts = share_cores(programs, cores)
    assert whole == pytest.approx(seconds) and parts == pytest.approx({"a": seconds / 3, "b": 2 * seconds / 3})


def test_who_ends_early_frees_a_core() -> None:
    """1, 2 and 3 s on two cores: at 2/3 of one each until 1.5 s, then alone."""
    whole, parts = share_cores([[Op(1.0, "a")], [Op(2.0, "a")], [Op(3.0, "a")]], 2)
    assert whole == pytest.approx(1.5 + 2.0)
    assert parts[IDLE] == pytest.approx(((3.5 - 1.5) + (3.5 - 2.5)) / 3)


def test_a_group_begins_and_ends_together() -> None:
    """The first process waits for the group, which counts as the group's kind, and a third process gets its core."""
    both = (0, 1)
    programs = [[Op(1.0, "a"), Op(1.0, "sum", both)], [Op(3.0, "a"), Op(1.0, "sum", both)]]
    whole, parts = share_cores(programs, 2)
    assert whole == pytest.approx(4.0) and parts["sum"] == pytest.approx((3.0 + 1.0) / 2)
    whole, _ = share_cores([*programs, [Op(2.0, "a")]], 1)
    assert whole == pytest.approx(1 + 1 + 3 + 1 + 2)


def test_crowded_cores_are_slower() -> None:
    assert share_cores([[Op(3.0, "a")]] * 2, 2, crowded=0.75)[0] == pytest.approx(4.0)
    assert share_cores([[Op(3.0, "a")]], 2, crowded=0.75)[0] == pytest.approx(3.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 3), st.floats(0.1, 2), st.floats(0.1, 4), st.integers(1, 6))
def test_pipelines(stages: int, count: int, chunks: int, forward: float, backward: float, cores: int) -> None:
    """With a core for each stage it is the schedule's simulation; with one core, the sum of all work."""
    if chunks > 1:
        count = stages * count
    programs = [
        [
            Op(backward if back else forward, "work", needs=before(stage, chunk, number, back, stages, chunks),
               gives=(stage, chunk, number, back))
            for chunk, number, back in order(stage, stages, chunks, count)
        ]
        for stage in range(stages)
    ]  # fmt: skip
    whole, parts = share_cores(programs, cores)
    total = stages * chunks * count * (forward + backward)
    alone = simulate([[forward] * chunks] * stages, [[backward] * chunks] * stages, count).makespan
    assert sum(parts.values()) == pytest.approx(whole)
    assert whole >= max(alone, total / cores) * (1 - 1e-9)
    if cores >= stages:
        assert whole == pytest.approx(alone)
    if cores == 1:
        assert whole == pytest.approx(total)


def before(stage: int, chunk: int, number: int, back: bool, stages: int, chunks: int) -> object:
    virtual = chunk * stages + stage
    if not back:
        return None if virtual == 0 else (*_place(virtual - 1, stages), number, False)
    if virtual == stages * chunks - 1:
        return stage, chunk, number, False
    return (*_place(virtual + 1, stages), number, True)


def _place(virtual: int, stages: int) -> tuple[int, int]:
    return virtual % stages, virtual // stages
