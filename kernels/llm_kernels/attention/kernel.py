"""Attention forward in Triton (Dao 2023, arXiv 2307.08691): the portable kernel, with tiles for sm_80 and for sm_90.

q: [sq, b, g, m, d] (m query heads of each of g groups), k, v: [sk, b, g, d], any strides with d contiguous; out [sq, b,
g m, d] contiguous; lse fp32 [b, g m, sq]. Inputs are fp32, bf16 or fp16. Scores, weights and sums are fp32; weights are
rounded to v's dtype for the second product. The work is a table of segments int32 [n, 5]: (batch row, q_start, q_end,
k_start, k_end). Formula: ref.explicit, but a query whose largest score is beyond ln 2 * 2^24 = 1.2e7 gets NaN.
A program computes BLOCK_M queries of one head and segment. It loops first over the tiles of keys that all its queries
see whole, then over those that a mask cuts (the edges); it skips tiles that none of its queries sees.
FLOPs: 4 d per visible (query, key) and head. Bytes, at least: q, k, v and out once, 4 per query and head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_kernels.attention.ref import Options, dropout_threshold
from llm_kernels.attention.tiles import Case, Tile, forward_tile

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# From this size on, the maximum of base-2 scores is rounded by more than 1 in the FFMA that computes exp2's argument,
# so weights would be wrong by a factor of two or more. To get them right would cost one more instruction per score.
LOST: tl.constexpr = tl.constexpr(2.0**24)


@triton.jit
def load_rows(base, offsets, rows, limit, cols, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr):
    """Loads a tile of rows. With CHECK, rows from ``limit`` on are zeros; without it, all rows must be below it."""
    if CHECK:
        tile = tl.load(base + offsets, mask=(rows < limit)[:, None] & (cols < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        tile = tl.load(base + offsets)
    else:
        tile = tl.load(base + offsets, mask=(cols < D)[None, :], other=0.0)
    return tile


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """tanh, with EXACT to a few roundings of the result, else with an absolute error of 2^-22 in a third of the
    instructions: 1 / y is computed as rsqrt(y)^2, since a reciprocal root is one instruction and a division four."""
    grown = tl.exp2(x * (2.0 * LOG2E)) + 1.0
    if EXACT:
        # Polynomial near zero (Cephes' tanhf), where 1 - 2 / (e^2x + 1) would cancel.
        z = x * x
        near = -5.70498872745e-3 * z + 2.06390887954e-2
        near = near * z - 5.37397155531e-2
        near = near * z + 1.33314422036e-1
        near = near * z - 3.33332819422e-1
        near = near * z * x + x
        value = tl.where(tl.abs(x) < 0.625, near, 1.0 - 2.0 / grown)
    else:
        root = tl.rsqrt(grown)
        value = 1.0 - 2.0 * (root * root)
    return value


@triton.jit
def keep_tile(
    seed, head, q_start, row, col, threshold, ROWS: tl.constexpr, COLS: tl.constexpr, KEYS_FIRST: tl.constexpr
):
    """ref.dropout_keep for the ROWS x COLS tile at (row, col), which count from the start of the segment. Rows are
    queries and columns are keys, or the other way round with KEYS_FIRST.

    The four random numbers of one Philox call decide for elements that lie 8 rows and 8 columns apart. In the result of
    a tensor-core product one thread holds all four of these, so no number has to move to another thread.
    """
    rows = row // 2 + tl.arange(0, ROWS // 2)[:, None]
    cols = col // 2 + tl.arange(0, COLS // 2)[None, :]
    zero = rows * 0 + cols * 0
    key, query = (rows, cols) if KEYS_FIRST else (cols, rows)
    w0, w1, w2, w3 = tl.philox(seed, key + zero, query + zero, zero + head, zero + q_start, n_rounds=7)
    near, far = (w2, w1) if KEYS_FIRST else (w1, w2)
    left = tl.join(w0.to(tl.int32, bitcast=True) >= threshold, near.to(tl.int32, bitcast=True) >= threshold)
    right = tl.join(far.to(tl.int32, bitcast=True) >= threshold, w3.to(tl.int32, bitcast=True) >= threshold)
    # The last two dims are bit 3 of the column and bit 3 of the row.
    keep = tl.reshape(tl.join(left, right), [ROWS // 16, 8, COLS // 16, 8, 2, 2])
    return tl.reshape(tl.permute(keep, [0, 5, 1, 2, 4, 3]), [ROWS, COLS])


@triton.jit
def in_window(aligned, key, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Whether a key lies at most ``left`` before and ``right`` after ``aligned``, the key that the query is aligned
    with."""
    visible = aligned == aligned
    if RIGHT:
        visible = visible & (key <= aligned + right)
    if LEFT:
        visible = visible & (key >= aligned - left)
    return visible


