"""Plans for other software than our trainer: sharded gradients and weights (ZeRO-2, ZeRO-3) and recomputation of
single operators; and what a layer and a micro batch cost whatever their size. Against closed form on a cluster whose
rates are round numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError
from llm_parallel.planner.command import plan_command
from llm_parallel.planner.hardware import Cluster, Constants, load_cluster
from llm_parallel.planner.memory import layer_activations, memory
from llm_parallel.planner.request import PlanRequest
from llm_parallel.planner.search import layouts
from llm_parallel.planner.shapes import RECOMPUTES, Shape, Strategy, strategy_of, with_software
from llm_parallel.planner.steptime import UNFUSED_KERNELS, step_time

SHAPE = Shape(layers=4, hidden=512, heads=8, groups=4, ffn=1408, vocab=1024)
PLAIN = Strategy(gpus=8, global_batch=32, micro_batch=1, seq=1024)
BYTE_S = 1e-9


def cluster(compute: float = 1e30, memory_s: float = 0.0, layer_us: float = 0.0, dp_hidden: float = 0.0) -> Cluster:
    """Links of 1e9 bytes a second; products, memory and launches take no time unless they are given."""
    found = load_cluster("dgx-h100")
    constants = Constants(
        **dict.fromkeys(("gemm", "gemm_te", "gemm_fp8", "flash", "flash_te", "memory", "nvlink", "nic"), 1.0),
        tp_hidden=0.0, dp_hidden=dp_hidden, layer_us=layer_us, jitter=0.0,
    )  # fmt: skip
    chip = replace(
        found.chip, peak_flops=compute, memory_bytes_per_s=1 / memory_s if memory_s else 1e30, constants=constants
    )
    rates = {"nvlink_bytes_per_s": 1e9, "nic_bytes_per_s": 1e9, "nvlink_latency_s": 0.0, "nic_latency_s": 0.0}
    return replace(found, chip=chip, **rates)


def exposed(strategy: Strategy, **rates: float) -> float:
    return step_time(SHAPE, strategy, cluster(**rates)).dp


LAYERS = SHAPE.layers * SHAPE.layer_parameters
ALL = SHAPE.parameters


def test_collectives_of_each_stage_of_zero() -> None:
    """Rajbhandari et al. 2020 (arXiv 1910.02054), section 7, with m = 4 micro batches on 8 replicas and fp32 gradients:
    ZeRO-1 reduces gradients and gathers weights once a step, ZeRO-2 reduces them for every micro batch, ZeRO-3 gathers
    the weights twice and reduces once for every micro batch."""
    share = 7 / 8 * 1e-9
    assert exposed(PLAIN) == pytest.approx(share * (4 + 2) * ALL)
    assert exposed(with_software(PLAIN, "zero-2")) == pytest.approx(share * (4 * 4 + 2) * LAYERS)
    assert exposed(with_software(PLAIN, "fsdp")) == pytest.approx(share * 4 * (2 * 2 + 4) * LAYERS)


def test_compute_hides_what_it_is_longer_than() -> None:
    """With hours of compute only the share that nothing hides is left, and ZeRO-2's gather after the update."""
    share, slow = 7 / 8 * 1e-9, 1e6
    kept = {"compute": slow, "dp_hidden": 0.9}
    assert exposed(with_software(PLAIN, "zero-2"), **kept) == pytest.approx(share * (0.1 * 4 * 4 + 2) * LAYERS)
    assert exposed(with_software(PLAIN, "fsdp"), **kept) == pytest.approx(share * 0.1 * 4 * 8 * LAYERS)


def test_memory_of_each_stage_of_zero() -> None:
    """Bytes of a parameter on d = 8 replicas: 2 + 4 + 12/d, 2 + 4/d + 12/d, 16/d (FSDP2 keeps fp32 weights)."""
    for name, weights, gradients, optimizer in (
        ("ours", 2, 4, 12 / 8), ("zero-2", 2, 4 / 8, 12 / 8), ("fsdp", 4 / 8, 4 / 8, 8 / 8)
    ):  # fmt: skip
        found = memory(SHAPE, with_software(PLAIN, name))
        assert found.weights == pytest.approx(weights * ALL), name
        assert found.gradients == pytest.approx(gradients * ALL), name
        assert found.optimizer == pytest.approx(optimizer * ALL), name
    plain, sharded = (memory(SHAPE, with_software(PLAIN, name)).temporary for name in ("ours", "zero-2"))
    assert sharded - plain == pytest.approx(6 * SHAPE.layer_parameters), "one layer's gradient in bf16 and fp32"


