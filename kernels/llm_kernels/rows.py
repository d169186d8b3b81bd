"""Tensors as rows of contiguous columns, the layout in which kernels that work along the last dim read and write."""

from __future__ import annotations

import torch
from torch import Tensor


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """(x as rows, the distance between two rows in elements).

    The first is ``x`` itself where it is contiguous, since a view costs the host microseconds; else a view, or a copy
    where the strides allow no view with contiguous columns.
    """
    if x.is_contiguous():
        return x, x.size(-1)
    rows = x.reshape(-1, x.size(-1))
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def fresh(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor of x's shape, in x's dtype unless another is given."""
    if x.is_contiguous():
        return torch.empty_like(x, dtype=dtype)
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
