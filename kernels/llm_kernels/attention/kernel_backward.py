"""Attention backward in Triton: delta, then dk and dv by tiles of keys, then dq by tiles of queries.

Shapes as in kernel.py. Weights are computed again from q, k and lse. With p the weights, D the dropout factor (0 or
1 / (1 - dropout_p)) and delta = sum(dout out) - dlse: dv = (p D)' dout, dp = D (dout v'), ds = p (dp - delta) times
1 - tanh^2 under a soft cap, dk = scale ds' q, dq = scale ds k. One program sums every element in a fixed order, so
gradients are bitwise reproducible; the price is 7 products, where a backward that adds to dq atomically needs 5.
FLOPs: 14 d per visible (query, key) and head. Bytes, at least: q, k, v, dout and lse read twice, out once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from llm_kernels.attention.kernel import (
    LOG2E,
    in_window,
    keep_tile,
    key_range,
    load_rows,
    num_tiles,
    settings,
    tanh,
    tile_start,
    without_seed,
)
from llm_kernels.attention.ref import Options
from llm_kernels.attention.tiles import dkdv_tile, dq_tile


@triton.jit
def _gather_dkdv(
    dk,
    dv,
    k,
    v,
    q_base,
    dout_base,
    lse_base,
    delta_base,
    q_head_stride,
    SQ,
    q_offsets,
    dout_offsets,
    q_step,
    dout_step,
    ranges,
    len_q,
    first,
    keys,
    shift,
    left,
    right,
    scale,
    softcap,
    keep_scale,
    seed,
    head,
    q_start,
    threshold,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Adds to dk and dv the terms of the queries in tiles at edges (EDGE), or in tiles whose queries all see every key
    of the program. Scores are [keys, queries].

    One loop runs over the tiles of all heads of the group. As two nested loops it would spill registers, and the
    pipeline of loads would drain at the end of every head.
    """
    PRECISION: tl.constexpr = "tf32x3" if q_base.dtype.element_ty == tl.float32 else "ieee"
    cols = tl.arange(0, BLOCK_D)
    factor = (softcap if SOFTCAP else scale) * LOG2E
    tiles = num_tiles(ranges, BLOCK_M, EDGE)
    for i in tl.range(0, GROUP * tiles):
        member = (i // tiles).to(tl.int64)
        m = tile_start(i % tiles, ranges, BLOCK_M, EDGE)
        rows = m + tl.arange(0, BLOCK_M)
        q = load_rows(q_base + member * q_head_stride + m * q_step, q_offsets, rows, len_q, cols, D, BLOCK_D, EDGE)
        lse_at = lse_base + member * SQ + rows
        lse = tl.load(lse_at, mask=rows < len_q, other=float("inf")) if EDGE else tl.load(lse_at)
        s = tl.dot(k, q.T, input_precision=PRECISION)
        if SOFTCAP:
            s = tanh(s * (scale / softcap), SOFTCAP == 2)
        p = tl.exp2(s * factor - lse[None, :])
        if EDGE:
            # Queries beyond the segment have weight 0, because their lse is inf; keys beyond it are not stored.
            visible = in_window((rows + shift)[None, :], keys[:, None], left, right, LEFT, RIGHT)
            p = tl.where(visible, p, 0.0)
        dout = load_rows(dout_base + member * D + m * dout_step, dout_offsets, rows, len_q, cols, D, BLOCK_D, EDGE)
        delta_at = delta_base + member * SQ + rows
        delta = tl.load(delta_at, mask=rows < len_q, other=0.0) if EDGE else tl.load(delta_at)
        dp = tl.dot(v, dout.T, input_precision=PRECISION)
        kept = p
        if DROPOUT:
            number = (head + member).to(tl.int32)
            keep = keep_tile(seed, number, q_start, first, m, threshold, k.shape[0], BLOCK_M, True)
            kept = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp, 0.0) * keep_scale
        dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        if SOFTCAP:
            ds = ds * (1.0 - s * s)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def query_range(first, last, shift, len_q, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_M: tl.constexpr):
    """(low, inner, outer, high) of the queries for keys first..last of a segment: all queries of [inner, outer) see
    every key; [low, inner) and [outer, high) are the edges."""
    low = 0
    whole_low = 0
    high = len_q
    whole_high = len_q
    if RIGHT:
        low = tl.maximum(first - shift - right, 0) // BLOCK_M * BLOCK_M
        whole_low = tl.cdiv(tl.maximum(last - shift - right, 0), BLOCK_M) * BLOCK_M
    if LEFT:
        high = tl.maximum(tl.minimum(len_q, last - shift + left + 1), 0)
        whole_high = tl.maximum(tl.minimum(len_q, first - shift + left + 1), 0)
    inner = tl.minimum(whole_low, tl.cdiv(high, BLOCK_M) * BLOCK_M)
    outer = tl.maximum(whole_high // BLOCK_M * BLOCK_M, inner)
    return low, inner, outer, high


@triton.jit(do_not_specialize=["seed", "threshold"])
def _attention_bwd_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    table_ptr,
    q_row_stride,
    q_batch_stride,
    q_group_stride,
    q_head_stride,
    k_row_stride,
    k_batch_stride,
    k_group_stride,
    v_row_stride,
    v_batch_stride,
    v_group_stride,
    dk_row_stride,
    dk_batch_stride,
    dk_group_stride,
    dv_row_stride,
    dv_batch_stride,
    dv_group_stride,
    dout_row_stride,
    G,
    SQ,
    scale,
    left,
    right,
    softcap,
    keep_scale,
    seed,
    threshold,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """dk and dv of BLOCK_N keys of one group; the loop sums over the group's heads, without atomics."""
    group = (tl.program_id(0) % G).to(tl.int64)
    segment = tl.program_id(0) // G
    first = tl.program_id(1) * BLOCK_N  # first keys first: under a causal mask the most queries see them
    batch = tl.load(table_ptr + segment * 5).to(tl.int64)
    q_start = tl.load(table_ptr + segment * 5 + 1)
    len_q = tl.load(table_ptr + segment * 5 + 2) - q_start
    k_start = tl.load(table_ptr + segment * 5 + 3)
    len_k = tl.load(table_ptr + segment * 5 + 4) - k_start
    if first >= len_k:
        return
    q_step = tl.cast(q_row_stride, tl.int64)
    k_step = tl.cast(k_row_stride, tl.int64)
    v_step = tl.cast(v_row_stride, tl.int64)
    dk_step = tl.cast(dk_row_stride, tl.int64)
    dv_step = tl.cast(dv_row_stride, tl.int64)
    dout_step = tl.cast(dout_row_stride, tl.int64)
    cols = tl.arange(0, BLOCK_D)
    lanes = tl.arange(0, BLOCK_N)
    queries = tl.arange(0, BLOCK_M)
    q_offsets = queries[:, None] * q_step + cols[None, :]
    dout_offsets = queries[:, None] * dout_step + cols[None, :]
    key_row = (k_start + first).to(tl.int64)
    k_base = k_ptr + batch * k_batch_stride + group * k_group_stride + key_row * k_step
    v_base = v_ptr + batch * v_batch_stride + group * v_group_stride + key_row * v_step
    left_over = len_k - first
    k = load_rows(k_base, lanes[:, None] * k_step + cols[None, :], lanes, left_over, cols, D, BLOCK_D, True)
    v = load_rows(v_base, lanes[:, None] * v_step + cols[None, :], lanes, left_over, cols, D, BLOCK_D, True)
    shift = len_k - len_q
    last = tl.minimum(first + BLOCK_N, len_k) - 1
    ranges = query_range(first, last, shift, len_q, left, right, LEFT, RIGHT, BLOCK_M)
    keys = first + lanes
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first_head = (batch * G + group) * GROUP
    q_base = q_ptr + batch * q_batch_stride + group * q_group_stride + q_start * q_step
    dout_base = dout_ptr + q_start * dout_step + first_head * D
    lse_base = lse_ptr + first_head * SQ + q_start
    delta_base = delta_ptr + first_head * SQ + q_start
    head = first_head.to(tl.int32)
    dk, dv = _gather_dkdv(
        dk, dv, k, v, q_base, dout_base, lse_base, delta_base, q_head_stride, SQ, q_offsets, dout_offsets, q_step,
        dout_step, ranges, len_q, first, keys, shift, left, right, scale, softcap, keep_scale, seed, head, q_start,
        threshold, GROUP, D, BLOCK_D, BLOCK_M, LEFT, RIGHT, SOFTCAP, DROPOUT, True,
    )  # fmt: skip
    dk, dv = _gather_dkdv(
        dk, dv, k, v, q_base, dout_base, lse_base, delta_base, q_head_stride, SQ, q_offsets, dout_offsets, q_step,
        dout_step, ranges, len_q, first, keys, shift, left, right, scale, softcap, keep_scale, seed, head, q_start,
        threshold, GROUP, D, BLOCK_D, BLOCK_M, LEFT, RIGHT, SOFTCAP, DROPOUT, False,
    )  # fmt: skip
    mask = (lanes < left_over)[:, None] & (cols < D)[None, :]
    dk_base = dk_ptr + batch * dk_batch_stride + group * dk_group_stride + key_row * dk_step
    dv_base = dv_ptr + batch * dv_batch_stride + group * dv_group_stride + key_row * dv_step
    dk = (dk * scale).to(dk_ptr.dtype.element_ty)
    tl.store(dk_base + lanes[:, None] * dk_step + cols[None, :], dk, mask=mask)
    dv = (dv * keep_scale if DROPOUT else dv).to(dv_ptr.dtype.element_ty)
    tl.store(dv_base + lanes[:, None] * dv_step + cols[None, :], dv, mask=mask)


@triton.jit
def _gather_dq(
    dq,
    q,
    dout,
    lse,
    delta,
    k_base,
    v_base,
    k_offsets,
    v_offsets,
    k_step,
    v_step,
    ranges,
    aligned,
    len_k,
    left,
    right,
    scale,
    softcap,
    keep_scale,
    seed,
    head,
    q_start,
    first,
    threshold,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Adds to dq the terms of the keys in tiles at edges (EDGE), or in tiles that every query sees whole."""
    PRECISION: tl.constexpr = "tf32x3" if k_base.dtype.element_ty == tl.float32 else "ieee"
    cols = tl.arange(0, BLOCK_D)
    factor = (softcap if SOFTCAP else scale) * LOG2E
    for i in tl.range(0, num_tiles(ranges, BLOCK_N, EDGE)):
        n = tile_start(i, ranges, BLOCK_N, EDGE)
        keys = n + tl.arange(0, BLOCK_N)
        k = load_rows(k_base + n * k_step, k_offsets, keys, len_k, cols, D, BLOCK_D, EDGE)
        s = tl.dot(q, k.T, input_precision=PRECISION)
        if SOFTCAP:
            s = tanh(s * (scale / softcap), SOFTCAP == 2)
        p = tl.exp2(s * factor - lse[:, None])
        if EDGE:
            visible = in_window(aligned[:, None], keys[None, :], left, right, LEFT, RIGHT) & (keys < len_k)[None, :]
            p = tl.where(visible, p, 0.0)
        v = load_rows(v_base + n * v_step, v_offsets, keys, len_k, cols, D, BLOCK_D, EDGE)
        dp = tl.dot(dout, v.T, input_precision=PRECISION)
        if DROPOUT:
            keep = keep_tile(seed, head, q_start, first, n, threshold, q.shape[0], BLOCK_N, False)
            dp = tl.where(keep, dp, 0.0) * keep_scale
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds = ds * (1.0 - s * s)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["seed", "threshold"])
def _attention_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    table_ptr,
    q_row_stride,
    q_batch_stride,
    q_group_stride,
    q_head_stride,
    k_row_stride,
    k_batch_stride,
    k_group_stride,
    v_row_stride,
    v_batch_stride,
    v_group_stride,
    dq_row_stride,
    dq_batch_stride,
    dq_group_stride,
    dq_head_stride,
    dout_row_stride,
    H,
    SQ,
    scale,
    left,
    right,
    softcap,
    keep_scale,
    seed,
    threshold,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """dq of BLOCK_M queries of one head; programs are in the forward kernel's order."""
    h = tl.program_id(0) % H
    segment = tl.program_id(0) // H
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    batch = tl.load(table_ptr + segment * 5).to(tl.int64)
    q_start = tl.load(table_ptr + segment * 5 + 1)
    len_q = tl.load(table_ptr + segment * 5 + 2) - q_start
    k_start = tl.load(table_ptr + segment * 5 + 3)
    len_k = tl.load(table_ptr + segment * 5 + 4) - k_start
    if first >= len_q:
        return
    group = (h // GROUP).to(tl.int64)
    member = (h % GROUP).to(tl.int64)
    q_step = tl.cast(q_row_stride, tl.int64)
    k_step = tl.cast(k_row_stride, tl.int64)
    v_step = tl.cast(v_row_stride, tl.int64)
    dq_step = tl.cast(dq_row_stride, tl.int64)
    dout_step = tl.cast(dout_row_stride, tl.int64)
    query_row = (q_start + first).to(tl.int64)
    q_base = q_ptr + batch * q_batch_stride + group * q_group_stride + member * q_head_stride
    dout_base = dout_ptr + query_row * dout_step + (batch * H + h) * D
    k_base = k_ptr + batch * k_batch_stride + group * k_group_stride + k_start * k_step
    v_base = v_ptr + batch * v_batch_stride + group * v_group_stride + k_start * v_step
    cols = tl.arange(0, BLOCK_D)
    lanes = tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    left_over = len_q - first
    q_base += query_row * q_step
    q = load_rows(q_base, rows[:, None] * q_step + cols[None, :], rows, left_over, cols, D, BLOCK_D, True)
    dout_offsets = rows[:, None] * dout_step + cols[None, :]
    dout = load_rows(dout_base, dout_offsets, rows, left_over, cols, D, BLOCK_D, True)
    number = (batch * H + h) * SQ + query_row
    lse = tl.load(lse_ptr + number + rows, mask=rows < left_over, other=float("inf"))
    delta = tl.load(delta_ptr + number + rows, mask=rows < left_over, other=0.0)
    shift = len_k - len_q
    last = tl.minimum(first + BLOCK_M, len_q) - 1
    ranges = key_range(first, last, shift, len_k, left, right, LEFT, RIGHT, BLOCK_N)
    aligned = first + rows + shift
    head = (batch * H + h).to(tl.int32)
    k_offsets = lanes[:, None] * k_step + cols[None, :]
    v_offsets = lanes[:, None] * v_step + cols[None, :]
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = _gather_dq(
        dq, q, dout, lse, delta, k_base, v_base, k_offsets, v_offsets, k_step, v_step, ranges, aligned, len_k, left,
        right, scale, softcap, keep_scale, seed, head, q_start, first, threshold, D, BLOCK_D, BLOCK_N, LEFT, RIGHT,
        SOFTCAP, DROPOUT, False,
    )  # fmt: skip
    dq = _gather_dq(
        dq, q, dout, lse, delta, k_base, v_base, k_offsets, v_offsets, k_step, v_step, ranges, aligned, len_k, left,
        right, scale, softcap, keep_scale, seed, head, q_start, first, threshold, D, BLOCK_D, BLOCK_N, LEFT, RIGHT,
        SOFTCAP, DROPOUT, True,
    )  # fmt: skip
    dq_base = dq_ptr + batch * dq_batch_stride + group * dq_group_stride + member * dq_head_stride
    at = dq_base + query_row * dq_step + rows[:, None] * dq_step + cols[None, :]
    tl.store(at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=(rows < left_over)[:, None] & (cols < D)[None, :])


def backward(
    tensors: tuple[Tensor, ...], gradients: tuple[Tensor, Tensor, Tensor], table: Tensor, extents: tuple[int, int],
    options: Options, arch: int,
) -> None:  # fmt: skip
    """Writes dq [sq, b, g, m, d], dk and dv [sk, b, g, d] (``gradients``, any strides with d contiguous).

    ``tensors``: q, k, v as in the forward launcher, dout [sq, b, h, d] contiguous, and what ``kernel_delta.per_row``
    returned. ``extents``: the largest number of queries, and of keys, of any segment.
    """
    q, k, v, dout, lse, delta = tensors
    dq, dk, dv = gradients
    sq, b, groups, m, d = q.shape
    h = groups * m
    kind = (without_seed(options), d, q.element_size(), m, arch)
    inputs = (*q.stride()[:4], *k.stride()[:3], *v.stride()[:3])
    tile, fixed = settings(dkdv_tile, *kind)
    grid = (groups * len(table), triton.cdiv(extents[1], tile.block_n))
    if 0 not in grid:
        _attention_bwd_dkdv_kernel[grid](
            q, k, v, dout, lse, delta, dk, dv, table, *inputs, *dk.stride()[:3], *dv.stride()[:3], b * h * d, groups,
            sq, seed=options.seed, **fixed,
        )  # fmt: skip
    tile, fixed = settings(dq_tile, *kind)
    grid = (h * len(table), triton.cdiv(extents[0], tile.block_m))
    if 0 not in grid:
        _attention_bwd_dq_kernel[grid](
            q, k, v, dout, lse, delta, dq, table, *inputs, *dq.stride()[:4], b * h * d, h, sq, seed=options.seed,
            **fixed,
        )  # fmt: skip