@triton.jit
def num_tiles(ranges, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """Number of tiles in ``ranges`` (see key_range): of those at edges, or of those that are seen whole."""
    low, inner, outer, high = ranges
    if EDGE:
        number = tl.cdiv(inner - low, BLOCK) + tl.cdiv(tl.maximum(high - outer, 0), BLOCK)
    else:
        number = (outer - inner) // BLOCK
    return number


@triton.jit
def tile_start(index, ranges, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """First position of tile ``index``. One loop serves both edges, as a second loop costs registers in all others."""
    low, inner, outer, _ = ranges
    if EDGE:
        before = low + index * BLOCK
        start = tl.where(before < inner, before, before - inner + outer)
    else:
        start = inner + index * BLOCK
    return start


@triton.jit
def _attend(
    acc,
    row_sum,
    row_max,
    q,
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
    """Online softmax over the tiles of keys at edges (EDGE), or over those that every query sees whole."""
    # fp32 as three tf32 products is right to about 2^-21; exact fp32 products would spill kilobytes of registers.
    PRECISION: tl.constexpr = "tf32x3" if q.dtype == tl.float32 else "ieee"
    cols = tl.arange(0, BLOCK_D)
    # exp2(s c - m c), with c = scale log2(e): scaling the scores costs no instruction of its own.
    factor = (softcap if SOFTCAP else scale) * LOG2E
    for i in tl.range(0, num_tiles(ranges, BLOCK_N, EDGE)):
        n = tile_start(i, ranges, BLOCK_N, EDGE)
        keys = n + tl.arange(0, BLOCK_N)
        k = load_rows(k_base + n * k_step, k_offsets, keys, len_k, cols, D, BLOCK_D, EDGE)
        s = tl.dot(q, k.T, input_precision=PRECISION)
        if SOFTCAP:
            s = tanh(s * (scale / softcap), SOFTCAP == 2)
        if EDGE:
            visible = in_window(aligned[:, None], keys[None, :], left, right, LEFT, RIGHT) & (keys < len_k)[None, :]
            s = tl.where(visible, s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1) * factor)
        # A query that has seen no key so far has a maximum of -inf, and -inf - -inf would be NaN.
        base = tl.where(new_max == float("-inf"), 0.0, new_max) if EDGE else new_max
        p = tl.exp2(s * factor - base[:, None])
        alpha = tl.exp2(row_max - base)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(keep_tile(seed, head, q_start, first, n, threshold, q.shape[0], BLOCK_N, False), p, 0.0)
        v = load_rows(v_base + n * v_step, v_offsets, keys, len_k, cols, D, BLOCK_D, EDGE)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit
def key_range(first, last, shift, len_k, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_N: tl.constexpr):
    """(low, inner, outer, high) of the keys for queries first..last of a segment: every query sees all of [inner,
    outer); [low, inner) and [outer, high) are the edges, which some queries see in part."""
    low = 0
    whole_low = 0
    high = len_k
    whole_high = len_k
    if LEFT:
        low = tl.maximum(first + shift - left, 0) // BLOCK_N * BLOCK_N
        whole_low = tl.cdiv(tl.maximum(last + shift - left, 0), BLOCK_N) * BLOCK_N
    if RIGHT:
        high = tl.maximum(tl.minimum(len_k, last + shift + right + 1), 0)
        whole_high = tl.maximum(tl.minimum(len_k, first + shift + right + 1), 0)
    inner = tl.minimum(whole_low, tl.cdiv(high, BLOCK_N) * BLOCK_N)
    outer = tl.maximum(whole_high // BLOCK_N * BLOCK_N, inner)
    return low, inner, outer, high


@triton.jit(do_not_specialize=["seed", "threshold"])
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
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
    out_row_stride,
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
    # Heads vary fastest, so that the heads of a group read the same keys from L2. The last queries, which see the most
    # keys under a causal mask, start first.
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
    out_step = tl.cast(out_row_stride, tl.int64)
    q_base = q_ptr + batch * q_batch_stride + group * q_group_stride + member * q_head_stride
    q_base += (q_start + first) * q_step
    k_base = k_ptr + batch * k_batch_stride + group * k_group_stride + k_start * k_step
    v_base = v_ptr + batch * v_batch_stride + group * v_group_stride + k_start * v_step
    cols = tl.arange(0, BLOCK_D)
    lanes = tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    q = load_rows(q_base, rows[:, None] * q_step + cols[None, :], rows, len_q - first, cols, D, BLOCK_D, True)
    k_offsets = lanes[:, None] * k_step + cols[None, :]
    v_offsets = lanes[:, None] * v_step + cols[None, :]
    shift = len_k - len_q
    last = tl.minimum(first + BLOCK_M, len_q) - 1
    ranges = key_range(first, last, shift, len_k, left, right, LEFT, RIGHT, BLOCK_N)
    aligned = first + rows + shift
    query = q_start + first + rows
    head = (batch * H + h).to(tl.int32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q, k_base, v_base, k_offsets, v_offsets, k_step, v_step, ranges, aligned, len_k, left,
        right, scale, softcap, seed, head, q_start, first, threshold, D, BLOCK_D, BLOCK_N, LEFT, RIGHT, SOFTCAP,
        DROPOUT, False,
    )  # fmt: skip
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q, k_base, v_base, k_offsets, v_offsets, k_step, v_step, ranges, aligned, len_k, left,
        right, scale, softcap, seed, head, q_start, first, threshold, D, BLOCK_D, BLOCK_N, LEFT, RIGHT, SOFTCAP,
        DROPOUT, True,
    )  # fmt: skip
    # From LOST on, weights could be wrong by a factor of two or more: the result is NaN instead.
    row_sum = tl.where((tl.abs(row_max) >= LOST) & (row_max != float("-inf")), float("nan"), row_sum)
    nothing = row_sum == 0.0
    row_sum = tl.where(nothing, 1.0, row_sum)
    lse = tl.where(nothing, float("-inf"), (row_max + tl.log2(row_sum)) * LN2)
    acc = acc * ((keep_scale if DROPOUT else 1.0) / row_sum)[:, None]
    valid = rows < len_q - first
    tl.store(lse_ptr + (batch * H + h) * SQ + query, lse, mask=valid)
    out_base = out_ptr + (q_start + first) * out_step + (batch * H + h) * D
    at = out_base + rows[:, None] * out_step + cols[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (cols < D)[None, :])


def padded(d: int) -> int:
    """Columns of a tile for head dim ``d``: a power of two, and at least 16 for the tensor core."""
    return max(16, triton.next_power_of_2(d))


@lru_cache(maxsize=256)
def settings(
    tile_of: Callable[[Case], Tile], options: Options, d: int, element_size: int, m: int, arch: int
) -> tuple[Tile, dict[str, object]]:
    """The tile of a kernel, and those of its arguments that depend on neither the tensors nor the seed. They are cached
    because computing them takes longer than the microseconds between launches. ``options`` come from without_seed,
    ``m`` is the number of query heads of a group.

    SOFTCAP is 1 where tanh to 2^-22 is enough: its error times the cap is then below half a rounding of fp16.
    """
    softcap, dropout = options.softcap > 0, options.dropout_p > 0
    tile = tile_of(Case(arch, d, element_size, softcap, dropout, options.right == 0))
    exact = element_size == 4 or options.softcap > 512
    return tile, {
        "scale": options.scale,
        "left": max(options.left, 0),
        "right": max(options.right, 0),
        "softcap": options.softcap,
        "keep_scale": 1.0 / (1.0 - options.dropout_p),
        "threshold": dropout_threshold(options.dropout_p),
        "GROUP": m,
        "D": d,
        "BLOCK_D": padded(d),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "LEFT": options.left >= 0,
        "RIGHT": options.right >= 0,
        "SOFTCAP": (2 if exact else 1) if softcap else 0,
        "DROPOUT": dropout,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def without_seed(options: Options) -> Options:
    """The options with seed 0, since ``settings`` are the same for every seed."""
    return options._replace(seed=0) if options.seed else options


def forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, max_q: int, covers_queries: bool, options: Options, arch: int
) -> tuple[Tensor, Tensor]:
    """q: [sq, b, g, m, d]; k, v: [sk, b, g, d] → (out [sq, b, g m, d], lse fp32 [b, g m, sq])."""
    sq, b, groups, m, d = q.shape
    h = groups * m
    new = torch.empty if covers_queries else torch.zeros
    out = new(sq, b, h, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, sq, dtype=torch.float32, device=q.device)
    if not covers_queries:
        lse.fill_(-torch.inf)
    tile, fixed = settings(forward_tile, without_seed(options), d, q.element_size(), m, arch)
    grid = (h * len(table), triton.cdiv(max_q, tile.block_m))
    if 0 in grid or 0 in out.shape:
        return out, lse
    _attention_fwd_kernel[grid](
        q, k, v, out, lse, table, *q.stride()[:4], *k.stride()[:3], *v.stride()[:3], b * h * d, h, sq,
        seed=options.seed, **fixed,
    )  # fmt: skip
    return out, lse
