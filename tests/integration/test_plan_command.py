"""``llm-parallel plan`` as its users call it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from llm_parallel.errors import UserError
from llm_parallel.planner.command import plan_command
from llm_parallel.planner.hardware import DATA
from llm_parallel.planner.request import PlanRequest
from tests.support.commands import Corpus, assert_refused, llm_parallel
from tests.support.in_process import in_process

CLUSTER = ("--model", "llama2-70b", "--cluster", "dgx-h100", "--gpus", "256", "--global-batch", "1024", "--seq", "4096")
A100 = tuple(word.replace("h100", "a100") for word in CLUSTER)


def test_the_best_layouts(tmp_path: Path) -> None:
    """Both conventions of MFU, cost by hand, and a run file that the trainer takes as it is. As a real process."""
    done = llm_parallel(
        "plan", *CLUSTER, "--tokens", "2e12", "--price-per-gpu-hour", "2", "--top", "4",
        "--json", tmp_path / "plan.json", "--write", tmp_path / "run.yaml",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    assert len(found) == 4 and [item["step_s"] for item in found] == sorted(item["step_s"] for item in found)
    best = found[0]
    rate = best["tokens_per_s_per_gpu"]
    assert rate == pytest.approx(1024 * 4096 / best["step_s"] / 256)
    # 6 x the matrices' weights, and 12 x sequence x layers x width of square attention, by hand.
    matrices = 80 * (8192 * 128 * (2 * 64 + 2 * 8) + 3 * 8192 * 28672) + 32000 * 8192
    square = 12 * 4096 * 80 * 8192
    assert best["mfu_full"] == pytest.approx(rate * (6 * matrices + square) / 989.4e12)
    assert best["mfu_causal"] == pytest.approx(rate * (6 * matrices + square / 2) / 989.4e12)
    hours = 2e12 / rate / 3600
    assert f"{hours:,.0f} GPU-hours, {2 * hours:,.0f} at 2 per GPU-hour" in done.stdout
    share = float(done.stdout.split("goodput is ")[1].split("%")[0]) / 100
    days = float(done.stdout.split("goodput is ")[1].split(": ")[1].split(" days")[0])
    assert 0.9 < share < 1 and days == pytest.approx(hours / 256 / 24 / share, rel=2e-3)
    assert "Predicted for our trainer, not measured. Expected error of the step time:" in done.stdout
    assert "published rows like this from" in done.stdout
    written = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert written["parallel"]["tp"] == best["layout"]["tp"] and written["train"]["global_batch_size"] == 1024
    assert written["train"]["steps"] == round(2e12 / (1024 * 4096))


def test_the_written_run_file_passes_the_dry_run(tmp_path: Path, corpus: Corpus) -> None:
    done = in_process("plan", "--model", "llama3-405b", "--gpus", "1024", "--global-batch", "512", "--seq", "8192",
                        "--tokens", "1e10", "--write", tmp_path / "run.yaml")  # fmt: skip
    assert done.returncode == 0, done.stderr
    dry = in_process(
        "pretrain", tmp_path / "run.yaml", f"data.train=[{corpus.prefix}]", "data.eval_fraction=0", "--dry-run", "--all"
    )
    assert dry.returncode == 0, dry.stderr
    assert "predicted memory of the fullest process" in dry.stdout and "rank  63:" in dry.stdout


def test_one_layout_in_detail() -> None:
    """The parts of the step time add up to the printed total."""
    done = in_process("plan", *CLUSTER, "--explain", "tp=4,pp=4,vpp=5,mbs=1")
    assert done.returncode == 0, done.stderr
    assert "simulated event by event" in done.stdout and "it fits into 79.1 GiB" in done.stdout
    assert "| recompute | 0.0000 | 0.0% |" in done.stdout
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| ")]
    seconds = [float(row[2]) for row in rows if len(row) == 5 and row[3].strip().endswith("%")]
    total = float(done.stdout.split("step ")[1].split(" s")[0])
    assert sum(seconds) == pytest.approx(total, abs=2e-3)


def test_the_users_cluster(tmp_path: Path) -> None:
    """A user's cluster file with a measured constant: twice the rate of matrix products takes less time."""
    text = (DATA / "template.yaml").read_text()
    steps = []
    for gemm in (0.35, 0.7):
        path = tmp_path / f"{gemm}.yaml"
        path.write_text(text + f"measured: {{gemm: {gemm}}}\n")
        done = in_process("plan", "--model", "llama3-8b", "--cluster", path, "--gpus", "8", "--global-batch", "64",
                            "--json", tmp_path / "out.json")  # fmt: skip
        assert done.returncode == 0, done.stderr
        steps.append(json.loads((tmp_path / "out.json").read_text())[0]["step_s"])
    assert steps[1] < steps[0] < 2 * steps[1]


