"""Starts programs for stages, each in a process group of its own that is ended when its time is over; output is
kept."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """exit: None if the program's time was over; output: both streams."""

    exit: int | None
    output: str

    def tail(self, length: int = 3000) -> str:
        """The last lines of the output."""
        return self.output[-length:]


_RUNNING: set[subprocess.Popen] = set()


def kill_group(process: subprocess.Popen, mercy_s: float = 0.0) -> None:
    """Ends a program and all that it started, and waits for it. mercy_s: how long it may take to end what it started
    in groups of their own, once it is asked to."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if mercy_s and process.poll() is None:
            process.terminate()
            process.wait(timeout=mercy_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _RUNNING.discard(process)


def kill_all() -> None:
    """Ends every program that this process has started and not yet ended."""
    for process in list(_RUNNING):
        kill_group(process)


def start(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen:
    """Starts a program in its own group, both streams into ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as handle:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=handle, stderr=handle, env=env, start_new_session=True
        )
    _RUNNING.add(process)
    return process


def finish(process: subprocess.Popen, log: Path, seconds: float) -> Ended:
    """Waits for a program up to a time limit, then ends it."""
    try:
        status: int | None = process.wait(timeout=max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        status = None
    kill_group(process)  # what it started and left behind, too
    return Ended(status, log.read_text(errors="replace"))


def run(command: Sequence[str], log: Path, seconds: float, env: Mapping[str, str] | None = None) -> Ended:
    """Runs a program until it ends or its time is over."""
    log.unlink(missing_ok=True)
    return finish(start(command, log, env), log, seconds)


def output_of(command: Sequence[str], seconds: float = 20.0) -> str | None:
    """Standard output of a short program; None if it fails or is not installed."""
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL, timeout=seconds).strip()
    except (OSError, subprocess.SubprocessError):
        return None
