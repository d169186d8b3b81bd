"""Attention over a paged cache of keys and values in Triton, split over keys (flash decoding): the online softmax of
Dao 2023 (arXiv 2307.08691) over the pages of Kwon et al. 2023 (arXiv 2309.06180).

q: [t, g, m, d] (m query heads of each of g groups), k, v: [slots, g, d], any strides with d contiguous; out [t, g m, d]
contiguous. Inputs are fp32, bf16 or fp16. Scores, weights and sums are fp32; weights are rounded to v's dtype for the
second product. The tables are those of plan.py. Formula: ref.paged_attention, but a query whose largest score is
beyond ln 2 * 2^24 = 1.2e7 gets NaN, as in attention/kernel.py.
A program takes a tile of rows (queries times query heads of one group) and a range of keys. A row whose keys are
divided over several programs has its sums merged by the second kernel, in the order of the keys.
Bytes, at least: the keys and values of each request once, q and out once.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_kernels.attention.kernel import LOG2E, LOST, padded, tanh
from llm_kernels.paged_attention.tiles import Heads, Tile, large_tile, small_tile

SPLITS = 16
"""Splits that the second kernel loads at once."""


@triton.jit
def page_slots(pages_ptr, n, end, BLOCK_N: tl.constexpr, PAGE: tl.constexpr):
    """Slots in the cache of the keys from ``n`` on; those from ``end`` on are in the first page."""
    if PAGE >= 16 and (PAGE & (PAGE - 1)) == 0:
        WIDTH: tl.constexpr = PAGE if PAGE < BLOCK_N else BLOCK_N
        number = n // PAGE + tl.arange(0, BLOCK_N // WIDTH)
        page = tl.load(pages_ptr + number, mask=number * PAGE < end, other=0).to(tl.int64)
        within = n % PAGE if PAGE > BLOCK_N else 0
        slots = tl.reshape(page[:, None] * PAGE + (within + tl.arange(0, WIDTH))[None, :], [BLOCK_N])
    else:
        keys = n + tl.arange(0, BLOCK_N)
        page = tl.load(pages_ptr + keys // PAGE, mask=keys < end, other=0)
        slots = page.to(tl.int64) * PAGE + keys % PAGE
    return slots


@triton.jit(do_not_specialize=["pages_row_stride", "rows", "left"])
def _paged_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    sums_ptr,
    stats_ptr,
    parts_ptr,
    pages_ptr,
    work_ptr,
    q_row_stride,
    q_group_stride,
    q_head_stride,
    k_row_stride,
    k_group_stride,
    v_row_stride,
    v_group_stride,
    out_row_stride,
    pages_row_stride,
    groups,
    rows,
    scale,
    left,
    softcap,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    LEFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    # Groups vary fastest: their keys of one token lie side by side in memory.
    item = tl.program_id(0) // groups
    group = (tl.program_id(0) % groups).to(tl.int64)
    part = tl.load(work_ptr + item * 5).to(tl.int64)
    if part < 0:
        return
    first = tl.load(work_ptr + item * 5 + 1)
    begin = tl.load(work_ptr + item * 5 + 2)
    end = tl.load(work_ptr + item * 5 + 3)
    slot = tl.load(work_ptr + item * 5 + 4).to(tl.int64)
    q_start = tl.load(parts_ptr + part * 3).to(tl.int64)
    count = tl.load(parts_ptr + part * 3 + 1)
    before = tl.load(parts_ptr + part * 3 + 2) - count
    q_step = tl.cast(q_row_stride, tl.int64)
    head_step = tl.cast(q_head_stride, tl.int64)
    k_step = tl.cast(k_row_stride, tl.int64)
    v_step = tl.cast(v_row_stride, tl.int64)
    out_step = tl.cast(out_row_stride, tl.int64)
    pages_ptr += part * tl.cast(pages_row_stride, tl.int64)

    row = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    query = (first + row) // GROUP
    member = (first + row) % GROUP
    valid = query < count
    inside = valid[:, None] & (cols < D)[None, :]
    q_at = q_ptr + group * q_group_stride + (q_start + query)[:, None] * q_step + member[:, None] * head_step
    q = tl.load(q_at + cols[None, :], mask=inside, other=0.0)
    k_base = k_ptr + group * k_group_stride + cols[None, :]
    v_base = v_ptr + group * v_group_stride + cols[None, :]
    aligned = before + query
    if LEFT:
        lowest = tl.maximum(before + first // GROUP - left, 0) // BLOCK_N * BLOCK_N
        begin = tl.maximum(begin, lowest)

    PRECISION: tl.constexpr = "tf32x3" if q.dtype == tl.float32 else "ieee"
    factor = (softcap if SOFTCAP else scale) * LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for n in tl.range(begin, end, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        slots = page_slots(pages_ptr, n, end, BLOCK_N, PAGE)
        # Keys from ``end`` on are not loaded: their values may be NaN, which a weight of 0 would not hide.
        held = (keys < end)[:, None]
        if D != BLOCK_D:
            held = held & (cols < D)[None, :]
        k = tl.load(k_base + slots[:, None] * k_step, mask=held, other=0.0)
        s = tl.dot(q, k.T, input_precision=PRECISION)
        if SOFTCAP:
            s = tanh(s * (scale / softcap), SOFTCAP == 2)
        visible = (keys[None, :] <= aligned[:, None]) & (keys < end)[None, :]
        if LEFT:
            visible = visible & (keys[None, :] >= aligned[:, None] - left)
        s = tl.where(visible, s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1) * factor)
        # A query that has seen no key so far has a maximum of -inf, and -inf - -inf would be NaN.
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(s * factor - base[:, None])
        alpha = tl.exp2(row_max - base)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        v = tl.load(v_base + slots[:, None] * v_step, mask=held, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        row_max = new_max

    if slot < 0:
        row_sum = tl.where((tl.abs(row_max) >= LOST) & (row_max != float("-inf")), float("nan"), row_sum)
        acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
        head = group * GROUP + member
        out_at = out_ptr + (q_start + query)[:, None] * out_step + (head * D)[:, None] + cols[None, :]
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        line = (slot * groups + group) * rows + row
        tl.store(stats_ptr + line * 2, row_max, mask=valid)
        tl.store(stats_ptr + line * 2 + 1, row_sum, mask=valid)
        seen = inside & (row_max > float("-inf"))[:, None]
        tl.store(sums_ptr + line[:, None] * D + cols[None, :], acc, mask=seen)


@triton.jit(do_not_specialize=["rows"])
def _merge_kernel(
    sums_ptr,
    stats_ptr,
    out_ptr,
    parts_ptr,
    merges_ptr,
    out_row_stride,
    groups,
    rows,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One row of one group: its sums over all splits of its keys."""
    item = tl.program_id(0) // groups
    group = (tl.program_id(0) % groups).to(tl.int64)
    row = tl.program_id(1)
    part = tl.load(merges_ptr + item * 4).to(tl.int64)
    if part < 0:
        return
    first = tl.load(merges_ptr + item * 4 + 1)
    query = (first + row) // GROUP
    member = (first + row) % GROUP
    if query >= tl.load(parts_ptr + part * 3 + 1):
        return
    start = tl.load(merges_ptr + item * 4 + 2).to(tl.int64)
    splits = tl.load(merges_ptr + item * 4 + 3)
    cols = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    total = 0.0
    highest = float("-inf")
    for n in tl.range(0, splits, BLOCK_S):
        split = n + tl.arange(0, BLOCK_S)
        line = ((start + split) * groups + group) * rows + row
        maximum = tl.load(stats_ptr + line * 2, mask=split < splits, other=float("-inf"))
        part_sum = tl.load(stats_ptr + line * 2 + 1, mask=split < splits, other=0.0)
        seen = maximum > float("-inf")
        sums = tl.load(
            sums_ptr + line[:, None] * D + cols[None, :], mask=seen[:, None] & (cols < D)[None, :], other=0.0
        )
        new = tl.maximum(highest, tl.max(maximum, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(maximum - base)
        alpha = tl.exp2(highest - base)
        total = total * alpha + tl.sum(weights * part_sum, 0)
        acc = acc * alpha + tl.sum(weights[:, None] * sums, 0)
        highest = new
    total = tl.where((tl.abs(highest) >= LOST) & (highest != float("-inf")), float("nan"), total)
    acc = acc / tl.where(total == 0.0, 1.0, total)
    out_step = tl.cast(out_row_stride, tl.int64)
    at = tl.load(parts_ptr + part * 3).to(tl.int64) + query
    out_at = out_ptr + at * out_step + (group * GROUP + member) * D + cols
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=cols < D)


def merge_warps(d: int) -> int:
    """Warps of a program of the second kernel, each of whose threads holds 16 numbers of 16 splits."""
    return 1 if d <= 32 else padded(d) // 32


@lru_cache(maxsize=64)
def settings(tile: Tile, heads: Heads, page_tokens: int, windowed: bool, softcap: float) -> dict[str, object]:
    """Arguments of the first kernel that depend on neither tensors nor plan. SOFTCAP: see attention's kernel."""
    exact = heads.element_size == 4 or softcap > 512
    return {
        "GROUP": heads.members,
        "D": heads.d,
        "BLOCK_D": padded(heads.d),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        "PAGE": page_tokens,
        "LEFT": windowed,
        "SOFTCAP": (2 if exact else 1) if softcap > 0 else 0,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Tensor,
    pages: Tensor,
    launches: tuple[tuple[Tensor, Tensor, int, int], tuple[Tensor, Tensor, int, int]],
    page_tokens: int,
    covers: bool,
    options: tuple[float, int, float],
    arch: int,
) -> Tensor:
    """q: [t, g, m, d]; k, v: [slots, g, d]; launches: (work, merges, slots, rows) of small and of large tiles; options:
    scale, left, softcap → [t, g m, d]."""
    t, groups, members, d = q.shape
    scale, left, softcap = options
    out = (torch.empty if covers else torch.zeros)(t, groups * members, d, dtype=q.dtype, device=q.device)
    heads = Heads(members, d, k.element_size(), arch)
    width = groups * members * d
    for tile_of, (work, merges, slots, rows) in zip((small_tile, large_tile), launches):
        if not len(work) or not out.numel():
            continue
        sums = torch.empty(slots * groups * rows * d, dtype=torch.float32, device=q.device)
        stats = torch.empty(slots * groups * rows * 2, dtype=torch.float32, device=q.device)
        fixed = settings(tile_of(heads), heads, page_tokens, left >= 0, softcap)
        _paged_attention_kernel[(len(work) * groups,)](
            q, k, v, out, sums, stats, parts, pages, work, *q.stride()[:3], *k.stride()[:2], *v.stride()[:2], width,
            pages.stride(0), groups, rows, scale, left, softcap, **fixed,
        )  # fmt: skip
        if len(merges):
            _merge_kernel[(len(merges) * groups, rows)](
                sums, stats, out, parts, merges, width, groups, rows, members, d, padded(d), SPLITS,
                num_warps=merge_warps(d),
            )  # fmt: skip
    return out
