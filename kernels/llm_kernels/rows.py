"""Tensors as rows of contiguous columns, the layout in which kernels that work along the last dim read and write."""

from __future__ import annotations

import torch
from torch import Tensor


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """(x, or a copy where its layout allows no view as rows; the distance of two rows in elements).

    Most tensors are contiguous: they are passed on as they are, without the microseconds that a view costs.
    """
    if x.is_contiguous():
        return x, x.size(-1)
    rows = x.reshape(-1, x.size(-1))
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def fresh(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous memory for a result of x's shape, in its dtype or another."""
    if x.is_contiguous():
        return torch.empty_like(x, dtype=dtype)
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
