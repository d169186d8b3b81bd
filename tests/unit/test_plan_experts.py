"""Plans of models with a mixture of experts, as predictions for other software: against closed form on a cluster whose
rates are round numbers, against printed numbers of parameters, and against published runs that nothing was fitted
to."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm_parallel.errors import UserError
from llm_parallel.planner.command import plan_command
from llm_parallel.planner.hardware import Cluster, Constants, load_cluster
from llm_parallel.planner.memory import layer_activations, memory
from llm_parallel.planner.models import MIXTURES, planned
from llm_parallel.planner.published.rows import DATA
from llm_parallel.planner.published.trust import trust
from llm_parallel.planner.request import PlanRequest
from llm_parallel.planner.search import best_layouts, layouts
from llm_parallel.planner.shapes import Experts, Shape, Strategy, with_software
from llm_parallel.planner.steptime import Model, step_time

EXPERTS = Experts(count=8, active=2, ffn=256)
SHAPE = Shape(layers=4, hidden=512, heads=8, groups=4, ffn=0, vocab=1024, experts=EXPERTS)
DENSE = replace(SHAPE, experts=None)
PLAIN = with_software(Strategy(gpus=16, global_batch=16, micro_batch=1, seq=1024), "nvidia")
TOKENS = 1024


def cluster(compute: float = 1e30, memory_s: float = 0.0) -> Cluster:
    """Eight GPUs a node, 1e9 bytes a second over NVLink and 1e8 between nodes, and nothing hidden."""
    found = load_cluster("dgx-h100")
    constants = Constants(
        **dict.fromkeys(("gemm", "gemm_te", "gemm_fp8", "flash", "flash_te", "memory", "nvlink", "nic"), 1.0),
        tp_hidden=0.0, dp_hidden=0.0, layer_us=0.0, jitter=0.0,
    )  # fmt: skip
    chip = replace(
        found.chip, peak_flops=compute, memory_bytes_per_s=1 / memory_s if memory_s else 1e30, constants=constants
    )
    rates = {"nvlink_bytes_per_s": 1e9, "nic_bytes_per_s": 1e8, "nvlink_latency_s": 0.0, "nic_latency_s": 0.0}
    return replace(found, chip=chip, **rates)


@pytest.mark.parametrize(
    ("name", "parameters", "active"),
    [("mixtral-8x7b", 46.7, 12.9), ("mixtral-8x22b", 140.6, 39.1), ("qwen3-30b-a3b", 30.5, 3.3),
     ("qwen3-235b-a22b", 235.1, 22.2), ("grok-1", 314.0, None)],
)  # fmt: skip
def test_parameters_are_those_that_the_authors_print(name: str, parameters: float, active: float | None) -> None:
    """In billions. Active ones count both tables of tokens, of which FLOPs count the output projection."""
    shape = planned(name.upper()).shape
    assert shape.parameters / 1e9 == pytest.approx(parameters, rel=0.01)
    if active is not None:
        without = shape.flops_per_token(0, causal=False) / 6
        assert (without + shape.vocab * shape.hidden) / 1e9 == pytest.approx(active, rel=0.02)


def test_products_are_those_of_the_active_experts() -> None:
    """Beside attention: 6 FLOPs of each weight of two experts and of the router for each token, whatever EP is."""
    base = replace(PLAIN, gpus=8, global_batch=8)
    for ep in (1, 2, 8):
        with_, without = (step_time(shape, replace(base, ep=ep), cluster(1e12)).compute for shape in (SHAPE, DENSE))
        assert with_ - without == pytest.approx(6 * TOKENS * 4 * (2 * 3 * 512 * 256 + 8 * 512) / 1e12)


def test_weights_of_a_gpus_experts_are_moved_for_every_product() -> None:
    """Eight experts on a GPU or one of them: forward once and backward twice, 2 bytes a number."""
    base = replace(PLAIN, gpus=8, global_batch=8)
    alone, spread = (step_time(SHAPE, replace(base, ep=ep), cluster(memory_s=1e-9)) for ep in (1, 8))
    assert alone.compute - spread.compute == pytest.approx(3 * 2 * 4 * 7 * 3 * 512 * 256 * 1e-9)


def test_rows_go_to_their_experts_and_back_in_both_directions() -> None:
    """Two all-to-alls in each direction of each of 4 layers, of 2 rows of 512 numbers of 2 bytes for each token: 7 of 8
    parts over NVLink within a node; over two nodes 8 of 16 parts by each GPU's own card, which is slower."""
    rows = 2 * TOKENS * 2 * 512
    found = step_time(SHAPE, replace(PLAIN, ep=8), cluster()).tp
    assert found == pytest.approx(4 * 2 * 2 * 7 / 8 * rows / 1e9)
    wide = replace(SHAPE, experts=replace(EXPERTS, count=16))
    assert step_time(wide, replace(PLAIN, ep=16), cluster()).tp == pytest.approx(4 * 2 * 2 * 8 / 16 * rows / 1e8)
    assert step_time(SHAPE, PLAIN, cluster()).tp == 0.0


