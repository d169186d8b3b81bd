"""A pytest plugin: with ``--no-processes``, a test that starts a process fails. `make quick` uses it."""

from __future__ import annotations

import multiprocessing.process
import sys
from collections.abc import Generator
from typing import Any

import pytest

EVENTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}
ADVICE = "this test starts a process: mark it `processes`, so that `make quick` leaves it out"


class NoProcesses:
    """Refuses new processes while a test runs."""

    def __init__(self) -> None:
        self.testing = False
        sys.addaudithook(self._audit)
        start = multiprocessing.process.BaseProcess.start

        def refused(process: Any) -> None:
            """Starts by fork, by fork server and by spawn come through here; the last two raise no audit event."""
            assert not self.testing, ADVICE
            start(process)

        multiprocessing.process.BaseProcess.start = refused  # type: ignore[method-assign]

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.testing and event in EVENTS:
            # Results name the commit that they are of; asking git takes milliseconds.
            assert event == "subprocess.Popen" and arguments[1][0] == "git", ADVICE

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Generator[None, Any, Any]:
        """Between tests pytest and its plugins may do what they like."""
        self.testing = True
        try:
            return (yield)
        finally:
            self.testing = False


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--no-processes``."""
    parser.addoption("--no-processes", action="store_true", help="fail every test that starts a process")


def pytest_configure(config: pytest.Config) -> None:
    """The refusal, when it was asked for."""
    if config.getoption("no_processes"):
        config.pluginmanager.register(NoProcesses(), "no_processes")
