"""A process that has imported all that training needs, and forks workers from itself: a replacement starts in
milliseconds instead of the seconds that the imports take, and none has to wait in memory.

It has no thread and has not touched a GPU, so that a fork is sound. It dies with the agent, and its workers with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from typing import Any

from llm_launch import wire
from llm_parallel.quiet import quiet_libraries

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Has the kernel send SIGKILL to this process when its parent dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def run_zygote(control: socket.socket) -> int:
    """Imports the modules of the first message, then serves ``fork`` until the agent closes the connection.

    fork: ``{"is": "fork", "worker": id, "module": name, "environment": {...}}`` with two descriptors (the worker's
    control socket and its log); answers ``{"is": "forked", "worker", "pid"}`` and, later, ``{"is": "exited", "pid",
    "status"}``, where status is negative for a signal.
    """
    first = wire.receive(control)
    assert first is not None
    for name in first["modules"]:
        importlib.import_module(name)
    # Keeps the garbage collector of the workers from touching, and so copying, the pages of what was imported.
    gc.collect()
    gc.freeze()
    awake, asleep = os.pipe()
    os.set_blocking(asleep, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(asleep, warn_on_full_buffer=False)
    wire.send(control, {"is": "warm"})
    while True:
        ready, _, _ = select.select([control.fileno(), awake], [], [])
        if awake in ready:
            os.read(awake, 4096)
        _report_exits(control)
        if control.fileno() in ready:
            request, fds = _request(control)
            if request is None:
                return 0
            _fork(control, request, fds, (awake, asleep))


def _request(control: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """One request; its length and descriptors come with its first bytes."""
    data, fds, _, _ = socket.recv_fds(control, wire.LENGTH.size, 4)
    if not data:
        return None, []
    (size,) = wire.LENGTH.unpack(data)
    return json.loads(wire.receive_bytes(control, size)), fds


def _report_exits(control: socket.socket) -> None:
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if found is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(found.si_pid, signal.SIGKILL)  # what it started ends with it
        _, status = os.waitpid(found.si_pid, 0)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the agent has ended: nobody wants to know
            wire.send(control, {"is": "exited", "pid": found.si_pid, "status": os.waitstatus_to_exitcode(status)})


def _fork(control: socket.socket, request: dict[str, Any], fds: list[int], pipe: tuple[int, int]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    zygote = os.getpid()
    pid = os.fork()
    if pid:
        for fd in fds:
            os.close(fd)
        wire.send(control, {"is": "forked", "worker": request["worker"], "pid": pid})
        return
    status = 1
    try:
        os.setsid()
        die_with_parent(zygote)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        control.close()
        for fd in pipe:
            os.close(fd)
        os.dup2(fds[1], 2)
        os.close(fds[1])
        os.environ.update(request["environment"])
        status = importlib.import_module(request["module"]).worker_main(socket.socket(fileno=fds[0]), os.environ)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # a fork must never return into the zygote's loop
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
    finally:
        os._exit(status)


def main() -> None:
    """``python -m llm_launch.zygote FD``"""
    die_with_parent(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    quiet_libraries()
    raise SystemExit(run_zygote(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    main()
