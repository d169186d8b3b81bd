"""The memory model against what our trainer really allocates: 15 layouts (3 by default), by kind, on every rank.

Triton's interpreter runs the kernels that a GPU would, so autograd holds what it would hold there.
"""

from __future__ import annotations

from typing import Any

import pytest

from llm_parallel.planner.memory import memory_of_stage, recomputed_activations
from llm_parallel.planner.shapes import shape_of, strategy_of
from tests.support.harness import run_ranks
from tests.unit.planner_trainer import KERNELS, base_config, changed, measure

TOLERANCE = 0.03
STATES = ("weights", "gradients", "optimizer")

pytestmark = pytest.mark.gloo
pytest.importorskip("triton", reason="the kernels need triton")


def _p(**parallel: Any) -> dict[str, Any]:
    return {f"parallel.{name}": value for name, value in parallel.items()}


LAYERS = {"model.num_layers": 4}
BIASES = {"model.qkv_bias": True, "model.attention_output_bias": True, "model.mlp_bias": True}
LORA = {"adapter.rank": 8}
PLAIN = {"train.precision": "fp32", **{f"kernels.{operator}": "torch" for operator in KERNELS}}
ROWS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "micro batch 2, tied": (1, {"train.micro_batch_size": 2, "model.tie_embeddings": True}),
    "fp32": (1, {"train.precision": "fp32"}),
    "8-bit moments": (1, {"optim.moment_bits": 8}),
    "8-bit moments, DP2, tied": (2, _p(dp=2) | {"optim.moment_bits": 8, "model.tie_embeddings": True}),
    "full recompute": (1, _p(recompute="full") | LAYERS),
    "multi-head attention": (1, {"model.num_query_groups": 8}),
    "biases": (1, BIASES),
    "QK norms": (1, {"model.qk_norm": True}),
    "wide QK norms": (1, {"model.qk_norm_over_heads": True}),
    "multi-head attention, QK norms, micro batch 2": (
        1,
        {"model.num_query_groups": 8, "model.qk_norm": True, "train.micro_batch_size": 2},
    ),
    "TP2, biases and QK norms": (2, _p(tp=2) | BIASES | {"model.qk_norm": True}),
    "TP2, wide QK norms": (2, _p(tp=2) | {"model.qk_norm_over_heads": True}),
    "TP2": (2, _p(tp=2)),
    "TP2 without SP": (2, _p(tp=2, sequence_parallel=False)),
    "DP2": (2, _p(dp=2)),
    "DP2, optimizer not sharded": (2, _p(dp=2, distributed_optimizer=False)),
    "CP2": (2, _p(cp=2)),
    "TP2 CP2": (4, _p(tp=2, cp=2)),
    "PP2": (2, _p(pp=2)),
    "LoRA": (1, LORA),
    "DoRA, TP2": (2, _p(tp=2) | LORA | {"adapter.dora": True}),
    "torch's operators, DoRA on q and o": (1, PLAIN | LORA | {"adapter.dora": True, "adapter.targets": ("q", "o")}),
    "LoRA, 4 bits, TP2 PP2": (4, _p(tp=2, pp=2) | LORA | {"adapter.base": "nf4"}),
    "LoRA on q and v, full recompute": (1, _p(recompute="full") | LAYERS | LORA | {"adapter.targets": ("q", "v")}),
    "torch's operators": (1, PLAIN),
    "torch's operators, bf16, TP2": (2, _p(tp=2) | PLAIN | {"train.precision": "bf16"}),
    "torch's operators, multi-head attention, micro batch 2": (
        1,
        PLAIN | {"model.num_query_groups": 8, "train.micro_batch_size": 2},
    ),
    "torch's operators, QK norms, TP2 without SP": (
        2,
        _p(tp=2, sequence_parallel=False) | PLAIN | {"model.qk_norm": True},
    ),
    "torch's operators, CP2": (2, _p(cp=2) | PLAIN),
    "torch's operators, LoRA": (1, PLAIN | LORA),
    "torch's operators, LoRA on q and v in 4 bits, TP2": (
        2,
        _p(tp=2) | PLAIN | LORA | {"adapter.targets": ("q", "v"), "adapter.base": "nf4"},
    ),
    "torch's operators, LoRA on k, o and down, PP2": (
        2,
        _p(pp=2) | PLAIN | LORA | {"adapter.targets": ("k", "o", "down")},
    ),
    "PP2, tied": (2, _p(pp=2) | {"model.tie_embeddings": True}),
    "PP2 VPP2": (2, _p(pp=2, vpp=2) | LAYERS),
    "TP2 PP2": (4, _p(tp=2, pp=2)),
}


QUICK = ("8-bit moments", "full recompute", "TP2, biases and QK norms", "TP2 PP2")
"""Rows that are not slow: every kind of memory, recomputation, and both kinds of model parallelism with their ends."""


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ROWS]
)
def test_every_kind_is_what_the_trainer_holds(name: str) -> None:
    world, changes = ROWS[name]
    config = changed(base_config(), changes)
    shape, strategy = shape_of(config.model), strategy_of(config, world)
    ranks = run_ranks(measure, world, changes, timeout_s=280.0)
    for found in ranks:
        # With moments in 8 bits it matters which replica updates the embedding; predicted is the mean.
        stage = [rank["optimizer"] for rank in ranks if rank["pp"] == found["pp"]]
        found = {**found, "optimizer": sum(stage) / len(stage)}
        expected = memory_of_stage(shape, strategy, found["pp"])
        again = recomputed_activations(shape, strategy)
        saved = expected.activations + max(expected.logits, again)  # the loss is over before a layer is run again
        errors = [f"{getattr(expected, kind) / found[kind] - 1:+.2%}" for kind in STATES]
        print(f"| {name} | {found['pp']} | {' | '.join(errors)} | {saved / found['saved'] - 1:+.2%} |")
        for kind in STATES:
            assert getattr(expected, kind) == pytest.approx(found[kind], rel=TOLERANCE), kind
        assert saved == pytest.approx(found["saved"], rel=TOLERANCE), found["shapes"]
