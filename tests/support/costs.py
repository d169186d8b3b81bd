"""A pytest plugin: the processor time of every test file, with the processes that it starts, held to budgets.txt.

Processor time and never wall time, since other programs use the machine too. With pytest-xdist each worker measures its
own tests and the controller adds them up.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Generator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from tests.support import budgets
from tests.support.budgets import Part

NUM_SHOWN = 10
CALIBRATION_INTERVAL_S = 5.0


def fork_server_seconds() -> tuple[float, float]:
    """Processor-seconds of multiprocessing's fork server itself, and of its children that have ended.

    The ranks of ``harness.run_ranks`` are its children, so this process's RUSAGE_CHILDREN does not know of them.
    """
    pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return 0.0, 0.0
    ticks = os.sysconf("SC_CLK_TCK")
    return (int(fields[11]) + int(fields[12])) / ticks, (int(fields[13]) + int(fields[14])) / ticks


def processor_seconds() -> float:
    """Of this process, of its children that have ended, and of the fork server's."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used) + fork_server_seconds()[1]


class Costs:
    """What is measured in this process, and in the workers when this is their controller."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.seconds: Counter[Part] = Counter()
        self.ran: Counter[Part] = Counter()
        self.collected: Counter[Part] = Counter()
        self.calibrations: list[float] = []
        self.start_s = 0.0
        """Everything outside of tests: imports, collection, the fork server."""
        self.last_calibration = -CALIBRATION_INTERVAL_S
        self.complaints: list[str] = []
        self.written: set[Part] = set()

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Before anything is deselected."""
        self.collected = Counter(part_of(item) for item in items)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Measures a test with its fixtures."""
        if time.monotonic() - self.last_calibration >= CALIBRATION_INTERVAL_S:
            self.calibrations.append(budgets.calibrate())
            self.last_calibration = time.monotonic()
        before = processor_seconds()
        try:
            return (yield)
        finally:
            part = part_of(item)
            self.seconds[part] += max(0.0, processor_seconds() - before)
            self.ran[part] += 1

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Adds what a worker of pytest-xdist measured."""
        found = getattr(node, "workeroutput", {}).get("costs")
        if found is None:  # it crashed
            return
        for file, slow, seconds, ran, collected in found["parts"]:
            part = Part(file, slow)
            self.seconds[part] += seconds
            self.ran[part] += ran
            self.collected[part] = collected
        self.calibrations += found["calibrations"]
        self.start_s += found["start_s"]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """In a worker: hands over. Else: fails a run with a file over its budget, or renews budgets."""
        if self.config.pluginmanager.hasplugin("dsession"):  # its children are the workers, who tell theirs themselves
            used = resource.getrusage(resource.RUSAGE_SELF)
            self.start_s += used.ru_utime + used.ru_stime
        else:
            self.start_s += processor_seconds() + fork_server_seconds()[0] - sum(self.seconds.values())
        output = getattr(self.config, "workeroutput", None)
        if output is not None:
            output["costs"] = {
                "parts": [
                    (part.file, part.slow, self.seconds[part], self.ran[part], count)
                    for part, count in self.collected.items()
                ],
                "calibrations": self.calibrations,
                "start_s": self.start_s,
            }
            return
        if self.calibrations:
            self._judge(session)

    def _judge(self, session: pytest.Session) -> None:
        known = budgets.parse(budgets.FILE.read_text()) if budgets.FILE.exists() else budgets.Budgets(None, {})
        whole = budgets.whole(self.ran, self.collected, self.config.args)
        measured, speed = {part: self.seconds[part] for part in whole}, statistics.median(self.calibrations)
        if self.config.getoption("write_budgets"):
            if session.exitstatus != pytest.ExitCode.OK:
                return  # what failed took more or less time than it should
            budgets.FILE.write_text(budgets.render(budgets.renewed(known, measured, speed)))
            self.written = whole
        elif self.why_not_held() is None:
            self.complaints = budgets.complaints(known, measured, speed)
            held = self.config.getoption("hold_budgets")
            if held and self.complaints and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def why_not_held(self) -> str | None:
        """Why times measured in this session say nothing about budgets."""
        if "coverage" in sys.modules and (sys.gettrace() or "COVERAGE_PROCESS_CONFIG" in os.environ):
            return "coverage is measured at the same time"
        import torch

        return "kernels run on a GPU here" if torch.cuda.is_available() else None

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """The slowest files, the total, and what is over its budget."""
        if not self.calibrations:
            return
        write = terminalreporter.write_line
        terminalreporter.section("processor time")
        for part, seconds in Counter({p: s for p, s in self.seconds.items() if self.ran[p]}).most_common(NUM_SHOWN):
            write(f"{seconds:8.1f} s  {part}")
        total = sum(self.seconds.values())
        write(
            f"{total + self.start_s:8.1f} s  in all: {total:.1f} s in tests, {self.start_s:.1f} s for imports and"
            f" collection; calibration {statistics.median(self.calibrations):.5f} s"
        )
        if (reason := self.why_not_held()) is not None:
            write(f"Budgets are not held: {reason}.")
        for part in sorted(self.written):
            write(f"The budget of {part} was renewed in {budgets.FILE.name}.")
        for complaint in self.complaints:
            write(complaint, red=True)


def part_of(item: pytest.Item) -> Part:
    """Where a test's time is booked."""
    return Part(item.nodeid.split("::")[0], item.get_closest_marker("slow") is not None)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--write-budgets`` and ``--hold-budgets``."""
    parser.addoption(
        "--hold-budgets",
        action="store_true",
        help="fail if a file of tests takes more than its budget, as `make test` does; else it is only said",
    )
    parser.addoption(
        "--write-budgets",
        action="store_true",
        help="write the processor time of each file that was run whole into tests/budgets.txt",
    )


def pytest_configure(config: pytest.Config) -> None:
    """One ``Costs`` for each session."""
    config.pluginmanager.register(Costs(config), "costs")
