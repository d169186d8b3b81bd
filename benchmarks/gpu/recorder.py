"""A plugin of pytest that writes every outcome to a file immediately, so that a run that is cut short loses none."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.kernel_tests import ENDED, REPORT


def _append(line: dict[str, Any]) -> None:
    with Path(os.environ[REPORT]).open("a") as handle:
        handle.write(json.dumps(line) + "\n")


def _is_worker(config: pytest.Config) -> bool:
    """Whether this process is a worker of xdist, whose outcomes another process receives."""
    return hasattr(config, "workerinput")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests that passed in an earlier run."""
    ended = set(Path(os.environ[ENDED]).read_text().splitlines())
    items[:] = [item for item in items if item.nodeid not in ended]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Records how many tests will run, without xdist."""
    if not _is_worker(session.config) and session.items:
        _append({"selected": len(session.items)})


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: Sequence[str]) -> None:
    """Records how many tests will run, with xdist from each worker."""
    _append({"selected": len(ids)})


class _Reports:
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            if report.when == "teardown" and report.outcome == "skipped":
                return
            error = str(report.longrepr).strip().splitlines()[-1][:300] if report.outcome == "failed" else ""
            _append({"test": report.nodeid, "outcome": report.outcome, "error": error, "seconds": report.duration})


def pytest_configure(config: pytest.Config) -> None:
    """Writes the outcome; workers of xdist do not."""
    if not _is_worker(config):
        config.pluginmanager.register(_Reports(), "suite-reports")
