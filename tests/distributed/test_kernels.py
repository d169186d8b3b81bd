"""Layouts with every Triton kernel switched on (in the interpreter) give the one-process run on torch's operators."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.distributed.layouts import Row
from tests.distributed.test_layouts import GRADIENT_TOLERANCE, LOSS_TOLERANCE, worst_gradient
from tests.support.harness import run_ranks
from tests.support.job import compare_layout

STEPS = 2
SMALL = {"model.num_layers": 2, "train.global_batch_size": 2, "train.steps": STEPS}
KERNELS = {f"kernels.{name}": "triton" for name in ("rms_norm", "rope", "attention", "swiglu", "cross_entropy")}
FUSED = {"kernels.output_loss": "fused"}
RECOMPUTE = {"kernels.output_loss": "fused-recompute"}


def _p(**parallel: Any) -> dict[str, Any]:
    return {f"parallel.{name}": value for name, value in parallel.items()}


SELECTIVE = _p(recompute="selective", recompute_modules=["core_attn", "mlp"])
ADAMW = {"optim.implementation": "triton"}
ROWS = (
    Row("one process, our AdamW", 1, ADAMW),
    Row("TP2", 2, _p(tp=2, sequence_parallel=False) | RECOMPUTE),
    Row("TP2 SP, fused output and loss", 2, _p(tp=2) | FUSED),
    Row("TP2, fused output and loss", 2, _p(tp=2, sequence_parallel=False) | FUSED),
    Row("PP2, fused output and loss", 2, _p(pp=2) | FUSED),
    Row("CP2", 2, _p(cp=2)),
    Row("DP2, our AdamW", 2, _p(dp=2) | ADAMW),
    Row("TP2 SP PP2 CP2, our AdamW", 8, _p(tp=2, pp=2, cp=2) | ADAMW),
    Row("full recompute", 1, _p(recompute="full") | RECOMPUTE),
    Row("selective recompute", 1, SELECTIVE),
    Row("isolate micro batch 2, fused output and loss", 1, {"train.micro_batch_size": 2} | FUSED, "isolate"),
    Row("isolate TP2 SP, recomputed output", 2, _p(tp=2) | RECOMPUTE, "isolate"),
    Row("isolate CP2", 2, _p(cp=2), "isolate"),
    Row("odd vocabulary TP2", 2, _p(tp=2), "odd vocabulary"),
    Row("odd vocabulary TP4, fused output and loss", 4, _p(tp=4) | FUSED, "odd vocabulary"),
    Row("tied TP2 SP PP2, fused output and loss", 4, _p(tp=2, pp=2) | FUSED, "tied"),
)
FEW = (
    Row("PP2, our AdamW, fused output and loss", 2, _p(pp=2) | ADAMW | FUSED),
    Row("isolate CP2 micro batch 2, selective recompute", 2,
        _p(cp=2) | SELECTIVE | {"train.micro_batch_size": 2}, "isolate"),
    Row("tied TP2 SP, fused output and loss", 2, _p(tp=2) | FUSED, "tied"),
    Row("odd vocabulary TP2, full recompute, recomputed output", 2,
        _p(tp=2, sequence_parallel=False, recompute="full") | RECOMPUTE, "odd vocabulary"),
)  # fmt: skip
"""Every switch, layout and reference of ``ROWS``, two or more to a row; DP 2 with our AdamW is in
``test_bf16_step_writes_both_precisions``."""
REFERENCES: dict[str, dict[str, Any]] = {
    "plain": {},
    "isolate": {"data.packing": "isolate"},
    "odd vocabulary": {"model.vocab_size": 101},
    "tied": {"model.tie_embeddings": True},
}

pytestmark = pytest.mark.gloo
pytest.importorskip("triton", reason="the kernels need triton")


def _name(row: Row) -> str:
    return row.name


@cache
def reference(name: str) -> dict[str, Any]:
    return run_ranks(compare_layout, 1, SMALL | REFERENCES[name], STEPS)[0]


@pytest.mark.parametrize("row", [*FEW, *(pytest.param(row, marks=pytest.mark.slow) for row in ROWS)], ids=_name)
def test_kernels_in_layout_equal_torch_on_one_process(row: Row) -> None:
    expected = reference(row.reference)
    changes = SMALL | REFERENCES[row.reference] | KERNELS | row.changes
    ranks = run_ranks(compare_layout, row.processes, changes, STEPS, timeout_s=240.0)
    losses = np.array([[loss for loss, _ in found["history"]] for found in ranks])
    worst_loss = np.abs(losses - [loss for loss, _ in expected["history"]]).max()
    gradient, name = worst_gradient(expected["gradients"], ranks)
    print(f"| {row.name} | {row.processes} | {worst_loss:.1e} | {gradient:.1e} | {name} |")
    assert worst_loss <= LOSS_TOLERANCE
    assert gradient <= GRADIENT_TOLERANCE, name


def test_kernels_were_in_use() -> None:
    """The comparison above would also pass if the switches did nothing."""
    (counts,) = run_ranks(launches, 1, SMALL | KERNELS | {"optim.implementation": "triton"})
    (none,) = run_ranks(launches, 1, SMALL)
    assert none == {}
    for operator in ("rms_norm", "rope", "attention", "swiglu", "cross_entropy", "adamw"):
        assert any(operator in name for name in counts), (operator, counts)


@pytest.mark.parametrize("sharded", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["distributed", "plain"])
def test_bf16_step_writes_both_precisions(sharded: bool) -> None:
    """Our AdamW rounds main parameters into the model itself; megatron-core's own copy is not made."""
    changes = {"train.precision": "bf16", "parallel.distributed_optimizer": sharded}
    ours = run_ranks(after_a_step, 2, SMALL | changes | _p(dp=2) | {"optim.implementation": "triton"})
    theirs = run_ranks(after_a_step, 2, SMALL | changes | _p(dp=2) | {"optim.implementation": "torch"})
    assert ours[0]["copies"] == 0 < theirs[0]["copies"]
    for name, expected in theirs[0]["parameters"].items():
        np.testing.assert_allclose(ours[0]["parameters"][name], expected, rtol=2**-7, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(ours[0]["parameters"][name], ours[1]["parameters"][name])
    changed_bits = [np.any(ours[0]["parameters"][n] != ours[0]["before"][n]) for n in ours[0]["before"]]
    assert all(changed_bits)


def after_a_step(rank: int, world_size: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Parameters of the model before and after one step, and how often main parameters were copied by megatron-core."""
    from llm_parallel.model.tensors import canonical_parameters
    from tests.support.job import base_config, changed, open_engine, train_steps

    config = changed(base_config(), changes)
    engine = open_engine(config, rank, world_size)
    copies = [0]
    for part in engine.optimizer.chained_optimizers:
        original = type(part)._copy_main_params_to_model_params

        def counted(self, original=original):
            copies[0] += 1
            return original(self)

        type(part)._copy_main_params_to_model_params = counted

    def parameters() -> dict[str, np.ndarray]:
        found = [pair for model in engine.models for pair in canonical_parameters(model)]
        return {name: p.detach().float().numpy().copy() for name, p in found}

    before = parameters()
    train_steps(engine, config, 0, 1)
    engine.parameters_up_to_date()
    return {"before": before, "parameters": parameters(), "copies": copies[0]}


def launches(rank: int, world_size: int, changes: dict[str, Any]) -> dict[str, int]:
    """How often each operator of the kernel library ran in one training step."""
    from collections import Counter

    from torch.utils._python_dispatch import TorchDispatchMode

    from tests.support.job import base_config, changed, open_engine, train_steps

    found: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function)
            if name.startswith("llm_kernels."):
                found[name] += 1
            return function(*args, **(kwargs or {}))

    config = changed(base_config(), changes)
    engine = open_engine(config, rank, world_size)
    with Count():
        train_steps(engine, config, 0, 1)
    return dict(found)
