"""``llm-parallel bench scaling``: real runs become rows, a second start makes none twice, and the report reads them."""

from __future__ import annotations

import csv
import json
from multiprocessing import Process
from pathlib import Path

import pytest
import yaml

from llm_parallel.bench.layout_step import PARTS
from llm_parallel.bench.scaling import append_csv, read_csv, read_sweep_file
from llm_parallel.errors import UserError
from tests.support.commands import Corpus, assert_refused, llm_parallel, write_run_file
from tests.support.in_process import in_process

SERIES = {
    "weak": [
        {"parallel.dp": 1, "train.global_batch_size": 4},
        {"parallel.dp": 2, "train.global_batch_size": 8},
    ]
}


def write_sweep(corpus: Corpus, folder: Path, **changes: object) -> Path:
    write_run_file(corpus, folder)
    tree = {"base": "run.yaml", "steps": 6, "warmup": 2, "repeats": 1, "series": SERIES, **changes}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.gloo
@pytest.mark.slow
def test_a_sweep(corpus: Corpus, tmp_path: Path) -> None:
    sweep = write_sweep(corpus, tmp_path)
    first = llm_parallel("bench", "scaling", sweep, "--index", "1")
    assert first.returncode == 0, first.stdout + first.stderr
    out = tmp_path / "sweep.csv"
    assert len(read_csv(out)) == 1
    second = in_process("bench", "scaling", sweep, "--cluster", "dgx-a100")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "already in" in second.stdout
    rows = read_csv(out)
    assert [row["world_size"] for row in rows] == ["2", "1"]
    for row in rows:
        low, median, high = (float(row[name]) for name in ("step_time_min_s", "step_time_s", "step_time_max_s"))
        assert 0 < low <= median <= high
        parts = sum(float(row[f"time_{name}_s"]) for name in ("data", "forward_backward", "optimizer", "other"))
        assert parts == pytest.approx(median)
        causes = {name: float(row[f"time/{name}_s"]) for name in PARTS}
        assert sum(causes.values()) == pytest.approx(median) and causes["compute"] > 0.0
        assert (causes["dp"] > 0.0) == (row["dp"] == "2") and causes["tp"] == causes["bubble"] == 0.0
        tokens = int(row["global_batch_size"]) * int(row["seq_length_tokens"]) / int(row["world_size"])
        assert tokens / high <= float(row["tokens_per_s_per_gpu"]) * 1.01 and float(row["loss"]) < 7
        assert json.loads(row["config"])["train"]["global_batch_size"] == int(row["global_batch_size"])
    assert rows[0]["predicted_step_time_s"] == "" and float(rows[1]["predicted_step_time_s"]) > 0
    assert not list(tmp_path.glob(".sweep-*")), "a run's folder was left behind"
    page = in_process("report", "--csv", out, "--out", tmp_path / "report.html")
    assert page.returncode == 0 and "weak scaling from 1 to 2 processes" in page.stdout, page.stderr
    slow = json.loads((tmp_path / "sweep.json").read_text())
    for row in slow["rows"]:
        row["median_ms"] /= 100
    (tmp_path / "fast.json").write_text(json.dumps(slow))
    gated = in_process("bench", "scaling", sweep, "--baseline", tmp_path / "fast.json")
    assert gated.returncode == 1 and "SLOWER: scaling" in gated.stdout, gated.stdout


def test_a_run_that_fails_leaves_no_row(corpus: Corpus, tmp_path: Path) -> None:
    sweep = write_sweep(corpus, tmp_path, series={"bad": [{"train.precision": "bf16", "device": "cuda"}]})
    done = in_process("bench", "scaling", sweep)
    assert done.returncode == 1 and "failed with status 2" in done.stdout, done.stdout
    assert not (tmp_path / "sweep.csv").exists()


def test_rows_of_several_writers_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    row = {"key": "k" * 100, "number": 1, "text": "a,b\n" * 50}
    writers = [Process(target=append_many, args=(path, row)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    with path.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 100 and all(found["text"] == row["text"] for found in rows)


def append_many(path: Path, row: dict[str, object]) -> None:
    for _ in range(25):
        append_csv(path, row)


def test_bad_sweeps(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must have `base`"):
        (tmp_path / "x.yaml").write_text("steps: 3")
        read_sweep_file(str(tmp_path / "x.yaml"))
    with pytest.raises(UserError, match="series weak is empty"):
        read_sweep_file(str(write_sweep(corpus, tmp_path, series={"weak": []})))
    with pytest.raises(UserError, match="warmup 6 must be under steps 6"):
        read_sweep_file(str(write_sweep(corpus, tmp_path, warmup=6)))
    with pytest.raises(UserError, match="reps is unknown"):
        read_sweep_file(str(write_sweep(corpus, tmp_path, reps=6)))
    with pytest.raises(UserError, match=r"parallel\.xp"):
        read_sweep_file(str(write_sweep(corpus, tmp_path, series={"weak": [{"parallel.xp": 1}]})))
    sweep = write_sweep(corpus, tmp_path)
    assert_refused(in_process("bench", "scaling", sweep, "--index", "2"), "--index 2 is not one of the sweep's 2 runs")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert_refused(in_process("bench", "scaling", sweep, "--out", tmp_path / "other.csv"), "is not a sweep's CSV")
