"""What operator tests share: random inputs and errors against fp64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Relative to the largest reference value; about two roundings of the dtype.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Standard normal leaf tensor that wants a gradient."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).requires_grad_()


def assert_matches(op: Callable[..., Tensor], truth: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Output of ``op`` and its gradient of every input match ``truth`` in fp64; inputs stay."""
    before = [x.detach().clone() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = op(*inputs), truth(*exact)
    assert out.shape == expected.shape
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(99))
    (out.float() * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    pairs = [(out, expected), *((x.grad, y.grad) for x, y in zip(inputs, exact))]
    for found, wanted in pairs:
        assert found is not None and wanted is not None
        scale = max(wanted.abs().max().item(), 1.0) if wanted.numel() else 1.0
        error = (found.double() - wanted).abs().max().item() / scale if wanted.numel() else 0.0
        assert error <= TOLERANCE[inputs[0].dtype], error
    assert all(torch.equal(x, old) for x, old in zip(inputs, before))
