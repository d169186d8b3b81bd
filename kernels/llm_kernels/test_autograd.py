"""Autograd and the operators: second derivatives are right or refused, and autograd notices writes in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton")

from llm_kernels.rms_norm.op import add_rms_norm, rms_norm
from llm_kernels.rope.op import rope, rope_qkv_
from llm_kernels.rope.ref import inverse_frequencies
from llm_kernels.rope.table import RopeTable
from llm_kernels.swiglu.op import swiglu
from llm_kernels.testing import default_device, random

TABLE = RopeTable.make(inverse_frequencies(8, 10000.0, device=default_device()), 4)
BACKENDS = ["triton", "torch"]


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return random(*shape, dtype=torch.float32, seed=seed)


REFUSING: dict[str, tuple[Callable[[str, Tensor], Tensor], tuple[int, ...]]] = {
    "rms_norm": (lambda b, x: rms_norm(x, x[0] + 1.0, 1e-5, backend=b), (3, 8)),
    "rms_norm, frozen weight": (lambda b, x: rms_norm(x, torch.ones_like(x[0]), 1e-5, backend=b), (3, 8)),
    "add_rms_norm": (lambda b, x: add_rms_norm(x, x, x[0] + 1.0, 1e-5, backend=b)[0], (3, 8)),
    "swiglu": (lambda b, x: swiglu(x, backend=b), (3, 8)),
    "swiglu in place": (lambda b, x: swiglu(x * 1.5, inplace_backward=True, backend=b), (3, 8)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REFUSING)
def test_second_derivatives_are_refused(name: str, backend: str) -> None:
    op, shape = REFUSING[name]
    x = leaf(*shape)
    y = op(backend, x)
    # Ones, as from sum().backward(): the gradient depends on x through the operator's own inputs alone.
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    assert gradient.requires_grad
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(gradient.square().sum(), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_refusing_keeps_the_first_derivative(backend: str) -> None:
    x, weight = leaf(3, 8), leaf(8, seed=1)
    expected = torch.autograd.grad(rms_norm(x, weight, 1e-5, backend=backend).square().sum(), (x, weight))
    found = torch.autograd.grad(
        rms_norm(x, weight, 1e-5, backend=backend).square().sum(), (x, weight), create_graph=True
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True], ids=["rope", "rope_qkv_"])
def test_second_derivatives_of_a_rotation_are_right(packed: bool, backend: str) -> None:
    """A rotation preserves lengths: |rotate(x^3)|^2 is |x^3|^2, whose Hessian times a vector of ones is 30 x^4."""
    x = leaf(4, 2, 3 * 8)

    def turned(x: Tensor) -> Tensor:
        if packed:
            return rope_qkv_(x**3, TABLE, num_groups=1, head_dim=8, backend=backend)
        q = (x**3).view(4, 2, 3, 8)
        return torch.cat([part.flatten() for part in rope(q[:, :, :2], q[:, :, 2:], TABLE, backend=backend)])

    (gradient,) = torch.autograd.grad(turned(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    torch.testing.assert_close(second, 30 * x.detach() ** 4, rtol=1e-5, atol=1e-5)


def test_writing_in_place_is_noticed_by_autograd() -> None:
    """Backward of an operation that saved a tensor which another operator overwrites raises; it must not compute with
    the new numbers."""
    x = leaf(3, 8) * 1.0
    other = F.silu(x)
    swiglu(x, inplace_backward=True, backend="triton").sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rotation_in_place_is_noticed_by_autograd(backend: str) -> None:
    x = leaf(4, 2, 24) * 1.0
    other = F.silu(x)
    before = x._version
    rope_qkv_(x, TABLE, num_groups=1, head_dim=8, backend=backend)
    assert x._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.sum().backward()
    gradient = torch.ones(4, 2, 24, device=x.device)
    version = gradient._version
    y = leaf(4, 2, 24)
    torch.autograd.grad(rope_qkv_(y * 1.0, TABLE, num_groups=1, head_dim=8, backend=backend), y, gradient)
    assert gradient._version > version


@pytest.mark.parametrize("backend", BACKENDS)
def test_leaves_are_not_written_over(backend: str) -> None:
    for x, op in (
        (leaf(3, 8), lambda x: swiglu(x, inplace_backward=True, backend=backend)),
        (leaf(4, 2, 24), lambda x: rope_qkv_(x, TABLE, num_groups=1, head_dim=8, backend=backend)),
    ):
        with pytest.raises(ValueError, match="a leaf that requires a gradient"):
            op(x)
        repeated = x.detach()[:1].expand(x.shape)
        with pytest.raises(ValueError, match="share memory"):
            op(repeated)
