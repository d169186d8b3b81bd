"""Strangers who connect by the hundred, and say nothing, or a byte at a time."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from llm_launch import copy_transfer as copy_transfer_module
from llm_launch import fleet as fleet_module
from llm_launch import wire
from llm_launch.copy_transfer import CopyServer
from llm_launch.door import Door
from tests.launch.fake_agents import Nodes, Story, play
from tests.launch.test_controller import FOUR, config_of

SECRET = "of this test"


@contextlib.contextmanager
def few_files(more: int) -> Iterator[None]:
    """This process may open so many files more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name.name) for name in Path("/proc/self/fd").iterdir()) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connect(address: tuple[str, int], count: int) -> list[socket.socket]:
    """As many silent connections as the system gives."""
    found = []
    with contextlib.suppress(OSError):
        for _ in range(count):
            found.append(socket.create_connection(address, 5))
    return found


def test_a_flood_does_not_make_a_copy_server_deaf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more connections than descriptors, the run's own is served."""
    monkeypatch.setattr(copy_transfer_module, "PAUSE_S", 0.001)
    server = CopyServer("127.0.0.1", tmp_path, SECRET)
    server._door.most = 20
    strangers: list[socket.socket] = []
    try:
        with few_files(60):
            strangers = connect(server.address, 200)
            assert len(strangers) > 20
            for _ in range(
                5
            ):  # the server is in this process: descriptors for our own connection, and for it to accept
                strangers.pop().close()
            with wire.connect_blocking(*server.address, SECRET, 60.0):
                pass
        assert threading.active_count() < 60
    finally:
        for stranger in strangers:
            stranger.close()
        server.close()


def test_a_flood_does_not_reach_the_agents_of_a_controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go on, and one that comes anew is let in, while strangers hold more connections than may wait."""
    monkeypatch.setattr(fleet_module, "PAUSE_S", 0.001)
    nodes = Nodes(config_of(tmp_path), FOUR)
    strangers: list[socket.socket] = []

    async def act(story: Story) -> None:
        fleet = story.controller.fleet
        fleet.door.most = 10
        await story.training(4)
        strangers.extend(await asyncio.to_thread(connect, tuple(fleet.address), 100))
        assert len(strangers) == 100
        nodes.make_steps(1)
        await story.heard_of(nodes.step)
        nodes.lose("n3")
        await story.training(3)
        nodes.make_steps(1)
        await story.training(4)
        assert fleet.door.turned_away >= 80

    try:
        _, story = play(nodes.config, nodes, act)
        assert len(story.events("detect")) == 1 and not story.events("remove")
    finally:
        for stranger in strangers:
            stranger.close()


def test_a_queue_of_strangers_leaves_moments_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred wait to be let in: between any two of them everything else gets its turn, and once they fill half of
    the places there is a pause after each."""
    pause_s, pauses, sleep = 0.00123, list[float](), asyncio.sleep

    async def noted(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(seconds)

    monkeypatch.setattr(fleet_module, "CROWDED_S", pause_s)
    monkeypatch.setattr(asyncio, "sleep", noted)
    nodes, turns = Nodes(config_of(tmp_path), FOUR), list[int]()
    strangers: list[socket.socket] = []

    async def act(story: Story) -> None:
        door = story.controller.fleet.door
        door.most = 50
        await story.training(4)
        strangers.extend(connect(tuple(story.controller.fleet.address), 200))  # all of them before any is let in
        while door.turned_away < 20:
            turns.append(door.turned_away + len(door._waiting))
            await sleep(0)
        assert pauses.count(pause_s) >= 40, "of the 70 that came, all but the first 25"
        assert not story.events("detect") and not story.events("lost")

    try:
        play(nodes.config, nodes, act)
        assert turns[0] == 0 and max(after - before for before, after in pairwise(turns)) <= 2
    finally:
        for stranger in strangers:
            stranger.close()


@pytest.mark.parametrize("ours", ["the server's end", "the client's end"])
def test_a_byte_at_a_time_does_not_stretch_the_time_limit(ours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is for the whole handshake; each byte alone comes in time."""
    monkeypatch.setattr(wire, "AUTHENTICATION_S", 0.3)
    listener = socket.create_server(("127.0.0.1", 0))
    there, over = socket.create_connection(listener.getsockname()), threading.Event()
    here, _ = listener.accept()

    def drip(end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not over.wait(0.05):
                end.sendall(b"x")

    try:
        if ours == "the server's end":
            threading.Thread(target=drip, args=(there,), daemon=True).start()
            with pytest.raises(TimeoutError):
                wire.accept_blocking(here, SECRET)
        else:
            accepting = threading.Thread(target=lambda: drip(listener.accept()[0]), daemon=True)
            accepting.start()
            with pytest.raises(TimeoutError):
                wire.connect_blocking(*listener.getsockname(), SECRET, 0.3)
    finally:
        over.set()
        for end in (here, there, listener):
            end.close()


def test_the_oldest_is_turned_away() -> None:
    door, pairs = Door(2), [socket.socketpair() for _ in range(3)]
    numbers = [door.enter(ours) for ours, _ in pairs]
    assert pairs[0][1].recv(1) == b"" and door.turned_away == 1
    for number in numbers:
        door.leave(number)
    door.make_room()
    assert door.turned_away == 1, "those that have authenticated are not touched"
    for pair in pairs:
        for end in pair:
            end.close()
