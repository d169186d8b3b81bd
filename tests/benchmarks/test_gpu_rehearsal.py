"""Every stage of the GPU suite runs its real code here, on a CPU: tiny shapes, Triton's interpreter, made-up answers
only where a GPU's own tools are asked. One stage is made to fail first, and is then done alone by --resume."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import files
from benchmarks.gpu.operators import ORDER
from benchmarks.gpu.plan import NAMES, ROOT
from benchmarks.gpu.tuning import TABLES

pytest.importorskip("triton")
pytestmark = pytest.mark.slow
BROKEN = "step"


def rehearse(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "--rehearse", "--out", str(folder / "out"), "--work",
        str(folder / "work"), "--budget-s", "900", *arguments,
    ]  # fmt: skip
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """All stages, one of which is made to fail: (folder, suite.json)."""
    folder = tmp_path_factory.mktemp("rehearsal")
    done = rehearse(folder, "--break", BROKEN)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, json.loads((folder / "out" / "suite.json").read_text())


def measured(rows: list[dict[str, Any]], provider: str) -> set[tuple[str, str]]:
    """Pairs (operator, mode) for which a provider has a time."""
    return {(row["operator"], row["mode"]) for row in rows if row["provider"] == provider and row["median_ms"]}


def test_a_failing_stage_leaves_the_others(first: tuple[Path, dict[str, Any]]) -> None:
    _, found = first
    states = {name: record["state"] for name, record in found.items()}
    assert states == {name: "failed" if name == BROKEN else "done" for name in NAMES}
    assert "--break" in found[BROKEN]["problem"]


def test_what_goes_home_keeps_the_limits(first: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = first
    brought = list((folder / "out").rglob("*"))
    assert {path.name for path in brought} == {"summary.md", "suite.json", "details.tar.gz"}
    assert len(brought) <= files.MOST_FILES and all(path.stat().st_size <= files.MOST_BYTES for path in brought)
    text = (folder / "out" / "summary.md").read_text()
    assert all(f"\n## {name}\n" in text for name in NAMES if name != BROKEN)


def test_environment(first: tuple[Path, dict[str, Any]]) -> None:
    result = first[1]["environment"]["result"]
    assert "a rehearsal" in result["chip"] and result["card"]["copy_bytes_per_s"] > 0
    assert result["under_load"]["clocks.sm"] and result["versions"]["torch"]


def test_correctness(first: tuple[Path, dict[str, Any]]) -> None:
    rows = first[1]["correctness"]["result"]["rows"]
    assert [row["operator"] for row in rows] == list(ORDER)
    assert not [row for row in rows if row["problem"]]


def test_operators(first: tuple[Path, dict[str, Any]]) -> None:
    """Ours and torch are timed in every mode; a provider that is not there says so; in-place backward is timed too."""
    rows = first[1]["operators"]["result"]["rows"]
    no_backward = {"adamw", "paged_attention"}
    modes = {(name, mode) for name in ORDER for mode in ("forward", "backward", "both") if name not in no_backward}
    assert measured(rows, "ours") == measured(rows, "torch") == modes | {(name, "forward") for name in no_backward}
    assert ("linear_cross_entropy", "backward") in measured(rows, "ours, unfused in place")
    notes = {row["provider"]: row["note"] for row in rows if row["median_ms"] is None}
    assert notes["flash-attn 3"] == "not installed (flash_attn_interface)"
    assert "failed: RuntimeError" in notes["torch cudnn"]
    assert not {"torch.compile", "ours-gluon"} & {row["provider"] for row in rows}


def test_pretrain(first: tuple[Path, dict[str, Any]]) -> None:
    result = first[1]["pretrain"]["result"]
    assert [row["run"] for row in result["rows"]] == ["cpu fp32", "cpu bf16"]
    for row in result["rows"]:
        assert row["losses"][0] == pytest.approx(math.log(1024), rel=0.02)  # nothing is known at the first step
        assert row["losses"][-1] < row["losses"][0]
    assert 0 < result["worst_difference"] <= result["tolerance"]


def test_generation(first: tuple[Path, dict[str, Any]]) -> None:
    result = first[1]["generation"]["result"]
    assert [row["run"] for row in result["rows"]] == ["fp32, attention triton", "fp32, attention torch"]
    assert result["compared"] == 12 and result["worst_difference"] <= 2e-5


def test_kernel_tests(first: tuple[Path, dict[str, Any]]) -> None:
    result = first[1]["tests"]["result"]
    assert result["exit"] == 0 and result["counts"]["passed"] >= 2 and result["counts"]["not reached"] == 0


def test_counters(first: tuple[Path, dict[str, Any]]) -> None:
    result = first[1]["counters"]["result"]
    assert len(result["kernels"]) == 2 and result["kernels"][0]["memory"] == "1,234.5 unit"


def test_gluon(first: tuple[Path, dict[str, Any]]) -> None:
    """The proof is that of the plain kernel here; the Gluon kernel is refused in its row, ours is timed beside it."""
    result = first[1]["gluon"]["result"]
    assert result["proof"] == "right" and ("attention", "backward") in measured(result["rows"], "ours")
    notes = {row["provider"]: row["note"] for row in result["rows"] if row["median_ms"] is None}
    assert notes["ours-gluon"].startswith("failed: RuntimeError")


def test_compiled(first: tuple[Path, dict[str, Any]]) -> None:
    result = first[1]["compiled"]["result"]
    assert {name for name, _ in measured(result["rows"], "torch.compile")} == {
        "rms_norm", "swiglu", "rope", "cross_entropy"
    }  # fmt: skip
    assert {row["contender"] for row in result["steps"] if row.get("median_ms")} == {
        "transformers.compile", "torch.compile"
    }  # fmt: skip


def test_tuning(first: tuple[Path, dict[str, Any]]) -> None:
    """Every table is still where the stage looks for it, and another choice than its own gives the same numbers."""
    rows = first[1]["tuning"]["result"]["rows"]
    assert not [row for row in rows if row.get("note")]
    assert len(rows) == 2 * len(TABLES) and sum(row["own"] for row in rows) == len(TABLES)


def test_the_broken_stage_is_done_alone_by_resume(first: tuple[Path, dict[str, Any]]) -> None:
    """All contenders train the same model: their losses are those of transformers to bf16's rounding, and fall."""
    folder, before = first
    done = rehearse(folder, "--resume")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"to run: {BROKEN}\n" in done.stdout
    found = json.loads((folder / "out" / "suite.json").read_text())
    assert {name: record for name, record in found.items() if name != BROKEN} == {
        name: record for name, record in before.items() if name != BROKEN
    }
    losses = {row["contender"]: row["first_losses"] for row in found[BROKEN]["result"]["steps"]}
    assert set(losses) == {"ours", "torch", "transformers"}
    for first_loss, second in losses.values():
        assert second < first_loss
    for contender in ("ours", "torch"):
        assert losses[contender] == pytest.approx(losses["transformers"], rel=1e-3)
