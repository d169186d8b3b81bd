"""Arithmetic of the time split; every method of torch.distributed that communicates is counted, and none stays
patched."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llm_parallel.parallel import comm_time
from llm_parallel.parallel.comm_time import METHODS, CommTime, Link

SILENT = {
    "_backend_id", "_enable_collectives_timing", "_get_backend", "_get_backend_name", "_get_sequence_number_for_group",
    "_has_hooks", "_id", "_register_backend", "_register_on_completion_hook", "_set_default_backend", "_set_group_desc",
    "_set_group_name", "_set_sequence_number_for_group", "_start_coalescing", "_wait_for_pending_works", "abort",
    "boxed", "get_group_store", "merge_remote_group", "name", "rank", "set_timeout", "shutdown", "size", "split_group",
    "unbox", "use_pg_for_symm_mem_rendezvous", "_pybind11_conduit_v1_", "BackendType",
}  # fmt: skip
"""Names of the ProcessGroup methods that communicate no data."""


@pytest.fixture
def alone() -> Iterator[None]:
    """A job of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=20))
    yield
    dist.destroy_process_group()


def world_name() -> str:
    assert dist.group.WORLD is not None
    return dist.group.WORLD.group_name


def test_every_method_of_a_process_group_is_known() -> None:
    """Fails if a version of torch adds a collective that is not counted."""
    callables = {name for name in dir(dist.ProcessGroup) if not name.startswith("__")}
    callables = {name for name in callables if callable(getattr(dist.ProcessGroup, name))}
    assert callables - SILENT == {name for name in METHODS if hasattr(dist.ProcessGroup, name)}


def test_nothing_stays_patched(alone: None) -> None:
    before = {name: getattr(dist.ProcessGroup, name) for name in METHODS if hasattr(dist.ProcessGroup, name)}
    wait = dist.Work.wait
    comm = CommTime({}, cuda=False)
    with pytest.raises(KeyError), comm.recording():
        assert dist.Work.wait is not wait
        assert all(getattr(dist.ProcessGroup, name) is not method for name, method in before.items())
        raise KeyError
    assert {name: getattr(dist.ProcessGroup, name) for name in before} == before
    assert dist.Work.wait is wait
    dist.all_reduce(torch.ones(1))  # binds again
    assert not comm.calls


def test_nested_recording_is_refused(alone: None) -> None:
    comm = CommTime({}, cuda=False)
    with comm.recording(), pytest.raises(AssertionError), comm.recording():
        pass


class FakeClock:
    """perf_counter that a test moves, and that moves by ``tick`` whenever it is read."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 100.0, tick

    def perf_counter(self) -> float:
        self.now += self.tick
        return self.now


def booked(monkeypatch: pytest.MonkeyPatch, axis: str, link: Link, call_s: float, wait_s: float) -> Any:
    """Split of a 10 s step with one collective in forward and backward, whose call and wait take these times."""
    clock = FakeClock()
    monkeypatch.setattr(comm_time, "time", clock)

    def slow(seconds: float) -> Any:
        def act(*_: Any, **__: Any) -> Any:
            clock.now += seconds
            return dist.Work()

        return act

    monkeypatch.setattr(dist.ProcessGroup, "send", slow(call_s))
    monkeypatch.setattr(dist.Work, "wait", slow(wait_s))
    comm = CommTime({world_name(): axis}, cuda=False, link=link)
    with comm.recording(), comm.during(comm_time.FORWARD_BACKWARD):
        work = dist.group.WORLD.send([torch.zeros(1000, dtype=torch.uint8)], 0, 0)  # type: ignore[union-attr]
        work.wait()
        work.wait()
    return comm.take(10.0, {"data": 1.0, "forward_backward": 6.0, "optimizer": 2.0})


def test_split_of_one_wait(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second wait for the same work does not count, since the work is done by then."""
    split = booked(monkeypatch, "tp", Link(), call_s=0.5, wait_s=1.5)
    assert (split.tp, split.cp, split.dp, split.pp, split.bubble) == pytest.approx((2.0, 0, 0, 0, 0))
    assert (split.data, split.compute, split.optimizer, split.other) == pytest.approx((1.0, 4.0, 2.0, 1.0))