def test_tensor_parallel_experts_gather_their_rows() -> None:
    """TP 2 without communication that is hidden: attention's all-reduce of a row for each token, and the experts' of
    two rows; each rank sends half of the tokens to EP 4."""
    strategy = replace(PLAIN, tp=2, ep=4, overlap_tp=False, global_batch=8)
    row = 2 * TOKENS * 512
    reduced = (1 + 2) * 2 * 1 / 2 * row / 1e9
    sent = 2 * 3 / 4 * (2 * row / 2) / 1e9
    assert step_time(SHAPE, strategy, cluster()).tp == pytest.approx(4 * 2 * (reduced + sent))


def test_experts_are_on_fewer_replicas_than_the_rest() -> None:
    """16 replicas of what is dense, 4 of each expert at EP 4: state of 2 + 4 + 12 / replicas bytes a number; gradients
    are reduced and weights gathered among so many."""
    strategy = replace(PLAIN, ep=4)
    experts = 4 * 8 * 3 * 512 * 256 / 4
    dense = SHAPE.parameters - 4 * 8 * 3 * 512 * 256
    found = memory(SHAPE, strategy)
    assert found.weights == pytest.approx(2 * (dense + experts)) and found.gradients == pytest.approx(2 * found.weights)
    assert found.optimizer == pytest.approx(12 * (dense / 16 + experts / 4))
    reduced = step_time(SHAPE, strategy, cluster()).dp
    # Of 16 replicas eight are on a node, whose cards all send; of 4 that are 4 apart two are.
    assert reduced == pytest.approx(6 * (15 / 16 * dense / 8e8 + 3 / 4 * experts / 2e8))


def test_activations_of_experts() -> None:
    """For each token two rows: what came in, what goes into and out of the activation, what comes out; and fp32 logits
    and probabilities of 8 experts."""
    with_, without = (layer_activations(shape, PLAIN) for shape in (SHAPE, DENSE))
    assert with_ - without == pytest.approx(TOKENS * (2 * 2 * (512 + 3 * 256 + 512) + 8 * 8))


def test_expert_parallel_sizes_divide_experts_and_ranks() -> None:
    found = list(layouts(SHAPE, PLAIN, load_cluster("dgx-h100")))
    assert {one.ep for one in found} == {1, 2, 4, 8}
    assert all((one.dp * one.cp) % one.ep == 0 for one in found)
    assert {one.ep for one in layouts(replace(DENSE, ffn=1024), PLAIN, load_cluster("dgx-h100"))} == {1}


def _published(pattern: str) -> list[dict[str, str]]:
    table = DATA / "published_throughput.csv"
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    return [row for row in rows if re.search(pattern, row["model"]) and "H100" in row["chip"]]