def test_operators_that_are_recomputed_keep_what_every_second_product_made() -> None:
    none, ops = (layer_activations(SHAPE, PLAIN, kind) for kind in ("none", "ops"))
    products = 64 * (2 * 8 + 2 * 4) + 2 * 1408
    assert ops == pytest.approx(2 * 1024 * (2 * 512 + products / 2 + 8 * 64)) and ops < none


def test_each_software_is_searched_with_what_it_has() -> None:
    h100 = load_cluster("dgx-h100")
    for name, kinds in RECOMPUTES.items():
        found = list(layouts(SHAPE, with_software(PLAIN, name), h100, kinds))
        assert {one.recompute for one in found} == set(kinds)
        assert (max(one.pp for one in found) == 1) == (name == "zero-2"), "DeepSpeed's pipelines have no stage 2"


def test_other_software_is_named_and_never_written_as_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, said in (("fsdp", "PyTorch's FSDP2 (ZeRO-3)"), ("zero-2", "DeepSpeed's ZeRO-2")):
        asked = PlanRequest("llama3-8b", gpus=8, global_batch=64, top=1, software=name)
        assert plan_command(asked) == 0
        assert f"Predicted for {said}, which is other software than our trainer" in capsys.readouterr().out
        with pytest.raises(UserError, match="our trainer has no sharded gradients"):
            plan_command(replace(asked, write=str(tmp_path / "run.yaml")))
        with pytest.raises(UserError, match="leave out --adapter"):
            plan_command(replace(asked, adapter="rank=8"))
    assert not (tmp_path / "run.yaml").exists()
    capsys.readouterr()
    explained = PlanRequest("llama3-8b", gpus=8, global_batch=64, explain="tp=1,mbs=1,recompute=ops", software="fsdp")
    assert plan_command(explained) == 0
    with pytest.raises(UserError, match="not ops"):
        plan_command(replace(explained, software="ours"))


def test_every_micro_batch_adds_its_gradients() -> None:
    """The same tokens in 4 micro batches of 1 or in one of 4: each micro batch reads bf16 gradients, and reads and
    writes fp32 ones."""
    base = with_software(replace(PLAIN, gpus=1, zero=0, global_batch=4), "ours")
    many, one = (step_time(SHAPE, replace(base, micro_batch=size), cluster(memory_s=BYTE_S)) for size in (1, 4))
    matrices = SHAPE.layers * SHAPE.layer_matrices + SHAPE.vocab * SHAPE.hidden
    assert many.elementwise - one.elementwise == pytest.approx(3 * (2 + 2 * 4) * matrices * BYTE_S)
    half = step_time(SHAPE, replace(base, grad_bytes=2), cluster(memory_s=BYTE_S))
    assert many.elementwise - half.elementwise == pytest.approx(4 * 2 * 2 * matrices * BYTE_S)
    for name in ("nvidia", "fsdp", "zero-2"):  # added within the products, or after they were reduced
        many_, one_ = (
            step_time(SHAPE, replace(with_software(base, name), micro_batch=n), cluster(memory_s=BYTE_S))
            for n in (1, 4)
        )
        assert many_.elementwise == pytest.approx(one_.elementwise)


def test_our_own_trainer_adds_gradients_by_an_operator() -> None:
    """As ``gradient_accumulation_fusion`` in ``model/mcore_config.py`` says."""
    assert strategy_of(RunConfig(), 1).adds_gradients and not with_software(PLAIN, "nvidia").adds_gradients


def test_attention_that_is_not_fused_has_as_many_kernels_again() -> None:
    base = replace(PLAIN, gpus=1, zero=0, global_batch=4)
    fused, plain = (
        step_time(SHAPE, replace(base, flash=flash), cluster(layer_us=100.0)).host for flash in (True, False)
    )
    assert fused == pytest.approx(4 * 2 * SHAPE.layers * 1e-4)
    assert plain == pytest.approx(UNFUSED_KERNELS * fused)
