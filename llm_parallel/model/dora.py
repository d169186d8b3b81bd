"""Magnitudes of weight-decomposed adapters (DoRA; Liu et al. 2024, arXiv 2402.09353, equation 5): row o of an adapted
matrix is m_o · (W + s·B A)_o / |(W + s·B A)_o|, and the magnitude m is trained beside A and B.

The parameter is the difference of m from |W|, so that it begins at 0 and the adapted model at the frozen one, in every
layout and precision. The norm of the sum is a constant for gradients, as in section 4.3 of the paper. It is made from
products of the adapters' width, |W|² + 2s·B·(W Aᵀ) + s²·B (A Aᵀ) Bᵀ, and never from a matrix of the weight's size;
where ranks divide a row, the products are summed over them.

Shapes: O and I rows and columns of the weight on this rank, R rank, K projections with adapters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

ROWS = 4096
"""Rows of a weight whose squares are made at once, in fp64."""


def _values(weight: Any) -> Tensor:
    """The numbers [O, I] of a weight, also of one in few bits."""
    stored = getattr(weight, "stored", None)
    return weight.detach() if stored is None else stored.values(weight.dtype)


def squares_of(weight: Any, group: Any) -> Tensor:
    """fp32 [O]: sums of the squares of rows, of all columns. ``group``: ranks that divide the columns, or None.
    Collective over it."""
    values = _values(weight)
    squares = torch.cat([rows.double().square().sum(1) for rows in values.split(ROWS)])
    if group is not None and group.size() > 1:
        dist.all_reduce(squares, group=group)
    return squares.float()


@torch.no_grad()
def squares_of_sum(weight: Any, squares: Tensor, a: Tensor, wide_b: Tensor, scale: float, group: Any) -> Tensor:
    """fp32 [O]: the same of W + scale · B A, for a [K·R, I] and wide_b [O, K·R]. Collective over the group."""
    width, rows = a.shape[0], wide_b.shape[0]
    products = torch.cat((F.linear(_values(weight), a), a @ a.t())).float()
    if group is not None and group.size() > 1:
        dist.all_reduce(products, group=group)
    cross, own = products.split((rows, width))
    b = wide_b.float()
    return squares + (b * (2 * scale * cross + scale**2 * (b @ own))).sum(1)


def gain(magnitude: Tensor, squares: Tensor, squares_of_sum: Tensor, meets: Tensor | None) -> Tensor:
    """fp32 [O], by which the rows of an adapted product are multiplied; 1 for rows without an adapter (``meets`` says
    which have one, bool [O], None if all) and for rows of zeros."""
    has_one = squares_of_sum > 0
    has_one = has_one if meets is None else has_one & meets
    norm = torch.where(has_one, squares_of_sum, 1.0).sqrt()
    return torch.where(has_one, (squares.sqrt() + magnitude.float()) / norm, 1.0)


def merged(weight: Tensor, delta: Tensor, magnitude: Tensor, meets: Tensor) -> Tensor:
    """fp32 weight [O, I] with an adapter's delta and its magnitudes [O]; ``meets``: bool [O], rows with an adapter."""
    total = weight + delta
    norm = total.norm(dim=1)
    scaled = total * (magnitude / torch.where(norm > 0, norm, 1.0))[:, None]
    return torch.where((meets & (norm > 0))[:, None], scaled, weight)
