"""The process that forks workers: what they leave behind, a fork that fails, an agent that has gone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llm_launch import wire

pytestmark = pytest.mark.processes
WORKER = """
import os, sys, time, subprocess
def worker_main(control, environment):
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
    control.sendall(str(child.pid).encode().rjust(10))
    control.recv(1)
    return 7
"""


@contextmanager
def zygote(folder: Path, prelude: str = "pass") -> Iterator[tuple[socket.socket, subprocess.Popen[str]]]:
    """One that forks the worker above."""
    (folder / "a_worker.py").write_text(WORKER)
    ours, theirs = socket.socketpair()
    code = f"import sys; sys.argv[1:] = ['{theirs.fileno()}']; from llm_launch import zygote; {prelude}; zygote.main()"
    path = os.pathsep.join([str(folder), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", code], pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    theirs.close()
    ours.settimeout(120)
    try:
        wire.send(ours, {"is": "import", "modules": ["a_worker"]})
        assert wire.receive(ours) == {"is": "warm"}
        yield ours, process
    finally:
        ours.close()
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def fork(agent: socket.socket) -> tuple[socket.socket, dict[str, Any]]:
    """The worker's control socket, and the zygote's answer."""
    ours, theirs = socket.socketpair()
    ours.settimeout(120)
    with Path(os.devnull).open("wb") as log:
        request = wire.encode({"is": "fork", "worker": 1, "module": "a_worker", "environment": {}})
        socket.send_fds(agent, [request], [theirs.fileno(), log.fileno()])
    theirs.close()
    answer = wire.receive(agent)
    assert answer is not None
    return ours, answer


def test_children_in_sessions_of_their_own_end_with_their_worker(tmp_path: Path) -> None:
    with zygote(tmp_path) as (agent, _):
        control, answer = fork(agent)
        assert answer["is"] == "forked"
        child = int(wire.receive_bytes(control, 10))
        control.close()
        assert wire.receive(agent) == {"is": "exited", "pid": answer["pid"], "status": 7}
        while wire.receive(agent) != {"is": "exited", "pid": child, "status": -9}:
            pass
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_fork_that_fails_is_said(tmp_path: Path) -> None:
    """The machine has no process left: the zygote and its other workers live on."""
    refuse = "import os; fork = os.fork; calls = []"
    refuse += "; os.fork = lambda: (_ for _ in ()).throw(BlockingIOError(11, 'no process')) if not calls.append(1) and"
    refuse += " len(calls) == 1 else fork()"
    with zygote(tmp_path, refuse) as (agent, _):
        control, answer = fork(agent)
        assert answer == {"is": "failed", "worker": 1, "why": "no process"}
        assert control.recv(1) == b"", "its end of the worker's connection is closed"
        _, again = fork(agent)
        assert again["is"] == "forked"


def test_an_agent_that_has_gone_leaves_no_traceback(tmp_path: Path) -> None:
    with zygote(tmp_path) as (agent, process):
        control, _ = fork(agent)
        wire.receive_bytes(control, 10)
        agent.close()
        assert process.wait(120) == 0
        assert process.stderr is not None and process.stderr.read() == ""
