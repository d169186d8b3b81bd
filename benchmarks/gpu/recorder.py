"""A plugin of pytest that writes every outcome to a file at once, so that a run cut at any moment has said all."""

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
    """Whether this process only runs tests for another, which hears of every outcome."""
    return hasattr(config, "workerinput")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what an earlier run has seen pass."""
    ended = set(Path(os.environ[ENDED]).read_text().splitlines())
    items[:] = [item for item in items if item.nodeid not in ended]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Without xdist: how many tests will run."""
    if not _is_worker(session.config) and session.items:
        _append({"selected": len(session.items)})


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: Sequence[str]) -> None:
    """With xdist: the same, from each worker."""
    _append({"selected": len(ids)})


class _Reports:
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            if report.when == "teardown" and report.outcome == "skipped":
                return
            error = str(report.longrepr).strip().splitlines()[-1][:300] if report.outcome == "failed" else ""
            _append({"test": report.nodeid, "outcome": report.outcome, "error": error, "seconds": report.duration})


def pytest_configure(config: pytest.Config) -> None:
    """Only the process that prints writes."""
    if not _is_worker(config):
        config.pluginmanager.register(_Reports(), "suite-reports")
