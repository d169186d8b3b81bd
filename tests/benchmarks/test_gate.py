"""Comparing a result with an earlier one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_parallel.bench.gate import slower_than
from llm_parallel.bench.kernels import write_result
from llm_parallel.errors import UserError


def row(ms: float | None, provider: str = "ours", mode: str = "forward", operator: str = "rope") -> dict[str, Any]:
    return {
        "operator": operator, "shape": "llama2-7b", "dtype": "bfloat16", "mode": mode, "provider": provider,
        "median_ms": ms, "p20_ms": ms, "p80_ms": ms, "gb_per_s": 2500.0, "tflop_per_s": None, "fraction": 0.8,
        "bound": "memory", "peak_mib": 1.0, "note": "",
    }  # fmt: skip


def here(rows: list[dict[str, Any]], chip: str = "a card") -> dict[str, Any]:
    return {"environment": {"chip": chip}, "rows": rows}


@pytest.fixture
def baseline(tmp_path: Path) -> str:
    path = tmp_path / "before.json"
    path.write_text(json.dumps(here([row(1.0), row(2.0, mode="backward"), row(0.1, provider="liger")])))
    return str(path)


def test_as_fast_passes(baseline: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert slower_than(baseline, here([row(1.04), row(1.5, mode="backward")]), 0.95) == 0
    assert "2 rows held against" in capsys.readouterr().out


def test_slower_is_named(baseline: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert slower_than(baseline, here([row(1.06), row(2.0, mode="backward")]), 0.95) == 1
    said = capsys.readouterr().out
    assert "SLOWER: rope llama2-7b bfloat16 forward ours: 0.943" in said and "backward ours:" not in said


def test_a_row_that_is_gone_fails(baseline: str) -> None:
    assert slower_than(baseline, here([row(1.0)]), 0.95) == 1
    assert slower_than(baseline, here([row(1.0), row(None, mode="backward")]), 0.95) == 1


def test_nothing_to_compare_is_refused(baseline: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no row of ours"):
        slower_than(baseline, here([row(1.0, operator="swiglu")]), 0.95)
    with pytest.raises(UserError, match="--min-ratio"):
        slower_than(baseline, here([row(1.0)]), 0.0)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="is not a result of bench"):
        slower_than(str(tmp_path / "x.json"), here([row(1.0)]), 0.95)


def test_another_chip_is_refused(baseline: str) -> None:
    with pytest.raises(UserError, match="measured on a card, this run on another"):
        slower_than(baseline, here([row(1.0)], "another card"), 0.95)


def test_result_files(tmp_path: Path) -> None:
    """Synthetic rows: JSON, CSV and both pictures are written and are pictures."""
    rows = [
        row(0.1 * (i + 1), provider, mode, operator)
        for i, provider in enumerate(("ours", "torch", "liger"))
        for mode in ("forward", "backward", "both")
        for operator in ("rope", "swiglu")
    ]
    rows.append(row(0.5, operator="attention") | {"bound": "compute", "gb_per_s": None, "tflop_per_s": 500.0})
    rows.append(row(None, provider="apex"))
    env = {"chip": "a card", "versions": {"torch": "2", "triton": "3"}, "date": "2026-01-01"}
    card = {"name": "a card", "copy_bytes_per_s": 2.8e12, "matmul_flops_per_s": 7e14}
    write_result(tmp_path / "kernels", {"environment": env, "card": card, "rows": rows})
    assert json.loads((tmp_path / "kernels.json").read_text())["rows"] == rows
    assert len((tmp_path / "kernels.csv").read_text().splitlines()) == len(rows) + 1
    for picture in ("kernels_bars.png", "kernels_roofline.png"):
        data = (tmp_path / picture).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 20_000
