"""``llm-parallel bench step``: contenders train the same model, and results say what they are."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from llm_parallel.bench.clock import SplitClock
from llm_parallel.bench.contenders import chosen, initial_hf_weights
from llm_parallel.bench.requests import StepRequest
from llm_parallel.bench.step import as_rows, one_process_config, table
from llm_parallel.bench.step_request import label
from llm_parallel.bench.turns import Finding
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError
from llm_parallel.metrics.peaks import Peak
from llm_parallel.model.flops import flops_per_token, parameter_count
from tests.support.commands import assert_refused, llm_parallel
from tests.support.in_process import in_process

SMALL = ("model.vocab_size=100", "data.seq_length_tokens=32", "train.global_batch_size=4", "train.micro_batch_size=2",
         "device=cpu", "train.threads_per_process=1", "optim.lr=1e-3")  # fmt: skip


def config(*overrides: str) -> RunConfig:
    return one_process_config(StepRequest([*SMALL, *overrides], model="debug"))


@pytest.mark.slow
def test_contenders_have_the_same_losses(tmp_path: Path) -> None:
    """Three steps of two micro batches each, grouped queries, vocabulary with padding: ours, megatron-core's own layers
    and Hugging Face's start from the same weights and learn alike."""
    done = llm_parallel(
        "bench", "step", "--model", "debug", *SMALL, "--rounds", "2", "--steps", "1", "--trace", tmp_path / "traces",
        "--out", tmp_path / "step",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "step.json").read_text())
    rows = {row["provider"]: row for row in result["rows"]}
    assert set(rows) == {"ours", "ours-torch", "megatron-core", "transformers"}
    for row in rows.values():
        assert len(row["first_losses"]) == 3 and row["first_losses"][2] < row["first_losses"][0]
        assert row["loss_difference"] < 2e-5, row
        assert len(row["seconds"]) == 2 and set(row["split_s"]) == {"forward", "backward", "clip and AdamW"}
        expected = row["tokens_per_s"] * flops_per_token(config().model, 32) / 1e12
        assert 0 < row["mfu"] < 1 and expected > 0
    assert rows["ours"]["ours_over_it"] == 1.0
    with (tmp_path / "step.csv").open() as handle:
        assert [row["provider"] for row in csv.DictReader(handle)] == list(rows)
    trace = json.loads((tmp_path / "traces" / "ours.json").read_text())
    assert any("mm" in event.get("name", "") for event in trace["traceEvents"])
    assert "measured on" in done.stdout and "fp32 product of 2048 x 2048 measured here" in done.stdout


