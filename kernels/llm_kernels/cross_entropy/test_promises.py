"""What the losses promise beside right numbers: second derivatives are refused, autograd notices writes in place, they
compile into one graph, and offsets have 64 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llm_kernels.cross_entropy.op import cross_entropy
from llm_kernels.linear_cross_entropy.op import linear_cross_entropy, weighted_linear_cross_entropy
from llm_kernels.testing import default_device, far_apart, random

pytest.importorskip("triton", reason="the kernels need triton")
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's, of the interpreter

LABELS = torch.tensor([3, -100, 0], device=default_device())
KNOWN = torch.tensor([0.5, 0.25, 0.25], device=default_device())
TERMS = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0}


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return random(*shape, dtype=torch.float32, seed=seed)


def weighted(backend: str, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    options = {"bias": bias, "backend": backend, **TERMS}
    return weighted_linear_cross_entropy(hidden, weight, LABELS, KNOWN, **options)[0]  # type: ignore[arg-type]


def recomputing(backend: str, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    options = {"bias": bias, "backend": backend, "chunk_tokens": 2, **TERMS}
    return linear_cross_entropy(hidden, weight, LABELS, **options)  # type: ignore[arg-type]


def unfused(backend: str, x: Tensor) -> Tensor:
    return cross_entropy(x, LABELS, backend=backend, **TERMS)  # type: ignore[return-value,arg-type]


def inplace(backend: str, x: Tensor) -> Tensor:
    return cross_entropy(x * 1.5, LABELS, inplace_backward=True, backend=backend, **TERMS)  # type: ignore


Case = tuple[Callable[..., Tensor], list[tuple[int, ...]]]
CASES: dict[str, Case] = {
    "cross_entropy": (unfused, [(3, 9)]),
    "cross_entropy in place": (inplace, [(3, 9)]),
    "linear_cross_entropy": (recomputing, [(3, 8), (9, 8), (9,)]),
    "weighted_linear_cross_entropy": (weighted, [(3, 8), (9, 8), (9,)]),
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_refused(name: str, backend: str) -> None:
    """Also where the gradient depends on what it would be differentiated by through the operator's inputs alone."""
    op, shapes = CASES[name]
    inputs = [leaf(*shape, seed=i) for i, shape in enumerate(shapes)]
    squares = [x * x for x in inputs]
    with pytest.raises(RuntimeError, match=r"has no second derivative|can be differentiated once only"):
        gradients = torch.autograd.grad(op(backend, *squares).sum(), inputs, create_graph=True)
        torch.autograd.grad(sum(x.sum() for x in gradients), inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_compiles_whole(name: str, backend: str) -> None:
    op, shapes = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    results = []
    for run in (op, compiled):
        inputs = [leaf(*shape, seed=i) for i, shape in enumerate(shapes)]
        out = run(backend, *inputs)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), inputs)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("which", ["recomputing", "weighted"])
def test_compiles_whole_where_the_weights_gradient_is_added_up(which: str) -> None:
    hidden, weight = leaf(3, 8), leaf(9, 8, seed=1)

    def loss(hidden: Tensor, weight: Tensor, into: Tensor) -> Tensor:
        if which == "weighted":
            return weighted_linear_cross_entropy(hidden, weight, LABELS, KNOWN, weight_grad=into, backend="triton")[0]
        return (linear_cross_entropy(hidden, weight, LABELS, weight_grad=into, backend="triton") * KNOWN).sum()

    torch._dynamo.reset()
    results = []
    for run in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        into = torch.ones_like(weight, requires_grad=False)
        for _ in range(2):
            hidden.grad = None
            run(hidden, weight, into).backward()
        assert hidden.grad is not None and weight.grad is None and (into - 1).abs().max() > 1e-3
        results.append((into, hidden.grad))
    for found, wanted in zip(*results):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_what_may_not_be_written_over_is_refused() -> None:
    parameter, labels = leaf(4, 9), torch.zeros(3, dtype=torch.int64, device=default_device())
    for logits, message in (
        (leaf(3, 9), "leaf that requires a gradient"),
        (parameter[:3], "view of a leaf"),
        ((leaf(9, 3) * 1).t(), "contiguous"),
        ((leaf(1, 9) * 1).expand(3, 9), "share memory"),
    ):
        with pytest.raises(ValueError, match=message):
            cross_entropy(logits, labels, inplace_backward=True, backend="triton")
    hidden, weight = leaf(3, 4), leaf(9, 4, seed=1)
    with pytest.raises(ValueError, match=r"weight_grad .* must not require a gradient"):
        linear_cross_entropy(hidden, weight, labels, weight_grad=torch.zeros_like(weight).requires_grad_())


@pytest.mark.parametrize("op", [linear_cross_entropy, weighted_linear_cross_entropy])
def test_adding_to_the_weights_gradient_is_noticed(op: Callable[..., Tensor]) -> None:
    hidden, weight, scale = leaf(3, 8), leaf(9, 8, seed=1), leaf(9, 8, seed=2)
    into = torch.zeros_like(weight, requires_grad=False)
    kept = (scale * into).sum()
    known = (KNOWN,) if op is weighted_linear_cross_entropy else ()
    out = op(hidden, weight, LABELS, *known, weight_grad=into, backend="triton")
    (out[0] if known else out.sum()).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@pytest.mark.parametrize("name", CASES)
def test_fp64_is_the_references(name: str) -> None:
    op, shapes = CASES[name]
    inputs = [leaf(*shape, seed=i).detach().double().requires_grad_() for i, shape in enumerate(shapes)]
    out = op("auto", *inputs)
    wanted = op("torch", *inputs)
    assert torch.equal(out, wanted) and (name == "weighted_linear_cross_entropy" or out.dtype == torch.float64)
    with pytest.raises(ValueError, match=r"float32, bfloat16 and float16, not torch\.float64"):
        op("triton", *inputs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a sparse file stands for memory where no GPU has to hold it")
def test_rows_that_lie_two_thousand_million_elements_apart(tmp_path: Path) -> None:
    logits = far_apart((3, 40), (2**30 + 8, 1), torch.bfloat16, tmp_path).requires_grad_()
    packed, labels = logits.detach().clone().requires_grad_(), LABELS.cpu()
    results = []
    for x in (logits, packed):
        losses = cross_entropy(x, labels, label_smoothing=0.1, backend="triton")
        results.append((losses.detach(), torch.autograd.grad(losses.sum(), x)[0]))  # type: ignore[union-attr]
    assert all(torch.equal(found, wanted) for found, wanted in zip(*results))
