"""Sends memory copies between nodes: an agent's server, which keeps them and hands them out, and its clients.

put   header once, then for each step: state and numbers; every step is acknowledged when it is complete
get   a range of bytes of a file
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from llm_launch import wire
from llm_launch.copy_files import CopyFile, copy_name
from llm_launch.door import PAUSE_S, Door
from llm_launch.private import open_own_file
from llm_parallel.errors import UserError

CHUNK_BYTES = 8 << 20
STALL_S = 5.0
"""A partner node that takes no chunk for so long gets no more copies."""


class CopyServer:
    """Serves one node's folder in threads. Listens on ``host``; the port is chosen by the system."""

    def __init__(self, host: str, folder: Path, secret: str) -> None:
        self._folder, self._secret = folder, secret
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=1024)
        self._door, self._closed = Door(), False
        self.address: tuple[str, int] = (host, self._listener.getsockname()[1])
        threading.Thread(target=self._accept, name="copies", daemon=True).start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if not self._closed:  # no descriptor is left: strangers hold them, or this process does for a moment
                    self._door.make_room()
                    time.sleep(PAUSE_S)
                continue
            number = self._door.enter(connection)
            try:
                threading.Thread(target=self._serve, args=(connection, number), name="copy", daemon=True).start()
            except RuntimeError:  # no thread can be started now
                self._door.leave(number)
                connection.close()

    def close(self) -> None:
        """Stops listening. A thread that waits in accept would keep a closed socket alive."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self, connection: socket.socket, number: int) -> None:
        with connection, contextlib.suppress(OSError, ValueError, KeyError, UserError):
            try:
                sealed = wire.accept_blocking(connection, self._secret)
            finally:
                self._door.leave(number)
            with sealed:
                while (request := wire.receive(sealed)) is not None:
                    if request["do"] == "put":
                        self._keep(sealed, request["header"])
                    elif request["do"] == "get":
                        self._give(sealed, request)

    def _keep(self, connection: socket.socket, header: dict[str, Any]) -> None:
        path = self._folder / "kept" / copy_name(int(header["generation"]), int(header["rank"]))
        file = CopyFile.create(path, header)
        wire.send(connection, {"ok": True})
        while (message := wire.receive(connection)) is not None:
            slot = int(message["slot"]) & 1
            file.begin(slot)
            wire.receive_into(connection, file.data(slot))
            file.commit(slot, message["step"], message["state"])
            wire.send(connection, {"step": message["step"]})

    def _give(self, connection: socket.socket, request: dict[str, Any]) -> None:
        kind = "kept" if request["kind"] == "kept" else "own"
        path = self._folder / kind / copy_name(int(request["generation"]), int(request["rank"]))
        file = CopyFile.open(path)
        if "slot" not in request:
            wire.send(connection, {"header": file.header, "steps": file.steps()})
            return
        slot = int(request["slot"]) & 1
        start, stop = int(request["start"]), int(request["stop"])
        data = file.data(slot)
        wire.send(connection, {"bytes": max(0, min(stop, len(data)) - start), "state": file.state(slot)})
        connection.sendall(data[start:stop])


class CopySender:
    """Sends one worker's share to its partner node, step after step, in a thread of the worker."""

    def __init__(self, address: tuple[str, int], secret: str, file: CopyFile) -> None:
        self._address, self._secret, self._file = address, secret, file
        self._wanted = threading.Condition()
        self._next: tuple[int, int] | None = None
        self._closed = False
        self.acknowledged = -1
        self.failure: str | None = None
        threading.Thread(target=self._run, name="copy-sender", daemon=True).start()

    def send(self, step: int, slot: int) -> None:
        """Starts sending ``slot``, which holds ``step`` and stays untouched until ``wait(step)`` returns."""
        with self._wanted:
            self._next = (step, slot)
            self._wanted.notify_all()

    def wait(self, step: int, timeout_s: float) -> bool:
        """Whether the partner holds ``step``; waits for it. False if it could not be sent: this
        generation then makes no further copies, and training goes on."""
        with self._wanted:
            self._wanted.wait_for(lambda: self.acknowledged >= step or self.failure or self._closed, timeout_s)
            return self.acknowledged >= step

    def close(self) -> None:
        """Ends the thread after what it is sending."""
        with self._wanted:
            self._closed = True
            self._wanted.notify_all()

    def _run(self) -> None:
        try:
            with (
                wire.connect_blocking(*self._address, self._secret) as connection,
                os.fdopen(open_own_file(self._file.path, os.O_RDONLY), "rb") as file,
            ):
                connection.settimeout(STALL_S)  # of each chunk
                wire.send(connection, {"do": "put", "header": self._file.header})
                if wire.receive(connection) is None:
                    raise wire.WireError("the partner node has no room for the memory copy")
                while True:
                    with self._wanted:
                        self._wanted.wait_for(lambda: self._next is not None or self._closed)
                        if self._next is None:
                            return
                        (step, slot), self._next = self._next, None
                    wire.send(connection, {"slot": slot, "step": step, "state": self._file.state(slot)})
                    for start in range(0, self._file.data_bytes, CHUNK_BYTES):
                        # sendfile takes the file's own pages: copying them would take processor time from the step.
                        count = min(CHUNK_BYTES, self._file.data_bytes - start)
                        connection.sendfile(file, self._file.data_offset(slot) + start, count)
                    if wire.receive(connection) is None:
                        raise wire.WireError("the partner node ended the connection")
                    with self._wanted:
                        self.acknowledged = step
                        self._wanted.notify_all()
        except OSError as error:
            late = isinstance(error, TimeoutError)
            with self._wanted:
                self.failure = f"it has taken nothing for {STALL_S:g} s" if late else str(error)
                self._wanted.notify_all()


class RemoteCopy:
    """Reads a file of another node, range by range."""

    def __init__(self, address: tuple[str, int], secret: str, kind: str, generation: int, rank: int) -> None:
        self._connection = wire.connect_blocking(*address, secret)
        self._which = {"do": "get", "kind": kind, "generation": generation, "rank": rank}
        wire.send(self._connection, self._which)
        answer = wire.receive(self._connection)
        if answer is None:
            raise wire.WireError(f"the copy of rank {rank} is gone")
        self.header: dict[str, Any] = answer["header"]
        self._slots = {int(step): slot for step, slot in answer["steps"].items()}

    def read(self, step: int, start: int, stop: int) -> tuple[dict[str, Any], bytearray]:
        """State, and bytes ``start`` to ``stop`` of the numbers, of ``step``. Raises ConnectionError if it is gone."""
        if step not in self._slots:
            raise wire.WireError(f"the copy of step {step} is gone")
        wire.send(self._connection, {**self._which, "slot": self._slots[step], "start": start, "stop": stop})
        answer = wire.receive(self._connection)
        if answer is None:
            raise wire.WireError("the node with the copy ended the connection")
        data = bytearray(answer["bytes"])
        wire.receive_into(self._connection, memoryview(data))
        return answer["state"], data

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()
