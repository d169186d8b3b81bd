"""Messages without the secret are refused, and copies in memory are complete or absent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_launch import copy_transfer as copy_transfer_module
from llm_launch import wire
from llm_launch.copy_files import Claim, CopyFile, copy_name, forget_all_but, forget_stale, inventory, run_folder
from llm_launch.copy_transfer import CopySender, CopyServer, RemoteCopy
from llm_parallel.errors import UserError


def test_messages_pass_between_those_who_share_the_secret() -> None:
    async def serve_and_ask(secret: str) -> object:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                channel = await wire.accept(reader, writer, "right")
            except wire.WireError:
                return
            message = await channel.receive()
            channel.send({"twice": message["text"] * 2} if message else {})

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with contextlib.closing(server):  # on Python 3.12 `async with` waits until every connection has ended
            channel = await wire.connect("127.0.0.1", port, secret, timeout_s=5)
            channel.send({"text": "ab"})
            return await channel.receive()

    assert asyncio.run(serve_and_ask("right")) == {"twice": "abab"}
    with pytest.raises(ConnectionError):
        asyncio.run(serve_and_ask("wrong"))


def test_a_server_that_does_not_know_the_secret_is_refused() -> None:
    async def ask() -> None:
        async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(bytes(wire.NONCE_BYTES))
            await reader.readexactly(2 * wire.NONCE_BYTES)
            writer.write(bytes(wire.NONCE_BYTES))

        server = await asyncio.start_server(impostor, "127.0.0.1", 0)
        with contextlib.closing(server):
            await wire.connect("127.0.0.1", server.sockets[0].getsockname()[1], "right", timeout_s=5)

    with pytest.raises(wire.WireError, match="does not know the run's secret"):
        asyncio.run(ask())


def test_an_endless_message_is_not_waited_for() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(wire.LENGTH.pack(wire.MAX_BYTES + 1))
        with pytest.raises(wire.WireError, match="bytes announced"):
            wire.receive(ours)


def make(folder: Path, generation: int = 1, rank: int = 0, numbers: int = 5) -> CopyFile:
    header = {"generation": generation, "rank": rank, "numbers": numbers, "index": []}
    return CopyFile.create(folder / "own" / copy_name(generation, rank), header)


def test_a_slot_counts_only_when_committed(tmp_path: Path) -> None:
    file = make(tmp_path)
    assert inventory(tmp_path) == []
    file.begin(0)
    file.data(0)[:] = bytes(range(60))
    large = {"paths": [f"/data/part-{number:05d}/tokens" for number in range(60_000)]}
    file.commit(1, 7, large)
    assert file.state(1) == large, "more than a slot holds as it is"
    file.begin(1)
    file.commit(0, 0, {"x": 1})
    file.begin(1)
    assert inventory(tmp_path) == [{"kind": "own", "generation": 1, "rank": 0, "steps": [0], "origin": None}]
    read = CopyFile.open(file.path)
    assert (bytes(read.data(0)), read.state(0), read.steps()) == (bytes(range(60)), {"x": 1}, {0: 0})
    file.begin(0)
    assert CopyFile.open(file.path).steps() == {}


def test_other_generations_are_forgotten(tmp_path: Path) -> None:
    for generation in (1, 2, 3, 4):
        make(tmp_path, generation).commit(0, 4, {})
    forget_all_but(tmp_path, [2, 4])
    assert [entry["generation"] for entry in inventory(tmp_path)] == [2, 4]
    forget_all_but(tmp_path, [])
    assert not list(tmp_path.glob("*/g*"))


def test_what_a_dead_run_left_in_memory_is_removed_by_the_next(tmp_path: Path) -> None:
    shm = tmp_path / "shm"
    shm.mkdir()
    mine, recent, held, dead = (run_folder(shm, tmp_path / name) / "n1" for name in ("mine", "recent", "held", "dead"))
    claim = Claim(held)
    claim.renew()
    for folder in (mine, recent, held, dead):
        make(folder).commit(0, 4, {})
        os.utime(folder, None if folder == recent else (0, 0))
    forget_stale(mine)
    assert inventory(mine) and inventory(recent), "one's own copies are what a requeue goes on from"
    assert inventory(held), "its agent lives, whatever the clock says: the machine has slept, or the clock was set"
    assert not dead.parent.exists()
    claim.close()
    os.utime(held, (0, 0))
    forget_stale(mine)
    assert not held.parent.exists()


def test_a_claim_is_taken_again_when_its_folder_was_removed(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, tmp_path / "run") / "n1"
    claim = Claim(folder)
    claim.renew()
    folder.rmdir()
    claim.renew()
    os.utime(folder, (0, 0))
    forget_stale(run_folder(tmp_path, tmp_path / "other") / "n1")
    assert folder.is_dir()
    claim.close()


def test_no_room_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"elastic\.replica_dir: .* has no room for"):
        make(tmp_path, numbers=1 << 50)
    assert not list((tmp_path / "own").iterdir())


def test_a_partner_keeps_what_was_sent_and_hands_it_out(tmp_path: Path) -> None:
    server = CopyServer("127.0.0.1", tmp_path / "there", "right")
    file = make(tmp_path / "here", generation=2, rank=9)
    sender = CopySender(server.address, "right", file)
    for step in (6, 7, 8):
        slot = step % 2
        file.begin(slot)
        file.data(slot)[:] = bytes([step] * 60)
        file.commit(slot, step, {"step": step})
        sender.send(step, slot)
        assert sender.wait(step, 10)
    assert inventory(tmp_path / "there") == [
        {"kind": "kept", "generation": 2, "rank": 9, "steps": [7, 8], "origin": None}
    ]
    copy = RemoteCopy(server.address, "right", "kept", 2, 9)
    assert copy.read(7, 10, 20) == ({"step": 7}, bytearray([7] * 10))
    with pytest.raises(wire.WireError, match="step 6 is gone"):
        copy.read(6, 0, 4)
    copy.close()
    sender.close()
    with pytest.raises(ConnectionError):
        RemoteCopy(server.address, "wrong", "kept", 2, 9)
    server.close()


def test_a_partner_that_is_gone_is_noticed_and_not_waited_for(tmp_path: Path) -> None:
    server = CopyServer("127.0.0.1", tmp_path / "there", "right")
    server.close()
    file = make(tmp_path / "here")
    file.commit(0, 1, {})
    sender = CopySender(server.address, "right", file)
    sender.send(1, 0)
    assert not sender.wait(1, 10)
    assert sender.failure


def test_a_partner_that_takes_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has authenticated, and then its machine stalls: the sender does not wait for a minute, and says why."""
    monkeypatch.setattr(copy_transfer_module, "STALL_S", 0.1)
    listener = socket.create_server(("127.0.0.1", 0))

    def stall() -> None:
        connection, _ = listener.accept()
        with wire.accept_blocking(connection, "right"):
            over.wait(60)

    over = threading.Event()
    threading.Thread(target=stall, daemon=True).start()
    file = make(tmp_path)
    file.commit(0, 1, {})
    sender = CopySender(listener.getsockname(), "right", file)
    sender.send(1, 0)
    assert not sender.wait(1, 60)
    over.set()
    listener.close()
    assert sender.failure == "it has taken nothing for 0.1 s"