def test_validation_of_the_users_rows(tmp_path: Path) -> None:
    """A CSV with blanks: rows that can be predicted are scored, the others are named with the reason."""
    from llm_parallel.planner.published.rows import COLUMNS

    known = {
        "source": "our cluster", "model": "Llama 3 8B", "layers": "32", "hidden": "4096", "heads": "32",
        "kv_heads": "8", "ffn": "14336", "vocab": "128256", "seq": "8192", "gpus": "8", "chip": "H100", "tp": "1",
        "pp": "1", "precision": "bf16", "micro_batch": "1", "global_batch": "128", "tokens_per_s_per_gpu": "9000",
    }  # fmt: skip
    lines = [",".join(COLUMNS)]
    for changes in ({}, {"tp": ""}, {"tokens_per_s_per_gpu": ""}):
        lines.append(",".join({**known, **changes}.get(name, "") for name in COLUMNS))
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(lines))
    done = in_process("plan", "--validate", "--rows", path)
    assert done.returncode == 0, done.stderr
    assert "| our cluster | H100 | 1 | 0 |" in done.stdout
    assert "tp is not stated (rows 3)" in done.stdout and "no figure of throughput (rows 4)" in done.stdout


def test_bad_input(tmp_path: Path) -> None:
    assert_refused(llm_parallel("plan"), "plan needs --model")  # as a real process
    assert_refused(in_process("plan", "--model", "llama5"), "--model llama5 is unknown")
    assert_refused(in_process("plan", "--model", "llama3-8b", "--cluster", "dgx-x"), "--cluster dgx-x is unknown")
    assert_refused(in_process("plan", "--model", "llama3-8b", "--gpus", "12"), "no whole number of nodes of 8")
    assert_refused(in_process("plan", *CLUSTER, "--software", "deepspeed"), "--software deepspeed is not one of ours")
    assert_refused(in_process("plan", *CLUSTER, "--explain", "tp=3"), "is 3, which does not divide --gpus 256")
    assert_refused(in_process("plan", *CLUSTER, "--explain", "dq=3"), "'dq=3' is not one of tp, pp")
    assert_refused(in_process("plan", *A100, "--precision", "fp8"), "has no 8-bit products")
    with pytest.raises(UserError, match="--tokens nan must be over 0"):
        plan_command(PlanRequest("llama2-7b", "dgx-h100", 8, 64, 4096, tokens=float("nan")))
    with pytest.raises(UserError, match="--price-per-gpu-hour -3 must be over 0"):
        plan_command(PlanRequest("llama2-7b", "dgx-h100", 8, 64, 4096, price_per_gpu_hour=-3.0))
    unknown = tmp_path / "cluster.yaml"
    unknown.write_text((DATA / "dgx-h100.yaml").read_text().replace("constants: H100", "constants: B300"))
    with pytest.raises(UserError, match=r"chip\.constants 'B300' is none of A100, H100"):
        plan_command(PlanRequest("llama2-7b", str(unknown), 8, 64, 4096))
    assert plan_command(PlanRequest("llama2-7b", "dgx-h100", 8, 64, 4097)) == 1  # no half of it for a ring
    path = tmp_path / "rows.csv"
    path.write_text("source,model\nx,y\n")
    assert_refused(in_process("plan", "--validate", "--rows", path), "has no column layers")
    path.write_text("")
    assert_refused(in_process("plan", "--validate", "--rows", path), "is empty")
    assert_refused(in_process("plan", "--validate", "--rows", tmp_path / "none.csv"), "cannot be read")


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("tp=3,pp=7,cp=5", "tp=3 x pp=7 x cp=5 is 105, which does not divide --gpus 256"),
        ("tp=4,pp=4,dp=3", "tp=4 x pp=4 x cp=1 x dp=3 is 48, not --gpus 256; use dp=16"),
        ("tp=128", "parallel.tp = 128 does not divide model.num_attention_heads = 64; use tp=64"),
        ("pp=128,vpp=7", "model.num_layers = 80 is less than parallel.pp = 128 times parallel.vpp = 7 model chunks"),
        ("vpp=4", "parallel.vpp = 4 interleaves the chunks of a pipeline, and parallel.pp = 1; use vpp=1"),
        ("tp=128,vpp=2", "use tp=64; 1 more of its sizes do not fit"),
        ("tp=8,mbs=3", "does not divide into micro batches of 3 on 32 replicas"),
        ("tp=8,tp=4", "tp is given twice"),
        ("tp=0", "tp=0 must be a whole number of at least 1"),
        ("recompute=some", "recompute is none, selective or full, not some"),
        ("tp=1e9", "must be a whole number"),
    ],
)
def test_an_impossible_layout_is_one_sentence(layout: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also if it breaks several rules."""
    asked = PlanRequest("llama2-70b", "dgx-h100x256", None, 1024, 4096, explain=layout)
    with pytest.raises(UserError) as caught:
        plan_command(asked)
    text = str(caught.value)
    assert said in text and text.startswith(f"--explain {layout}: ") and "\n" not in text
    assert capsys.readouterr().out == ""


def test_gpus_in_the_clusters_name() -> None:
    whole = in_process("plan", "--model", "llama2-7b", "--cluster", "dgx-h100x16")
    assert whole.returncode == 0 and "on 16 GPUs of dgx-h100:" in whole.stdout, whole.stderr
    assert_refused(in_process("plan", "--model", "llama2-7b", "--cluster", "dgx-h100x16", "--gpus", "32"),
                   "--cluster dgx-h100x16 has 16 GPUs and --gpus says 32")  # fmt: skip


def test_what_if(tmp_path: Path) -> None:
    """Each case is what planning it by itself finds, and the cases stand in one table."""
    cases = ("gpus=512", "cluster=dgx-a100", "seq=131072,global-batch=32")
    done = in_process(
        "plan", *CLUSTER, *(part for case in cases for part in ("--what-if", case)), "--tokens", "2e12",
        "--json", tmp_path / "cases.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "cases.json").read_text())
    assert [case["case"] for case in found] == ["as asked", *cases]
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 6 and all(case in row for case, row in zip(("as asked", *cases), rows[2:]))
    said = "Predicted for our trainer, not measured. "
    for case, trust in zip(("as asked", *cases), (*["Expected error"] * 3, "No published row is like this (256 GPUs)")):
        assert re.search(f"{re.escape(case)}[^:]*: {re.escape(said + trust)}", done.stdout), (case, trust)
    alone = in_process("plan", *CLUSTER, "--gpus", "512", "--top", "1", "--json", tmp_path / "alone.json")
    assert alone.returncode == 0, alone.stderr
    assert found[1]["best"] == json.loads((tmp_path / "alone.json").read_text())[0]
    steps = [case["best"]["step_s"] for case in found]
    assert steps[1] < steps[0] < steps[2]
    assert found[3]["best"]["mfu_full"] > found[3]["best"]["mfu_causal"]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("nodes=4", "'nodes=4' is not one of cluster, network, gpus"),
        ("gpus=many", "gpus=many must be a whole number"),
        ("gpus=100", "is no whole number of nodes"),
        ("cluster=dgx-x", "--cluster dgx-x is unknown"),
    ],
)
def test_a_wrong_case(case: str, said: str) -> None:
    assert_refused(in_process("plan", *CLUSTER, "--what-if", case), said)


def test_calibrate(tmp_path: Path) -> None:
    """A measured card makes a description that plan takes; a file that is none is refused."""
    card = {"name": "NVIDIA H100 80GB HBM3", "copy_bytes_per_s": 3.0e12, "matmul_flops_per_s": 7.0e14}
    where = {"chip": card["name"], "date": "2026-11-23", "commit": "abc1234"}
    (tmp_path / "card.json").write_text(json.dumps({"environment": where, "card": card, "rows": []}))
    made = in_process("plan", "--calibrate", tmp_path / "card.json", "--cluster-out", tmp_path / "mine.yaml")
    assert made.returncode == 0, made.stderr
    assert "what training reaches of the chip's rates is not calibrated" in made.stdout
    done = in_process("plan", "--model", "llama3-8b", "--cluster", tmp_path / "mine.yaml", "--global-batch", "64")
    assert done.returncode == 0 and "dgx-h100-calibrated" in done.stdout, done.stderr
    assert_refused(in_process("plan", "--calibrate", tmp_path / "mine.yaml"), "is not JSON")


def test_software_is_named_and_told_apart() -> None:
    """NVIDIA's stack is faster on H100 than the open PyTorch code that our trainer is counted as."""
    layout = ("--explain", "tp=4,pp=4,vpp=5,mbs=1")
    ours = in_process("plan", *CLUSTER, *layout)
    nvidia = in_process("plan", *CLUSTER, *layout, "--software", "nvidia")
    assert nvidia.returncode == 0, nvidia.stderr
    assert "Predicted for NVIDIA's stack (Megatron-Core with Transformer Engine)" in nvidia.stdout
    steps = [float(done.stdout.split("step ")[1].split(" s")[0]) for done in (ours, nvidia)]
    assert steps[0] > 1.1 * steps[1]
