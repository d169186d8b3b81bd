"""``llm-parallel bench step --processes N``: a whole layout's step, where its time goes, and the gate."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from llm_parallel.bench.dp_peers import chosen_in_layout
from llm_parallel.bench.layout_step import PARTS, Job, as_row, layout_config, layout_table, passes, typical_split
from llm_parallel.bench.requests import StepRequest
from llm_parallel.bench.rounds import order_of_turns
from llm_parallel.errors import UserError
from llm_parallel.metrics.peaks import Peak
from llm_parallel.model.flops import flops_per_token
from llm_parallel.parallel.layout import Layout
from tests.benchmarks.test_bench_step import SMALL, config
from tests.support.commands import assert_refused, llm_parallel
from tests.support.in_process import in_process

COMMAND = ("bench", "step", "--model", "debug", *SMALL)


@pytest.mark.gloo
@pytest.mark.slow
def test_a_layout(tmp_path: Path) -> None:
    """TP 2 x PP 2: the parts add up to the step, rates agree with the work, and the trace names calls."""
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


@pytest.mark.gloo
@pytest.mark.parametrize("peers", [("ddp",), pytest.param(("ddp", "fsdp"), marks=pytest.mark.slow)])
def test_peers_of_two_replicas(peers: tuple[str, ...], tmp_path: Path) -> None:
    """Two micro batches each, grouped queries: DDP and FSDP2 start from our weights, read our samples, learn alike."""
    out, traces = tmp_path / "step", tmp_path / "traces"
    done = llm_parallel(
        *COMMAND, "parallel.dp=2", "train.micro_batch_size=1", "--providers", ",".join(("ours", *peers)),
        "--rounds", "1", "--steps", "1", "--trace", traces, "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["provider"]: row for row in json.loads(out.with_suffix(".json").read_text())["rows"]}
    assert list(rows) == ["ours", *peers]
    for row in rows.values():
        assert len(row["first_losses"]) == 3 and row["first_losses"][2] < row["first_losses"][0]
        assert len(row["round_seconds"]) == len(row["round_processor_seconds"]) == row["steps"] == 1
    for name in peers:
        assert rows[name]["loss_difference"] < 2e-6, rows[name]
        ratio = rows[name]["round_seconds"][0] / rows["ours"]["round_seconds"][0]
        assert rows[name]["ours_over_it"] == pytest.approx(ratio)
        assert f"ours / {name}, tokens/s of the same round: median" in done.stdout
    with out.with_suffix(".csv").open() as handle:
        assert [found["provider"] for found in csv.DictReader(handle)] == list(rows)
    assert len(list(traces.iterdir())) == 2 * len(rows)


def test_who_is_measured_and_when() -> None:
    """Ours and DDP by default where the layout is data parallelism alone. On a CPU all live at once, each phase begins
    with another; on a GPU one comes after the other, then in reversed order."""
    replicas, halves = config(), config().model_copy(deep=True)
    halves.parallel.__dict__["tp"] = 2
    assert chosen_in_layout([], replicas) == ["ours", "ddp"] and chosen_in_layout([], halves) == ["ours"]
    assert chosen_in_layout(["fsdp", "ours", "fsdp"], replicas) == ["fsdp", "ours"]
    assert order_of_turns(["a", "b"], 3) == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]
    assert passes(["a", "b"], 5, "cpu") == [(["a", "b"], 5)]
    assert passes(["a", "b"], 5, "cuda") == [(["a"], 3), (["b"], 3), (["b"], 2), (["a"], 2)]
    assert passes(["a", "b"], 1, "cuda") == [(["a"], 1), (["b"], 1)] and passes(["a"], 5, "cuda") == [(["a"], 5)]


def test_rows_of_peers() -> None:
    """Ratios are paired by round; a peer that trains another model gets none."""
    record = {"perf/step_time": 2.0, "memory/allocated_gib": 1.0}
    jobs = {
        "ours": Job([4.0, 3.0], [record] * 3, [1.0, 2.0, 4.0], [1.0] * 3),
        "ddp": Job([4.0, 3.00001], [record] * 3, [2.0, 3.0, 2.0], [1.5] * 3),
        "fsdp": Job([4.0, 3.1], [record] * 3, [2.0, 3.0, 2.0], [1.0] * 3),
    }
    rows = {name: as_row(name, config(), Layout(dp=2), jobs, Peak(2.0, "a test")) for name in jobs}
    assert rows["ddp"]["ours_over_it_by_round"] == [2.0, 1.5, 0.5] and rows["ddp"]["ours_over_it"] == 1.5
    assert rows["ours"]["tokens_per_s"] == 4 * 32 / 2.0 and "ours_over_it" not in rows["ours"]
    assert "ours_over_it" not in rows["fsdp"] and "not compared" in rows["fsdp"]["note"]
    result = {
        "environment": {"chip": "a chip", "date": "2026-01-01", "commit": "abc", "load_average_1_min": 0.1},
        "processes": 2, "backend": "gloo", "order": "in turns", "oversubscribed": None,
        "mfu": {"convention": "c", "peak": "p"}, "rows": list(rows.values()),
    }  # fmt: skip
    text = layout_table(result)
    assert "ours / ddp, tokens/s of the same round: median 1.500 of 3 (0.500 to 2.000); of processor time 1.500" in text
    assert "fsdp: its loss is another" in text and "ours / fsdp" not in text


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
    ("request_", "message"),
    [
        (StepRequest([*SMALL], model="debug", providers=["transformers"], processes=2), "transformers does not run in"),
        (
            StepRequest([*SMALL, "parallel.tp=2"], model="debug", providers=["ddp"]),
            "ddp knows data parallelism alone.*tp 2",
        ),
        (
            StepRequest([*SMALL, "data.packing=isolate"], model="debug", providers=["fsdp"], processes=2),
            "across documents",
        ),
        (StepRequest([*SMALL, "parallel.tp=2"], model="debug", processes=3), "3"),
        (StepRequest([*SMALL, "train.rampup.start=2"], model="debug", processes=2), "rampup"),
    ],
)
def test_bad_requests(request_: StepRequest, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        layout_config(request_, tmp_path)


def test_bad_input_of_the_command() -> None:
    assert_refused(in_process(*COMMAND, "--processes", "0"), "--processes 0 must be at least 1")
    assert_refused(in_process(*COMMAND, "parallel.tp=2", "--processes", "1"), "parallel describes 2 processes")