def _error(row: dict[str, str], shape: Shape) -> float:
    """Relative error of the predicted step time of a published run."""
    ep = int(re.search(r"ep=(\d+)", row["dp_or_ep"]).group(1))  # type: ignore[union-attr]
    sizes = {
        name: int(row[name] or 1) for name in ("tp", "pp", "vpp", "cp", "micro_batch", "global_batch", "gpus", "seq")
    }
    strategy = Strategy(**sizes, ep=ep, precision="fp8" if "fp8" in row["precision"] else "bf16")
    found = step_time(shape, with_software(strategy, "nvidia"), load_cluster("dgx-h100")).total
    measured = strategy.global_batch * strategy.seq / float(row["tokens_per_s_per_gpu"]) / strategy.gpus
    return found / measured - 1.0


def test_published_runs_are_predicted_without_a_fit() -> None:
    """Grok-1 on 512 to 2,048 H100 (dgxc-benchmarking): few large experts."""
    errors = [_error(row, planned("grok-1").shape) for row in _published("Grok-1")]
    assert len(errors) == 6 and sum(map(abs, errors)) / 6 < 0.15, errors


def test_experts_are_planned_for_other_software_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = PlanRequest("mixtral-8x7b", gpus=64, global_batch=256, seq=4096, top=1, software="nvidia")
    assert plan_command(asked) == 0
    said = capsys.readouterr().out
    assert "46.7 B parameters" in said and ",ep=" in said and "(a mixture of experts)" in said
    changes: tuple[dict[str, Any], ...] = (
        {"software": "ours"}, {"software": "fsdp"}, {"adapter": "rank=8"}, {"write": str(tmp_path / "run.yaml")},
    )  # fmt: skip
    for change in changes:
        with pytest.raises(UserError, match="has experts, which our trainer does not have"):
            plan_command(replace(asked, **change))
    with pytest.raises(UserError, match="has experts"):
        plan_command(replace(asked, what_if=("software=ours",)))
    for explain, message in (("tp=1,ep=16", "ep=16 must divide the 8 experts"), ("tp=8,ep=3", "ep=3 must divide")):
        with pytest.raises(UserError, match=message):
            plan_command(replace(asked, explain=explain))
    with pytest.raises(UserError, match="the 1 expert of a layer"):
        plan_command(PlanRequest("llama3-8b", gpus=8, explain="tp=1,ep=2"))
    assert trust(load_cluster("dgx-h100"), PLAIN, has_experts=True).error is None


def test_a_config_of_hugging_face_with_experts(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "model_type": "mixtral", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert planned(str(path)).shape == planned("mixtral-8x7b").shape
    qwen = config | {"model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048, "num_key_value_heads": 4,
                     "vocab_size": 151936, "head_dim": 128, "num_experts": 128, "moe_intermediate_size": 768,
                     "num_experts_per_tok": 8}  # fmt: skip
    path.write_text(json.dumps(qwen))
    assert planned(str(path)).shape == planned("qwen3-30b-a3b").shape
    for change, said in (
        ({"num_experts": None}, "num_experts is None"), ({"decoder_sparse_step": 2}, "some of its layers are dense"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
    ):  # fmt: skip
        path.write_text(json.dumps(qwen | change))
        with pytest.raises(UserError, match=said):
            planned(str(path))


def test_the_search_takes_experts_apart_to_fit() -> None:
    """Mixtral's 47 B parameters fit on 32 GPUs; a single all-to-all is timed as ``Model`` does."""
    shape, h100 = planned("mixtral-8x7b").shape, load_cluster("dgx-h100")
    base = with_software(Strategy(gpus=32, global_batch=128, micro_batch=1, seq=4096), "nvidia")
    found, looked, fitting = best_layouts(shape, base, h100, 1, ("none", "full"))
    assert 0 < fitting < looked and found[0].strategy.ep * found[0].strategy.tp * found[0].strategy.pp > 1
    assert Model(shape, base, h100)._all_to_all(1e9, 1, 1) == 0.0 and set(MIXTURES) >= {"grok-1"}
