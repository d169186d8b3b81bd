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
from pathlib import Path
from typing import Any

from llm_launch import wire
from llm_parallel.quiet import quiet_libraries

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def die_with_parent(parent: int) -> None:
    """Has the kernel send SIGKILL to this process when its parent dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def adopt_orphans() -> None:
    """Has the kernel make this process the parent of whatever its workers start and leave behind (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1)


def run_zygote(control: socket.socket) -> int:
    """Imports the modules of the first message, then serves ``fork`` until the agent closes the connection.

    fork: ``{"is": "fork", "worker": id, "module": name, "environment": {...}}`` with two descriptors (the worker's
    control socket and its log); answers ``{"is": "forked", "worker", "pid"}`` and, later, ``{"is": "exited", "pid",
    "status"}``, where status is negative for a signal.
    """
    first = wire.receive(control)
    if first is None:
        return 0  # the agent ended at once
    for name in first["modules"]:
        importlib.import_module(name)
    # Keeps the garbage collector of the workers from touching, and so copying, the pages of what was imported.
    gc.collect()
    gc.freeze()
    awake, asleep = os.pipe()
    os.set_blocking(asleep, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(asleep, warn_on_full_buffer=False)
    adopt_orphans()
    workers: set[int] = set()
    wire.send(control, {"is": "warm"})
    while True:
        ready, _, _ = select.select([control.fileno(), awake], [], [])
        if awake in ready:
            os.read(awake, 4096)
        _report_exits(control, workers)
        if control.fileno() in ready:
            request, fds = _request(control)
            if request is None:
                return 0
            _fork(control, request, fds, (awake, asleep), workers)


def _request(control: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """One request; its length and descriptors come with its first bytes."""
    data, fds, _, _ = socket.recv_fds(control, wire.LENGTH.size, 4)
    if not data:
        return None, []
    (size,) = wire.LENGTH.unpack(data)
    return json.loads(wire.receive_bytes(control, size)), fds


def _report_exits(control: socket.socket, workers: set[int]) -> None:
    """Reports workers that have ended, and ends what they leave behind: their process groups, and children that have a
    session of their own, which have become ours."""
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
        workers.discard(found.si_pid)
        for orphan in _children() - workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(orphan, signal.SIGKILL)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the agent has ended: nobody wants to know
            wire.send(control, {"is": "exited", "pid": found.si_pid, "status": os.waitstatus_to_exitcode(status)})


def _children() -> set[int]:
    """Processes whose parent this one is."""
    with contextlib.suppress(OSError):
        return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))
    return set()


def _fork(
    control: socket.socket, request: dict[str, Any], fds: list[int], pipe: tuple[int, int], workers: set[int]
) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    zygote = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        for fd in fds:
            os.close(fd)
        wire.send(control, {"is": "failed", "worker": request["worker"], "why": error.strerror or str(error)})
        return
    if pid:
        for fd in fds:
            os.close(fd)
        workers.add(pid)
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
        with contextlib.suppress(OSError):  # nobody may read the output any more
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
    try:
        raise SystemExit(run_zygote(socket.socket(fileno=int(sys.argv[1]))))
    except ConnectionError:  # the agent has ended, and the workers have with this process
        raise SystemExit(0) from None


if __name__ == "__main__":
    main()
