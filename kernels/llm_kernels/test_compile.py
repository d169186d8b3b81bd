"""Operators compile into one graph without a break, with the gradients of the eager call.

aot_eager traces forward and backward as Inductor does, and runs the graph with the operators' own implementations.
Attention, AdamW and the losses with all their options are compiled in their own tests; the losses' rows here are slow.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton")

from llm_kernels.cross_entropy.op import cross_entropy
from llm_kernels.linear_cross_entropy.op import linear_cross_entropy
from llm_kernels.rms_norm.op import add_rms_norm, rms_norm
from llm_kernels.rope.op import rope, rope_qkv_
from llm_kernels.rope.ref import inverse_frequencies
from llm_kernels.rope.table import RopeTable
from llm_kernels.swiglu.op import swiglu
from llm_kernels.testing import default_device, random

TABLE = RopeTable.make(inverse_frequencies(8, 10000.0, device=default_device()), 4)
LABELS = torch.tensor([3, -100, 0], device=default_device())


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [random(*shape, dtype=torch.float32, seed=i) for i, shape in enumerate(shapes)]


# An operator and its inputs. Tensors that are written in place are results of a computation, as in a model.
CASES: dict[str, tuple[Callable[..., object], list[Tensor]]] = {
    "rms_norm": (lambda b, x, w: rms_norm(x, w, 1e-5, backend=b), leaves((3, 8), (8,))),
    "add_rms_norm": (lambda b, x, r, w: add_rms_norm(x, r, w, 1e-5, backend=b), leaves((3, 8), (3, 8), (8,))),
    "swiglu": (lambda b, x: swiglu(x, backend=b), leaves((3, 8))),
    "swiglu in place": (lambda b, x: swiglu(x * 1.5, inplace_backward=True, backend=b), leaves((3, 8))),
    "rope": (lambda b, q, k: rope(q, k, TABLE, backend=b), leaves((4, 2, 4, 8), (4, 2, 2, 8))),
    "rope_qkv_": (
        lambda b, x: rope_qkv_(x * 1.5, TABLE, num_groups=2, head_dim=8, backend=b),
        leaves((4, 2, 64)),
    ),
    "cross_entropy": (lambda b, x: cross_entropy(x, LABELS, label_smoothing=0.1, backend=b), leaves((3, 9))),
    "cross_entropy in place": (
        lambda b, x: cross_entropy(x * 1.5, LABELS, inplace_backward=True, backend=b),
        leaves((3, 9)),
    ),
    "linear_cross_entropy": (lambda b, x, w: linear_cross_entropy(x, w, LABELS, backend=b), leaves((3, 8), (9, 8))),
}


def outputs_and_gradients(op: Callable[..., object], backend: str, inputs: list[Tensor]) -> list[Tensor]:
    copies = [x.detach().clone().requires_grad_() for x in inputs]
    out = op(backend, *copies)
    outputs = list(out) if isinstance(out, tuple) else [out]
    weights = [random(*x.shape, dtype=x.dtype, seed=9).detach() for x in outputs]
    kept = [x.detach().clone() for x in outputs]
    return [*kept, *torch.autograd.grad(outputs, copies, weights)]


LOSSES = {"cross_entropy", "cross_entropy in place", "linear_cross_entropy"}
# By torch, an operator that may write in place or that adds a residual compiles what its plain form does.
QUICK = {"triton": CASES.keys() - LOSSES, "torch": {"rms_norm", "swiglu", "rope", "rope_qkv_"}}


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(name, backend, marks=() if name in quick else pytest.mark.slow)
        for backend, quick in QUICK.items()
        for name in CASES
    ],
)
def test_compiles_whole_with_the_gradients_of_the_eager_call(name: str, backend: str) -> None:
    op, inputs = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    expected, found = (outputs_and_gradients(f, backend, inputs) for f in (op, compiled))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