class Meddler:
    """Stands between client and server, as whoever owns a machine on the way: lets the handshake pass, and then changes
    what the client sends."""

    def __init__(self, change: Callable[[list[bytes]], list[bytes]], count: int) -> None:
        self._change, self._count = change, count
        self._server = socket.create_server(("127.0.0.1", 0))
        self._front = socket.create_server(("127.0.0.1", 0))
        self.address = self._front.getsockname()
        self.behind = self._server
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        client, _ = self._front.accept()
        with client, socket.create_connection(self._server.getsockname()) as server:
            client.sendall(wire.receive_bytes(server, wire.NONCE_BYTES))
            server.sendall(wire.receive_bytes(client, 2 * wire.NONCE_BYTES))
            client.sendall(wire.receive_bytes(server, wire.NONCE_BYTES))
            messages = []
            for _ in range(self._count):
                head = wire.receive_bytes(client, wire.LENGTH.size)
                rest = wire.receive_bytes(client, wire.CODE_BYTES + wire.LENGTH.unpack(head)[0])
                messages.append(head + rest)
            for message in self._change(messages):
                server.sendall(message)

    def close(self) -> None:
        """Ends it."""
        self._server.close()
        self._front.close()


MEDDLING: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "nothing": lambda sent: sent,
    "a changed byte": lambda sent: [sent[0], sent[1][:-3] + b"9" + sent[1][-2:], sent[2]],
    "a message left out": lambda sent: [sent[0], sent[2]],
    "a message again": lambda sent: [sent[0], sent[0], sent[1]],
    "another order": lambda sent: [sent[0], sent[2], sent[1]],
    "a message of its own": lambda sent: [sent[0], wire.encode({"is": "kill"})[:4] + bytes(16) + b'{"is":"kill"}'],
}


@pytest.mark.parametrize("kind", ["threads", "asyncio"])
@pytest.mark.parametrize("name", MEDDLING)
def test_what_is_changed_on_the_way_ends_the_connection(name: str, kind: str) -> None:
    meddler = Meddler(MEDDLING[name], 3)
    got: list[object] = []

    def send() -> None:
        with wire.connect_blocking(*meddler.address, "right") as connection:
            for number in (1, 2, 3):
                wire.send(connection, {"number": number})
            over.wait(60)

    over = threading.Event()
    threading.Thread(target=send, daemon=True).start()
    connection, _ = meddler.behind.accept()

    async def receive() -> None:
        connection.setblocking(False)
        channel = await wire.accept(*await asyncio.open_connection(sock=connection), "right")
        while (message := await channel.receive()) is not None:
            got.append(message["number"])

    try:
        ending = pytest.raises(wire.WireError, match="was changed, left out or put in on the way")
        with contextlib.nullcontext() if name == "nothing" else ending:
            if kind == "asyncio":
                asyncio.run(receive())
            else:
                with wire.accept_blocking(connection, "right") as sealed:
                    while (message := wire.receive(sealed)) is not None:
                        got.append(message["number"])
    finally:
        over.set()
        connection.close()
        meddler.close()
    assert got == ([1, 2, 3] if name == "nothing" else [1]), "what came before was whole"


def test_another_connections_messages_mean_nothing() -> None:
    """The same message by the same two, in another connection or the other direction, has another code."""
    nonces = [bytes([number]) * 64 for number in (1, 2)]
    codes = {wire.Seal("right", nonce, side).code(b"x") for nonce in nonces for side in (True, False)}
    assert len(codes) == 4
    wire.Seal("right", nonces[0], False).check(wire.Seal("right", nonces[0], True).code(b"x"), b"x")
