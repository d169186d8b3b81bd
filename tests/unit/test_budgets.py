"""Budgets of processor time: what is measured, what is refused, and what one line says at the end."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.budgets import (
    FILE,
    FLOOR_S,
    LIMIT,
    Budgets,
    Part,
    calibrate,
    complaints,
    parse,
    render,
    renewed,
    whole,
)
from tests.support.skips import need, summary

A, A_SLOW, B = Part("tests/a.py"), Part("tests/a.py", True), Part("tests/b.py")


def test_a_file_is_read_as_it_was_written() -> None:
    budgets = Budgets(0.01, {A: 12.5, A_SLOW: 40.0, B: 3.0})
    assert parse(render(budgets)) == budgets
    with pytest.raises(ValueError, match="neither"):
        parse("tests/a.py about 3")


def test_over_the_limit_is_refused_with_one_sentence() -> None:
    budgets = Budgets(0.01, {A: 20.0})
    assert complaints(budgets, {A: LIMIT * 20.0 - 0.1}, 0.01) == []
    (said,) = complaints(budgets, {A: LIMIT * 20.0 + 0.1}, 0.01)
    assert "tests/a.py took 30.1 s" in said and "20.0 s" in said and "\n" not in said
    assert "pytest tests/a.py -m 'not slow' --write-budgets" in said


def test_a_slower_machine_changes_nothing() -> None:
    """Half as fast, every time is twice as long, the calibration's too."""
    budgets = Budgets(0.01, {A: 20.0})
    assert complaints(budgets, {A: 50.0}, 0.02) == []
    assert len(complaints(budgets, {A: 50.0}, 0.01)) == 1
    assert renewed(budgets, {A: 50.0}, 0.02) == Budgets(0.01, {A: 25.0})
    assert renewed(Budgets(None, {}), {A: 50.0}, 0.02) == Budgets(0.02, {A: 50.0})


def test_small_files_and_slow_parts_without_a_budget_are_not_held() -> None:
    assert complaints(Budgets(0.01, {A: 1.0}), {A: FLOOR_S}, 0.01) == []
    assert complaints(Budgets(0.01, {}), {A: FLOOR_S, A_SLOW: 99.0}, 0.01) == []
    (said,) = complaints(Budgets(0.01, {}), {A: FLOOR_S + 1}, 0.01)
    assert "has no budget" in said
    assert len(complaints(Budgets(0.01, {A_SLOW: 30.0}), {A_SLOW: 99.0}, 0.01)) == 1


def test_only_whole_files_are_judged() -> None:
    collected = {A: 5, A_SLOW: 2, B: 3}
    assert whole({A: 5, B: 2}, collected, ["tests"]) == {A}, "of b, one was deselected"
    assert whole({A: 1}, {A: 1}, ["./tests/a.py::test_one"]) == set()
    assert whole({A: 5, A_SLOW: 2}, collected, ["tests/a.py", "tests/b.py::test_one"]) == {A, A_SLOW}


def test_calibration_is_long_enough_to_be_measured() -> None:
    assert min(calibrate() for _ in range(3)) > 1e-3


def test_the_committed_budgets_are_of_files_that_exist() -> None:
    budgets = parse(FILE.read_text(encoding="utf-8"))
    assert budgets.calibration_s is not None
    gone = [str(part) for part in budgets.seconds if not (FILE.parents[1] / part.file).is_file()]
    assert not gone, "remove their lines from tests/budgets.txt"


@pytest.mark.parametrize(
    ("reason", "what"),
    [
        ("slurmctld, slurmd not installed (Debian: slurm-wlm and munge)", "need Slurm"),
        ("no Chromium on PATH (Debian: apt-get install chromium)", "need a browser"),
        ("no CUDA device", "need a GPU"),
        ("something else", "skipped themselves (something else)"),
    ],
)
def test_a_skip_names_its_remedy(reason: str, what: str) -> None:
    assert need(reason).startswith(what)


def test_what_was_not_run_is_one_line() -> None:
    assert summary([], 0) is None
    line: Any = summary(["no CUDA device", "slurmd not installed", "no CUDA device"], 7)
    assert line.startswith("Tests that were not run: 2 need a GPU; 1 need Slurm") and "\n" not in line
    assert "7 slow (make test-all)" in line


PASSES_AND_SPENDS = """
import subprocess, sys, pytest
def test_child():
    subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 1.0: pass"], check=True)
@pytest.mark.slow
def test_slow(): pass
"""


@pytest.mark.processes
def test_time_of_children_counts_and_a_process_in_a_quick_run_fails(
    pytester: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session of its own, with the plugins of the real one."""
    monkeypatch.setenv("PYTHONPATH", str(FILE.parents[1]))
    pytester.makepyfile(test_spends=PASSES_AND_SPENDS)
    pytester.makeini("[pytest]\nmarkers =\n    slow: slow\n")
    plugins = [flag for name in ("costs", "quick", "skips") for flag in ("-p", f"tests.support.{name}")]
    result = pytester.runpytest_subprocess(*plugins, "-m", "not slow")
    assert result.ret == 0
    (line,) = (line for line in result.outlines if line.endswith("test_spends.py"))
    assert float(line.split()[0]) >= 1.0
    result.stdout.fnmatch_lines(["Tests that were not run: 1 slow (make test-all)."])
    assert "mark it `processes`" in pytester.runpytest_subprocess(*plugins, "--no-processes").stdout.str()
