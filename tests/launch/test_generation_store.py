"""The store by which workers find each other: what it answers, beside torch's own, and that no stranger reaches it."""

from __future__ import annotations

import datetime
import socket
import threading
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_launch import wire
from llm_launch.generation_store import GenerationStore
from llm_launch.member import Assignment, Member
from llm_launch.progress import Marker, ProgressPage
from llm_parallel.worker.store import ControllerStore
from tests.support.harness import run_ranks


class Served:
    """A store and members that reach it as through an agent: each by a socket of its own."""

    def __init__(self, count: int) -> None:
        self.store, self._lock = GenerationStore(), threading.Lock()
        self.ends = [socket.socketpair() for _ in range(count)]
        for ours, _ in self.ends:
            threading.Thread(target=self._serve, args=(ours,), daemon=True).start()

    def _serve(self, end: socket.socket) -> None:
        sending = threading.Lock()
        while (message := wire.receive(end)) is not None:
            if message["is"] != "store":
                continue

            with self._lock:
                self.store.serve(message, partial(self._reply, end, sending, message.get("id")))

    @staticmethod
    def _reply(end: socket.socket, sending: Any, number: Any, value: Any) -> None:
        with sending:
            wire.send(end, {"is": "value", "id": number, "value": value})

    def close(self) -> None:
        """Ends the threads."""
        for pair in self.ends:
            for end in pair:
                end.close()


def member_at(end: socket.socket) -> Member:
    """A worker's side of a connection, in generation 1. Its thread ends with this process."""
    member = Member(end, Marker(ProgressPage(slots=1), 0), "n1", "", "")
    threading.Thread(target=member._listen, daemon=True).start()
    member._generation = 1
    return member


KEYS = st.sampled_from(["a", "b", "c/d", "é"])
VALUES = st.binary(max_size=6)
CALLS = st.one_of(
    st.tuples(st.just("set"), KEYS, VALUES),
    st.tuples(st.just("get"), KEYS),
    st.tuples(st.just("add"), st.just("number"), st.integers(-5, 5)),
    st.tuples(st.just("check"), st.lists(KEYS, min_size=1, max_size=3)),
    st.tuples(st.just("compare_set"), KEYS, VALUES, VALUES),
    st.tuples(st.just("delete_key"), KEYS),
    st.tuples(st.just("append"), KEYS, VALUES),
    st.tuples(st.just("num_keys")),
)


@pytest.mark.processes
def test_it_answers_as_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sequence of calls gives the answers of ``HashStore``."""
    monkeypatch.setattr("os._exit", lambda _: None)  # a member ends its process with its agent's connection
    served = Served(1)
    member = member_at(served.ends[0][1])

    @settings(max_examples=60, deadline=None)
    @given(st.lists(CALLS, max_size=12))
    def same(calls: list[tuple[Any, ...]]) -> None:
        ControllerStore(member, 1).num_keys()  # what was said before, and has no answer, has arrived
        served.store = GenerationStore()
        ours, theirs = ControllerStore(member, 1), dist.HashStore()
        for name, *arguments in calls:
            if name == "get" and not theirs.check(arguments):
                continue  # either would wait
            if name == "num_keys":
                continue  # HashStore counts differently after a deletion
            values = [value.decode("latin-1") if isinstance(value, bytes) else value for value in arguments]
            mine, other = getattr(ours, name)(*values), getattr(theirs, name)(*values)
            if name not in ("set", "append"):
                assert mine == other, (name, values)

    same()
    served.close()


@pytest.mark.processes
def test_a_question_waits_for_its_keys_and_ends_with_its_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os._exit", lambda _: None)
    served = Served(2)
    members = [member_at(end) for _, end in served.ends]
    stores = [ControllerStore(member, 1) for member in members]
    got: list[Any] = []
    waiting = threading.Thread(target=lambda: got.append(stores[0].multi_get(["x", "y"])))
    waiting.start()
    stores[1].set("x", b"1")
    stores[1].set("y", b"\xff")
    waiting.join(60)
    assert got == [[b"1", b"\xff"]]

    def ask() -> None:
        try:
            stores[0].get("never")
        except ConnectionError as error:
            got.append(str(error))

    asking = threading.Thread(target=ask)
    asking.start()
    wire.send(served.ends[0][0], {"is": "abort", "generation": 1})
    asking.join(60)
    assert got[1] == "the generation was given up before its store answered"
    with pytest.raises(ConnectionError, match="given up"):
        stores[0].set("late", b"")
    with pytest.raises(dist.DistStoreError, match=r"the store has had no never for 0\.01 s"):
        stores[1].wait(["never"], datetime.timedelta(seconds=0.01))
    served.close()


def _form(rank: int, world_size: int, ends: list[socket.socket]) -> float:
    store = ControllerStore(member_at(ends[rank]), 1)
    dist.barrier()
    dist.destroy_process_group()  # the harness's own
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    groups = [dist.new_group([0, 1]), dist.new_group([1, 2]), dist.new_group(list(range(world_size)))]
    total = torch.tensor([2.0**rank])
    for group in groups:
        if rank in dist.get_process_group_ranks(group):
            dist.all_reduce(total, group=group)
    return float(total)


@pytest.mark.gloo
def test_gloo_finds_its_peers_by_it() -> None:
    """1 + 2 in the first group, 3 + 4 in the second, and the sum of 3, 7 and 7 in the last."""
    served = Served(3)
    try:
        assert run_ranks(_form, 3, [end for _, end in served.ends]) == [17.0] * 3
    finally:
        served.close()


def test_an_assignment_names_no_address_of_a_store() -> None:
    """There is no port that a stranger could set keys at."""
    assert "store" not in Assignment.__dataclass_fields__