@pytest.mark.parametrize("tied", [False, True])
def test_hf_weights_are_those_of_a_checkpoint(tied: bool) -> None:
    """Shapes and count; the head is the embedding where tied; no tensor is left as transformers drew it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from llm_parallel.model.hf_config import model_to_hf_config

    of = config(f"model.tie_embeddings={str(tied).lower()}")
    model = LlamaForCausalLM(LlamaConfig(**model_to_hf_config(of.model, "float32", {})))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    initial_hf_weights(of, model)
    assert sum(p.numel() for p in model.parameters()) == parameter_count(of.model).total
    assert not any((p == 7.0).any() for p in model.parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    deviation = model.model.layers[0].mlp.down_proj.weight.std().item()
    assert deviation == pytest.approx(0.02 / (2 * of.model.num_layers) ** 0.5, rel=0.05)


def test_split_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time inside the module is forward's, the rest that of the part entered last."""
    now = [100.0]
    monkeypatch.setattr("llm_parallel.bench.clock.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def passes(seconds: float) -> None:
        now[0] += seconds

    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            passes(0.5)
            return x

    module = Slow()
    clock = SplitClock([module], cuda=False)
    with clock.watching():
        clock.enter("backward")
        module(torch.zeros(1))
        passes(3.0)
        module(torch.zeros(1))
        clock.enter("update")
        passes(0.25)
        parts = clock.seconds()
    assert parts == pytest.approx({"forward": 1.0, "backward": 3.0, "update": 0.25})
    module(torch.zeros(1))
    assert clock.seconds() == {}  # nothing is watched after the context


def findings() -> dict[str, Finding]:
    return {
        "ours": Finding([4.0, 3.9], [0.1, 0.2, 0.1], {"forward": 1.0, "backward": 3.0}, 2**20),
        "megatron-core": Finding([4.0, 3.9001], [0.2, 0.3, 0.1], {"forward": 1.0}, 2**21),
        "transformers": Finding([4.0, 3.8], [0.2, 0.2, 0.2], {"forward": 1.0}, 2**21),
        "broken": Finding(problem="RuntimeError: no"),
    }


def test_rows() -> None:
    """Ratios are paired by round; another loss or a failure gets none; MFU is the closed form."""
    of = config()
    rows = {row["provider"]: row for row in as_rows(findings(), of, 3, Peak(2.0, "a test"))}
    assert rows["megatron-core"]["ours_over_it"] == pytest.approx(1.5)  # of 2.0, 1.5, 1.0
    assert "ours_over_it" not in rows["transformers"] and "not compared" in rows["transformers"]["note"]
    assert rows["broken"]["median_ms"] is None and "RuntimeError" in rows["broken"]["note"]
    assert rows["ours"]["tokens_per_s"] == pytest.approx(4 * 32 / 0.1)
    assert rows["ours"]["mfu"] == pytest.approx(4 * 32 / 0.1 * flops_per_token(of.model, 32) / 2e12)
    assert as_rows({"ours": findings()["ours"]}, of, 3, Peak(None, "none"))[0]["mfu"] is None


def test_table() -> None:
    rows = as_rows(findings(), config(), 3, Peak(2.0, "a test"))
    result: dict[str, Any] = {
        "environment": {"chip": "a chip", "date": "2026-01-01", "commit": "abc", "load_average_1_min": 0.1},
        "order": "rotated", "memory": "a meter", "mfu": {"convention": "c", "peak": "p"}, "rows": rows,
    }  # fmt: skip
    text = table(result)
    assert "measured on a chip, 2026-01-01, commit abc, load 0.1; rotated" in text
    assert "| ours | 1,280 | 640 to 1,280 | 1.000 |" in text
    assert "forward 25%, backward 75%" in text and "| broken | failed: RuntimeError: no |" in text


def test_labels_tell_models_and_batches_apart() -> None:
    base = label(config())
    for change in ("model.num_layers=3", "model.vocab_size=101", "data.seq_length_tokens=64",
                   "train.global_batch_size=8", "train.micro_batch_size=1"):  # fmt: skip
        assert label(config(change)) != base


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (StepRequest(["a.yaml", "b.yaml"]), "takes one run file"),
        (StepRequest(["train.steps=3"]), "needs a run file or --model"),
        (StepRequest(["parallel.tp=2", *SMALL], model="debug"), "parallel describes 2 processes"),
        (StepRequest(["device=cpu"], model="debug"), "model.vocab_size is not set"),
        (StepRequest(SMALL, model="llama5"), "model.preset"),
    ],
)
def test_bad_requests(request_: StepRequest, message: str) -> None:
    with pytest.raises(UserError, match=message):
        one_process_config(request_)


def test_bad_providers() -> None:
    with pytest.raises(UserError, match="--providers nemo is unknown; there are ours,"):
        chosen(["nemo"], config())
    scaled = config("model.rope_scaling.factor=8")
    with pytest.raises(UserError, match="--providers megatron-core can't be given"):
        chosen(["megatron-core"], scaled)
    assert "megatron-core" not in chosen([], scaled) and "ours" in chosen([], scaled)


def test_bad_input_of_the_command(tmp_path: Path) -> None:
    arguments = ("bench", "step", "--model", "debug", *SMALL)
    assert_refused(in_process(*arguments, "--providers", "nemo"), "--providers nemo is unknown")
    assert_refused(in_process(*arguments, "--baseline", tmp_path / "none.json"), "is not a result of bench")
