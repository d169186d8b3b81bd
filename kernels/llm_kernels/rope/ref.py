"""Rotary position embedding in plain torch (Su et al. 2021, arXiv 2104.09864), half-rotation as in Llama."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llm_kernels.rope.table import RopeTable


def inverse_frequencies(
    head_dim: int,
    base: float,
    scaling: tuple[float, float, float, int] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The angle by which each pair of dims rotates per position, fp32 [head_dim / 2].

    scaling: (factor, low_freq_factor, high_freq_factor, original_max_position) of Llama 3.1 (arXiv 2407.21783): long
    wavelengths are stretched by ``factor``, short ones are unchanged, and those between are interpolated.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float().to(device) / head_dim
    frequencies = 1.0 / (base**exponents)
    if scaling is None:
        return frequencies
    factor, low, high, original = scaling
    wavelengths = 2 * math.pi / frequencies
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / factor + smooth * frequencies


def cos_sin(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle: positions [...] of integers, frequencies [d/2] → two fp32 [..., d]."""
    angles = positions.float().unsqueeze(-1) * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


class _Rotate(torch.autograd.Function):
    """A rotation, whose backward is the rotation by the opposite angle; only the tables are saved."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, heads_first=True)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, heads_first: bool = False) -> Tensor:
    half = x.shape[-1] // 2
    wide = x if x.dtype == torch.float64 else x.float()
    if heads_first:  # [b, heads, s, d] in memory, the order in which torch's attention reads fastest
        seq, rows, heads, dim = x.shape
        out = wide.new_empty(rows, heads, seq, dim).permute(2, 0, 1, 3)
    else:
        out = torch.empty_like(wide, memory_format=torch.contiguous_format)
    # Fused multiply-adds into the result: two passes over each half instead of four.
    torch.mul(wide[..., :half], cos[..., :half], out=out[..., :half]).addcmul_(
        wide[..., half:], sin[..., :half], value=-1
    )
    torch.mul(wide[..., half:], cos[..., half:], out=out[..., half:]).addcmul_(wide[..., :half], sin[..., half:])
    return out.to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs of dims (i, i + d/2) of x [s, b, heads, d]. cos, sin: fp32, broadcastable to [s, b, 1, d].
    Computed in fp32 (fp64 for fp64) and returned in x's dtype, in memory ordered as [b, heads, s, d]."""
    if torch.compiler.is_compiling():  # the compiler fuses these operations by itself
        half = x.shape[-1] // 2
        wide = x if x.dtype == torch.float64 else x.float()
        first, second, cos, sin = wide[..., :half], wide[..., half:], cos[..., :half], sin[..., :half]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return _Rotate.apply(x, cos, sin)


def rope_table(x: Tensor, table: RopeTable, interleaved: bool) -> Tensor:
    """``rope`` of x [s, b, heads, d] with a RopeTable; interleaved: pairs are (2i, 2i + 1). Dims beyond those of the
    table are unchanged."""
    rotated = 2 * table.cos.shape[1]
    if rotated < x.shape[-1]:
        return torch.cat((rope_table(x[..., :rotated], table, interleaved), x[..., rotated:]), dim=-1)
    cos, sin = table.full(x.shape[0])
    if not interleaved:
        return rope(x, cos, sin)
    apart = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
    return torch.stack(rope(apart, cos, sin).chunk(2, dim=-1), dim=-1).flatten(-2)


def rotate_by(x: Tensor, table: RopeTable, interleaved: bool, inverse: bool) -> Tensor:
    """``rope_table``, or with ``inverse`` the rotation back."""
    return rope_table(
        x, RopeTable(table.cos, -table.sin, table.token_positions, table.offset) if inverse else table, interleaved
    )
