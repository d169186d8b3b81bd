"""What a drill causes from outside a run: frozen processes, floods of connections, a partner that says nothing, the end
of processes that write checkpoints."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil

from llm_launch import wire
from llm_launch.door import raise_file_limit

RECONNECT_EVERY_S = 0.1
RECONNECT_MOST = 20
"""Connections that a flood opens again at once where the other end closed them: 200 a second."""
DRIP_EVERY_S = 1.0
REMOVE_S = 10.0


def control_group_root(controller: str) -> Path | None:
    """Where control groups of version 1 of this controller can be made; None if there is no such place. Version 2 ends
    frozen processes, so it makes none that cannot be killed."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, folder, kind, options, *_ = line.split()
            if kind == "cgroup" and controller in options.split(",") and os.access(folder, os.W_OK):
                return Path(folder)
    return None


class ControlGroup:
    """A control group of version 1 for one process. Raises OSError where it cannot be made."""

    def __init__(self, controller: str, pid: int) -> None:
        root = control_group_root(controller)
        if root is None:
            raise OSError(f"no control group of {controller} can be made")
        self.path = root / f"llm-parallel-drill-{os.getpid()}-{pid}"
        self.path.mkdir()
        self.write("cgroup.procs", str(pid))

    def write(self, name: str, value: str) -> None:
        """Sets a value of the group."""
        (self.path / name).write_text(value)

    def remove(self) -> None:
        """Removes the group when its processes have ended."""
        deadline = time.monotonic() + REMOVE_S
        while time.monotonic() < deadline:
            try:
                self.path.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.05)


class _Background(ABC):
    """Something that goes on beside a run, from ``with`` to its end."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    @abstractmethod
    def _run(self) -> None:
        """Goes on until ``_over`` is set."""


class Flood(_Background):
    """Connections of a stranger to one address, held open. Most say nothing, some a byte every second; those that the
    other end closes are opened again. ``held``: those that are open; ``opened``: how many there were so far."""

    def __init__(self, address: tuple[str, int], silent: int = 1100, dripping: int = 100) -> None:
        super().__init__()
        raise_file_limit()
        self.address, self.silent, self.dripping = address, silent, dripping
        self.held: list[socket.socket] = []
        self.opened = 0

    def _run(self) -> None:
        dripped_s, wanted = 0.0, self.silent + self.dripping
        self._open(wanted)
        while not self._over.wait(RECONNECT_EVERY_S):
            self._drop_closed()
            self._open(min(RECONNECT_MOST, wanted - len(self.held)))
            if time.monotonic() - dripped_s > DRIP_EVERY_S:
                dripped_s = time.monotonic()
                for connection in self.held[-self.dripping :]:
                    with contextlib.suppress(OSError):
                        connection.send(b"x")
        for connection in self.held:
            connection.close()

    def _open(self, number: int) -> None:
        for _ in range(number):
            with contextlib.suppress(OSError):
                connection = socket.create_connection(self.address, 5.0)
                connection.setblocking(False)
                self.held.append(connection)
                self.opened += 1
            if self._over.is_set():
                return

    def _drop_closed(self) -> None:
        poll = select.poll()
        by_number = {connection.fileno(): connection for connection in self.held}
        for number in by_number:
            poll.register(number, select.POLLIN | select.POLLRDHUP)
        for number, _ in poll.poll(0):
            connection = by_number[number]
            with contextlib.suppress(BlockingIOError):
                try:
                    open_still = connection.recv(4096) != b""  # the other end's question is not answered
                except ConnectionError:
                    open_still = False
                if not open_still:
                    connection.close()
                    self.held.remove(connection)


class SilentPartner(_Background):
    """A node that takes in whatever a run's process sends it as memory copies, and never says that it has them."""

    def __init__(self, secret: str) -> None:
        super().__init__()
        self._secret = secret
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.1)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self.received = 0

    def _run(self) -> None:
        threads = []
        with self._listener:
            while not self._over.is_set():
                with contextlib.suppress(TimeoutError):
                    connection, _ = self._listener.accept()
                    threads.append(threading.Thread(target=self._swallow, args=(connection,), daemon=True))
                    threads[-1].start()

    def _swallow(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), wire.accept_blocking(connection, self._secret) as sealed:
            while data := sealed.recv(1 << 16):
                self.received += len(data)


class WriterKiller(_Background):
    """Kills the processes that workers start, which write checkpoints."""

    def __init__(self, workers: Callable[[], list[int]]) -> None:
        super().__init__()
        self._workers = workers
        self.killed = 0

    def _run(self) -> None:
        while not self._over.is_set():
            for pid in self._workers():
                with contextlib.suppress(OSError, ValueError):
                    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
                        os.kill(child, signal.SIGKILL)
                        self.killed += 1
            time.sleep(0.001)


def port_of_copies(agent_pid: int) -> tuple[str, int]:
    """Where the server of a node's memory copies listens: the only port of its agent. Raises OSError if it has none."""
    for found in psutil.Process(agent_pid).net_connections(kind="tcp"):
        if found.status == psutil.CONN_LISTEN:
            return found.laddr[0], found.laddr[1]
    raise OSError(f"process {agent_pid} listens at no port")
