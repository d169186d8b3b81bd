"""Processes that the system cannot end: held in a frozen control group, as a hung device or file system holds them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

LIMIT_S = 60.0


class Freezer:
    """A control group of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def freeze(self, pid: int) -> None:
        """Returns when the process is frozen: SIGKILL takes effect when it thaws."""
        (self._folder / "cgroup.procs").write_text(str(pid))
        self._write("FROZEN")

    def thaw(self) -> None:
        """Lets everything in it run on, or end."""
        self._write("THAWED")

    def _write(self, state: str) -> None:
        (self._folder / "freezer.state").write_text(state)
        deadline = time.monotonic() + LIMIT_S
        while (self._folder / "freezer.state").read_text().strip() != state:
            assert time.monotonic() < deadline, f"the control group does not become {state}"
            time.sleep(0.01)

    def close(self) -> None:
        """Thaws and removes it, as soon as nothing is in it any more."""
        self.thaw()
        deadline = time.monotonic() + LIMIT_S
        while self._folder.exists() and time.monotonic() < deadline:
            with suppress(OSError):
                self._folder.rmdir()
            time.sleep(0.01)


@contextmanager
def freezer() -> Iterator[Freezer]:
    """A freezer; skips the test where none can be made. In version 2 of control groups a frozen process can be killed,
    so only version 1 makes processes as a hung driver does."""
    root = Path("/sys/fs/cgroup/freezer")
    folder = root / f"llm-parallel-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "freezer.state").write_text("THAWED")
    except OSError as error:
        pytest.skip(f"no control group can be frozen here (version 1, {root}): {error.strerror}")
    found = Freezer(folder)
    try:
        yield found
    finally:
        found.close()
