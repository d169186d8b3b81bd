"""``llm-parallel bench step --processes N``: a whole layout's step, where its time goes, and the gate."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from llm_parallel.bench.layout_step import PARTS, layout_config, typical_split
from llm_parallel.bench.step import Request
from llm_parallel.errors import UserError
from llm_parallel.model.flops import flops_per_token
from tests.benchmarks.test_bench_step import SMALL, config
from tests.integration.commands import assert_refused, llm_parallel

COMMAND = ("bench", "step", "--model", "debug", *SMALL)


@pytest.mark.gloo
@pytest.mark.slow
def test_a_layout(tmp_path: Path) -> None:
    """Two tensor-parallel halves of two stages: parts add up to the step, rates to the work, the trace names calls."""
    layout = ("parallel.tp=2", "parallel.pp=2", "train.micro_batch_size=1")
    out, traces = tmp_path / "step", tmp_path / "traces"
    done = llm_parallel(
        *COMMAND, *layout, "--rounds", "2", "--steps", "3", "--trace", traces, "--out", out
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "measured on 4 processes over gloo" in done.stdout and "share" in done.stdout
    result = json.loads(out.with_suffix(".json").read_text())
    row = result["rows"][0]
    assert row["steps"] == 6 and row["min_ms"] <= row["median_ms"] <= row["max_ms"]
    assert 1e3 * sum(row[f"time_{part}_s"] for part in PARTS) == pytest.approx(row["median_ms"])
    for part in ("tp", "pp", "bubble", "optimizer", "compute"):
        assert 0.0 < row[f"time_{part}_s"] <= row[f"time_{part}_max_s"], part
    assert row["time_cp_s"] == row["time_dp_s"] == 0.0
    tokens_per_s = 4 * 32 / (1e-3 * row["median_ms"])
    assert row["tokens_per_s"] == pytest.approx(tokens_per_s)
    assert row["tflops_per_process"] == pytest.approx(tokens_per_s / 4 * flops_per_token(config().model, 32) / 1e12)
    with out.with_suffix(".csv").open() as handle:
        assert [found["provider"] for found in csv.DictReader(handle)] == ["ours"]
    assert len(list(traces.glob("rank_*.json"))) == 4
    names = {event.get("name") for event in json.loads((traces / "rank_0000.json").read_text())["traceEvents"]}
    assert any(str(name).startswith("tp: ") for name in names) and any(str(name).startswith("pp: ") for name in names)

    result["rows"][0]["median_ms"] /= 100
    fast = tmp_path / "fast.json"
    fast.write_text(json.dumps(result))
    slower = llm_parallel(*COMMAND, *layout, "--rounds", "1", "--baseline", fast)
    assert slower.returncode == 1 and "train_step" in slower.stdout + slower.stderr


def test_typical_split() -> None:
    """Means and largest where all processes' are there, one process's own where they are not; they add up to the
    median step, whatever single steps do."""
    own = {f"time/{part}_s": float(index) for index, part in enumerate(PARTS)} | {"perf/step_time": 36.0}
    several = own | {f"time/{part}_mean_s": 4.0 for part in PARTS} | {f"time/{part}_max_s": 20.0 for part in PARTS}
    late = several | {"time/tp_mean_s": 40.0, "perf/step_time": 72.0}
    assert typical_split([several, late, several])["tp"] == (4.0, 20.0)
    assert typical_split([own, own])["cp"] == (float(PARTS.index("cp")),) * 2
    assert typical_split([{}, own]) == {}
    # Every step waits somewhere else, so that each part's median is small.
    scattered = [several | {f"time/{part}_mean_s": 76.0, "perf/step_time": 108.0} for part in ("tp", "dp", "pp")]
    assert {mean for mean, _ in typical_split(scattered).values()} == {12.0}


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request([*SMALL], model="debug", providers=["transformers"], processes=2), "only ours runs in layouts"),
        (Request([*SMALL, "parallel.tp=2"], model="debug", processes=3), "3"),
        (Request([*SMALL, "train.rampup.start=2"], model="debug", processes=2), "rampup"),
    ],
)
def test_bad_requests(request_: Request, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        layout_config(request_, tmp_path)


def test_bad_input_of_the_command() -> None:
    assert_refused(llm_parallel(*COMMAND, "--processes", "0"), "--processes 0 must be at least 1")
    assert_refused(llm_parallel(*COMMAND, "parallel.tp=2", "--processes", "1"), "parallel describes 2 processes")