@pytest.mark.parametrize("link", [Link(0.25, 0.001), Link(0.0, 0.00125)])
def test_bubble_is_what_the_transfer_does_not_take(alone: None, monkeypatch: pytest.MonkeyPatch, link: Link) -> None:
    """1,000 bytes take 1.25 s: of 2 s waited 0.75 s are bubble, whether the call or the wait holds the process up."""
    for call_s, wait_s in ((2.0, 0.0), (0.0, 2.0), (0.5, 1.5)):
        split = booked(monkeypatch, "pp", link, call_s, wait_s)
        assert (split.pp, split.bubble, split.compute) == pytest.approx((1.25, 0.75, 4.0))
    split = booked(monkeypatch, "pp", link, 0.0, 1.0)
    assert (split.pp, split.bubble) == pytest.approx((1.0, 0.0)), "a message that was on its way already"


def test_other_groups_are_other(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    split = booked(monkeypatch, "other", Link(), 0.5, 1.5)
    assert (split.compute, split.other, split.tp, split.dp) == pytest.approx((4.0, 3.0, 0, 0))


def test_a_group_of_one_is_compute(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    split = booked(monkeypatch, "self", Link(), 0.5, 1.5)
    assert (split.compute, split.other) == pytest.approx((6.0, 1.0))


def test_take_forgets(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm_time, "time", FakeClock(tick=0.25))
    comm = CommTime({world_name(): "dp"}, cuda=False)
    with comm.recording(), comm.during(comm_time.OPTIMIZER):
        dist.all_reduce(torch.ones(1000))
    assert comm.calls == {("dp", "allreduce"): 1}
    times = {"data": 0.0, "forward_backward": 0.0, "optimizer": 5.0}
    first = comm.take(5.0, times)
    assert 0 < first.dp < 2 and first.optimizer == pytest.approx(5.0 - first.dp)
    assert comm.take(5.0, times).dp == 0.0


def test_a_call_that_fails_is_booked_and_raised(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr(comm_time, "time", clock)

    def broken(*_: Any, **__: Any) -> Any:
        clock.now += 0.5
        raise RuntimeError("connection closed")

    monkeypatch.setattr(dist.ProcessGroup, "allreduce", broken)
    comm = CommTime({world_name(): "dp"}, cuda=False)
    with pytest.raises(RuntimeError, match="connection closed"), comm.recording():
        with comm.during(comm_time.FORWARD_BACKWARD):
            dist.all_reduce(torch.ones(1))
    assert comm.phase == comm_time.OUTSIDE
    assert comm.take(1.0, {"data": 0.0, "forward_backward": 1.0, "optimizer": 0.0}).dp == pytest.approx(0.5)


def test_works_that_nobody_waits_for_do_not_pile_up(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for a gather counts until the next step; after that the gather is forgotten."""
    clock = FakeClock()
    monkeypatch.setattr(comm_time, "time", clock)
    works: list[dist.Work] = []
    monkeypatch.setattr(dist.ProcessGroup, "allreduce", lambda *_, **__: works.append(dist.Work()) or works[-1])

    def wait(*_: Any, **__: Any) -> None:
        clock.now += 0.5

    monkeypatch.setattr(dist.Work, "wait", wait)
    comm = CommTime({world_name(): "dp"}, cuda=False)
    times = {"data": 0.0, "forward_backward": 1.0, "optimizer": 0.0}
    waited = []
    with comm.recording(), comm.during(comm_time.FORWARD_BACKWARD):
        for _ in range(3):
            dist.group.WORLD.allreduce([torch.ones(1)])  # type: ignore[union-attr]
        for work in works:
            work.wait()
            waited.append(comm.take(1.0, times).dp)
    assert waited == pytest.approx([0.5, 0.5, 0.0])
