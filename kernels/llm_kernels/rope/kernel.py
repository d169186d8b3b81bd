"""Rotary embedding in Triton: queries and keys in one launch, from any strides, each element read and written once.

    half rotation (Llama): pairs (i, i + d/2); interleaved (GPT-J): pairs (2i, 2i + 1)
    (a, b) → (a cos - b sin, b cos + a sin); the inverse, which is backward, has -sin

A program takes one token: its table row (fp32 [d/2] twice) is read once and serves all of its heads. fp32, bf16 or
fp16, computed in fp32; nothing is saved for backward. Bytes of a token with H heads of both kinds, e being the element
size: 2eHd + 4d + 4.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from llm_kernels.rope.table import RopeTable

NUM_WARPS = 4


@triton.jit
def _rotate_heads(
    x_ptr,
    y_ptr,
    x_head_stride,
    y_head_stride,
    cos,
    sin,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """All heads of one token; with GROUP > 0 every GROUP-th is a value and stays."""
    for start in range(0, HEADS, BLOCK_H):
        heads = start + tl.arange(0, BLOCK_H)
        rotated = heads < HEADS
        if GROUP > 0:
            rotated = rotated & (heads % GROUP < GROUP - 1)
        wide = heads.to(tl.int64)[:, None]  # a head's stride spans the sequence where heads come first in memory
        if INTERLEAVED:
            dims = tl.arange(0, 2 * BLOCK_D)
            mask = rotated[:, None] & (dims < 2 * HALF)[None, :]
            x = tl.load(x_ptr + wide * x_head_stride + dims[None, :], mask=mask, other=0.0).to(tl.float32)
            first, second = tl.split(tl.reshape(x, [BLOCK_H, BLOCK_D, 2]))
            y = tl.join(first * cos - second * sin, second * cos + first * sin)
            y = tl.reshape(y, [BLOCK_H, 2 * BLOCK_D]).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + wide * y_head_stride + dims[None, :], y, mask=mask)
        else:
            dims = tl.arange(0, BLOCK_D)
            mask = rotated[:, None] & (dims < HALF)[None, :]
            at = x_ptr + wide * x_head_stride + dims[None, :]
            first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            second = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
            out = y_ptr + wide * y_head_stride + dims[None, :]
            tl.store(out, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=mask)
            tl.store(out + HALF, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    offset,
    q_token_stride,
    q_row_stride,
    q_head_stride,
    k_token_stride,
    k_row_stride,
    k_head_stride,
    q_out_token_stride,
    q_out_row_stride,
    q_out_head_stride,
    k_out_token_stride,
    k_out_row_stride,
    k_out_head_stride,
    positions_token_stride,
    positions_row_stride,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    if positions_ptr is None:
        position = token + offset
    else:
        position = tl.load(positions_ptr + token * positions_token_stride + row * positions_row_stride).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    cos = tl.load(cos_ptr + position * HALF + dims, mask=dims < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * HALF + dims, mask=dims < HALF, other=0.0)[None, :]
    if INVERSE:
        sin = -sin
    _rotate_heads(
        q_ptr + token * q_token_stride + row * q_row_stride,
        q_out_ptr + token * q_out_token_stride + row * q_out_row_stride,
        q_head_stride, q_out_head_stride, cos, sin, Q_HEADS, GROUP, HALF, BLOCK_H, BLOCK_D, INTERLEAVED,
    )  # fmt: skip
    if K_HEADS > 0:
        _rotate_heads(
            k_ptr + token * k_token_stride + row * k_row_stride,
            k_out_ptr + token * k_out_token_stride + row * k_out_row_stride,
            k_head_stride, k_out_head_stride, cos, sin, K_HEADS, 0, HALF, BLOCK_H, BLOCK_D, INTERLEAVED,
        )  # fmt: skip


def block_heads(heads: int, half: int) -> int:
    """Heads of a tile: 1024 pairs, eight to a thread, or fewer where there are not so many heads."""
    return min(triton.next_power_of_2(heads), max(1, 1024 // triton.next_power_of_2(half)))


def rotate(
    q: Tensor,
    k: Tensor | None,
    out: tuple[Tensor, Tensor | None],
    table: RopeTable,
    group: int,
    flags: tuple[bool, bool],
) -> None:
    """q [s, b, h, d] and k [s, b, g, d] or None into ``out`` of the same shapes, which may be q and k themselves.

    group: with k None, q is packed and every ``group``-th head is a value that stays; 0 where all heads rotate. flags:
    interleaved, inverse.
    """
    tokens, rows, heads, dim = q.shape
    if not q.numel():
        return
    positions = table.token_positions
    position_strides = (
        (0, 0) if positions is None else (positions.stride(0), positions.stride(1) if positions.ndim > 1 else 0)
    )
    other, other_out = (q, out[0]) if k is None else (k, out[1])
    assert other_out is not None
    half = dim // 2
    _rope_kernel[(tokens, rows)](
        q,
        other,
        out[0],
        other_out,
        table.cos,
        table.sin,
        positions,
        table.offset,
        *q.stride()[:3],
        *other.stride()[:3],
        *out[0].stride()[:3],
        *other_out.stride()[:3],
        *position_strides,
        Q_HEADS=heads,
        K_HEADS=0 if k is None else k.shape[2],
        GROUP=group,
        HALF=half,
        BLOCK_H=block_heads(heads, half),
        BLOCK_D=triton.next_power_of_2(half),
        INTERLEAVED=flags[0],
        INVERSE=flags[1],
        num_warps=NUM_WARPS,
    )
