"""Without a GPU the kernel tests run in Triton's interpreter under the memory checker; on a GPU they run compiled."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from unittest.mock import MagicMock

import pytest
import torch

if importlib.util.find_spec("hypothesis") is None:  # a lent GPU machine may have pytest and no more
    absent = types.ModuleType("hypothesis")
    absent.__spec__ = importlib.machinery.ModuleSpec("hypothesis", None)  # torch looks for it when it is imported
    absent.given = lambda *_, **__: pytest.mark.skip(reason="hypothesis is not installed")  # type: ignore[attr-defined]
    absent.settings = lambda *_, **__: lambda test: test  # type: ignore[attr-defined]
    absent.strategies = absent.HealthCheck = MagicMock()  # type: ignore[attr-defined]
    sys.modules["hypothesis"] = absent
    sys.modules["hypothesis.strategies"] = absent.strategies

from llm_kernels import dispatch
from llm_kernels.memory_checker import Traffic, check_memory_accesses
from llm_kernels.testing import SUMMARY


@pytest.fixture(autouse=True)
def checked() -> Iterator[Traffic | None]:
    """Fills torch.empty with NaN and, under the interpreter, checks bounds, races and program order of every launch."""
    modes = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # torch poisons fresh memory in this mode (torch.utils.deterministic.fill_uninitialized_memory).
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        if torch.cuda.is_available() or not dispatch.triton_installed():
            yield None
        else:
            dispatch.backend_for(torch.empty(0), "triton")
            with check_memory_accesses() as traffic:
                yield traffic
    finally:
        torch.use_deterministic_algorithms(modes[0], warn_only=modes[1])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Under xdist, sends the errors that this worker measured to the main process, which prints the table."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["kernel_errors"] = [(*key, value) for key, value in SUMMARY.rows.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Adds the errors that an xdist worker measured to the main process's table."""
    for name, dtype, errors in getattr(node, "workeroutput", {}).get("kernel_errors", []):
        SUMMARY.rows.setdefault((name, dtype), []).extend(tuple(pair) for pair in errors)


def pytest_terminal_summary(terminalreporter) -> None:
    """Prints the number of cases and the worst errors of every operator and dtype."""
    if SUMMARY.rows:
        terminalreporter.section("kernel errors against fp64, relative to the largest value")
        for line in SUMMARY.lines():
            terminalreporter.write_line(line)


@pytest.fixture
def traffic(checked: Traffic | None) -> Traffic:
    """Counts the bytes that a test's launches move. Skips on a GPU, where accesses cannot be seen; the interpreter runs
    the same kernels."""
    if checked is None:
        pytest.skip("bytes are counted where Triton's interpreter runs the kernels, not on a GPU or without Triton")
    return checked
