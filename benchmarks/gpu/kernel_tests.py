"""Runs the kernels' own tests in many processes, small operators first; outcomes up to a cut are kept."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import machine
from benchmarks.gpu.packages import is_installed
from benchmarks.gpu.plan import ROOT, Job
from benchmarks.gpu.processes import run

WORKERS = 12
# The rest comes after, by name.
FIRST = ("rms_norm", "swiglu", "rope", "cross_entropy", "adamw", "paged_attention", "linear_cross_entropy",
         "attention")  # fmt: skip
LEFT_OUT = "not every_configuration"
REHEARSED = ("kernels/llm_kernels/swiglu/test_swiglu.py", "kernels/llm_kernels/rope/test_rope.py", "-k", "bad_input")
REPORT = "SUITE_TEST_REPORT"
"""Environment variable that names the file to which recorder.py, a plugin of pytest, writes a line for every test."""
ENDED = "SUITE_TESTS_ENDED"
"""Environment variable that names a file of tests that passed in an earlier run, which are left out."""


def test_files() -> list[str]:
    """Test files of the kernels, small operators first."""
    folder = ROOT / "kernels" / "llm_kernels"
    found = sorted(folder.rglob("test_*.py"))
    of_operator = [path for name in FIRST for path in found if path.parent.name == name]
    return [str(path) for path in [*of_operator, *(path for path in found if path not in of_operator)]]


def kernel_tests(job: Job) -> dict[str, Any]:
    """Runs the tests until the time is over; counts those that were not reached."""
    machine.device(job.rehearse)
    report = job.work / "details" / "tests.jsonl"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    rehearsed = [str(ROOT / part) if part.startswith("kernels/") else part for part in REHEARSED]
    chosen = rehearsed if job.rehearse else [*test_files(), "-k", LEFT_OUT]
    many = is_installed("pytest-xdist")
    workers = ["-n", str(1 if job.rehearse else WORKERS), "--maxschedchunk", "4"] if many else []
    command = [
        sys.executable, "-m", "pytest", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-q", "--tb=short",
        "-p", "no:cacheprovider", "-p", "benchmarks.gpu.recorder", *workers, *chosen,
    ]  # fmt: skip
    passed = list(job.previous.get("passed", []))
    ended_file = job.work / "tests_ended.txt"
    ended_file.write_text("\n".join(passed))
    env = {**os.environ, REPORT: str(report), ENDED: str(ended_file), "OMP_NUM_THREADS": "1"}
    ended = run(command, job.work / "details" / "tests.log", job.left() - 3, env)
    if ended.exit not in (None, 0, 1):  # none selected, a wrong option, an error of pytest's own
        raise RuntimeError(f"pytest ended with {ended.exit}: {' '.join(ended.tail(600).split())}")
    left_out = [] if ended.exit is not None else ["the rest"]
    return {"exit": ended.exit, **outcomes(_lines(report), passed), "left_out": left_out}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a file that may have been cut."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def outcomes(lines: Iterable[Mapping[str, Any]], before: Sequence[str] = ()) -> dict[str, Any]:
    """Counts of outcomes, tests not reached, the failures with their last lines, and the names of those that passed.
    before: those that passed in an earlier run and were not selected again."""
    counts = dict.fromkeys(("passed", "failed", "skipped", "not reached"), 0)
    selected, failures = 0, []
    passed = list(before)
    for line in lines:
        if "selected" in line:
            selected = max(selected, line["selected"])
            continue
        counts[line["outcome"]] += 1
        if line["outcome"] == "passed":
            passed.append(line["test"])
        if line["outcome"] == "failed":
            failures.append({"test": line["test"], "error": line["error"]})
    counts["not reached"] = max(0, selected - sum(counts.values()))
    counts["passed"] += len(before)
    return {"counts": counts, "failures": failures[:60], "passed": passed}
