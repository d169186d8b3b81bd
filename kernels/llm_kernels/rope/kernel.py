"""Rotary embedding in Triton: queries and keys in one launch, any strides, each element read and written once.

    half rotation (Llama): pairs (i, i + d/2); interleaved (GPT-J): pairs (2i, 2i + 1)
    (a, b) → (a cos - b sin, b cos + a sin); backward is the inverse, with -sin instead of sin

d is the number of dims of a head that rotate; the dims after them are left unchanged (partial rotary embedding).

A program rotates all heads of one token, so its row of the table (fp32 [d/2] twice) is read once. Inputs are fp32, bf16
or fp16, computed in fp32; nothing is saved for backward. Bytes for a token with H heads, queries and keys together, and
an element size of e: 2eHd + 4d + 4.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 4
# Cosine and sine fp32 [positions, d/2]; the tokens' positions or None; with None, the position of token 0.
Table = tuple[Tensor, Tensor, Tensor | None, int]


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
    REST: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Rotates all heads of one token. With GROUP > 0 every GROUP-th head is a value and is left unchanged. REST: number
    of dims after the rotated ones, which are copied (0 in place)."""
    for start in range(0, HEADS, BLOCK_H):
        heads = start + tl.arange(0, BLOCK_H)
        rotated = heads < HEADS
        if GROUP > 0:
            rotated = rotated & (heads % GROUP < GROUP - 1)
        wide = heads.to(tl.int64)[:, None]  # strides of heads are large where heads come first in memory
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
        if REST > 0:
            dims = tl.arange(0, BLOCK_R)
            mask = rotated[:, None] & (dims < REST)[None, :]
            x = tl.load(x_ptr + wide * x_head_stride + 2 * HALF + dims[None, :], mask=mask, other=0.0)
            tl.store(y_ptr + wide * y_head_stride + 2 * HALF + dims[None, :], x, mask=mask)


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
    REST: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
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
        q_head_stride, q_out_head_stride, cos, sin, Q_HEADS, GROUP, HALF, REST, BLOCK_H, BLOCK_D, BLOCK_R,
        INTERLEAVED,
    )  # fmt: skip
    if K_HEADS > 0:
        _rotate_heads(
            k_ptr + token * k_token_stride + row * k_row_stride,
            k_out_ptr + token * k_out_token_stride + row * k_out_row_stride,
            k_head_stride, k_out_head_stride, cos, sin, K_HEADS, 0, HALF, REST, BLOCK_H, BLOCK_D, BLOCK_R,
            INTERLEAVED,
        )  # fmt: skip


def block_heads(heads: int, half: int) -> int:
    """Heads of a tile: 1024 pairs, which is eight per thread, or fewer if there are fewer heads."""
    return min(triton.next_power_of_2(heads), max(1, 1024 // triton.next_power_of_2(half)))


# Cached by shape: next_power_of_2 alone costs the host as much time as an allocation.
@lru_cache(maxsize=1024)
def _constants(heads: tuple[int, int], group: int, half: int, rest: int, flags: tuple[bool, bool]) -> dict[str, Any]:
    return {
        "Q_HEADS": heads[0],
        "K_HEADS": heads[1],
        "GROUP": group,
        "HALF": half,
        "REST": rest,
        "BLOCK_H": block_heads(heads[0], half),
        "BLOCK_D": triton.next_power_of_2(half),
        "BLOCK_R": triton.next_power_of_2(max(rest, 1)),
        "INTERLEAVED": flags[0],
        "INVERSE": flags[1],
        "num_warps": NUM_WARPS,
    }


def _position_strides(positions: Tensor | None) -> tuple[int, int]:
    if positions is None:
        return 0, 0
    return positions.stride(0), positions.stride(1) if positions.ndim > 1 else 0


def rotate(q: Tensor, k: Tensor, out: tuple[Tensor, Tensor], table: Table, flags: tuple[bool, bool]) -> None:
    """Rotates q [s, b, h, d] and k [s, b, g, d], d contiguous, into ``out``, tensors of the same shapes. flags:
    interleaved, inverse."""
    tokens, rows, heads, dim = q.shape
    if not q.numel():
        return
    cos, sin, positions, offset = table
    half = cos.size(1)
    _rope_kernel[(tokens, rows)](
        q,
        k,
        *out,
        cos.contiguous(),
        sin.contiguous(),
        positions,
        offset,
        *q.stride()[:3],
        *k.stride()[:3],
        *out[0].stride()[:3],
        *out[1].stride()[:3],
        *_position_strides(positions),
        **_constants((heads, k.size(2)), 0, half, dim - 2 * half, flags),
    )


def rotate_packed_(qkv: Tensor, table: Table, group: int, head_dim: int, flags: tuple[bool, bool]) -> None:
    """Rotates qkv [s, b, heads * head_dim] in place, but for every ``group``-th head, which is a value. flags:
    interleaved, inverse."""
    tokens, rows, width = qkv.shape
    if not qkv.numel():
        return
    cos, sin, positions, offset = table
    strides = qkv.stride(0), qkv.stride(1), head_dim
    _rope_kernel[(tokens, rows)](
        qkv,
        qkv,
        qkv,
        qkv,
        cos.contiguous(),
        sin.contiguous(),
        positions,
        offset,
        *strides,
        *strides,
        *strides,
        *strides,
        *_position_strides(positions),
        **_constants((width // head_dim, 0), group, cos.size(1), 0, flags),
    )
