"""The GPU suite comes back with a summary whatever fails, and goes on where it was cut off."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_suite import BUDGET_S, ROOT, STAGES, outcomes, summary


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=170)


def test_stages_are_done_once(tmp_path: Path) -> None:
    first = run(tmp_path, "--only", "environment", "--budget-s", "540")
    assert first.returncode == 0, first.stdout + first.stderr
    record = json.loads((tmp_path / "environment.json").read_text())
    assert record["state"] == "done" and record["result"]["versions"]["torch"] == torch.__version__
    again = run(tmp_path, "--only", "environment", "--budget-s", "540")
    assert "environment: up to" in first.stdout and "environment: up to" not in again.stdout
    assert json.loads((tmp_path / "environment.json").read_text()) == record


@pytest.mark.skipif(torch.cuda.is_available(), reason="the suite says so only where there is no GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path, "--only", "kernels,step,training,counters")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("needs a GPU") == 4


def test_unknown_stage_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "--only", "kernel")
    assert done.returncode == 2 and "--only kernel is no stage" in done.stderr and "Traceback" not in done.stderr


def test_budget_that_is_no_budget_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "--budget-s", "5")
    assert done.returncode == 2 and "--budget-s 5 is not between" in done.stderr and "Traceback" not in done.stderr


def test_summary_of_partial_results(tmp_path: Path) -> None:
    """A stage that ran out of time, an operator that is wrong, and measurements that were cut off."""
    row = {
        "operator": "rope", "shape": "llama2-7b", "dtype": "bfloat16", "mode": "forward", "provider": "ours",
        "median_ms": 0.1, "p20_ms": 0.09, "p80_ms": 0.11, "gb_per_s": 2500.0, "fraction": 0.9, "peak_mib": 128.0,
    }  # fmt: skip
    card = {"name": "a card", "copy_bytes_per_s": 2.8e12, "matmul_flops_per_s": 7e14}
    files = {
        "environment": {"state": "done", "result": {"chip": "a card", "date": "2026-01-01"}},
        "check": {"state": "done", "result": {"rope": None, "swiglu": "AssertionError: off"}},
        "kernels": {"state": "ran out of time"},
        "kernels.partial": {"card": card, "rows": [row]},
        "training": {"state": "done", "result": {"exit": 0, "table": "| ours | 1,000 |"}},
        "step.partial": [{"model": "1b", "contender": "ours", "note": "no time left"}],
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    text = summary(tmp_path)
    assert "# a card, 2026-01-01" in text
    assert "| kernels | ran out of time |" in text and "| tests | did not run |" in text
    assert "**swiglu is wrong**: AssertionError: off" in text
    assert "| rope | llama2-7b | forward | ours | 0.1000 (0.0900 to 0.1100) | 2500 GB/s | 90% | 128 |" in text
    assert "| 1b | ours |" in text and "no time left" in text
    assert "| ours | 1,000 |" in text
    assert sum(STAGES.values()) < BUDGET_S


def test_tests_that_were_cut_off_are_counted(tmp_path: Path) -> None:
    """A real pytest run, killed in its third of five tests."""
    (tmp_path / "test_them.py").write_text(
        "import time, pytest\n"
        "def test_good(): pass\n"
        "@pytest.mark.parametrize('name', ['two words'])\n"
        "def test_bad(name): assert False\n"
        "def test_long(): time.sleep(60)\n"
        "def test_never(): pass\n"
        "def test_left_out(): pass\n"
    )
    command = [sys.executable, "-u", "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", "not left_out", "."]
    try:
        output = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=20).stdout
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
    found = outcomes(output.decode())
    assert found["counts"] == {"passed": 1, "failed": 1, "error": 0, "skipped": 0, "not reached": 2}
    assert len(found["failures"]) == 1 and "test_bad[two words]" in found["failures"][0]
