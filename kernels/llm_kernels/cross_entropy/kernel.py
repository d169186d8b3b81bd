"""Cross entropy in Triton: one pass over the logits forward, one read and one write backward.

Shapes: M tokens, V columns (fp32, bf16 or fp16), of which the first ``num_valid`` are words; all arithmetic in fp32.
Every token's columns are read by one program, or, where tokens are few, by several (splits), each of which leaves the
maximum, the sum of exponentials relative to it, the label's logit and, for label smoothing, the sum of the logits and
their number: the "statistics" [parts, K, M] fp32 with K = 3 or 5. Parts are splits and, over a process group, the
splits of every rank; one kernel joins them in a fixed order, so results are deterministic and equal on every rank.
Online normalizer: Milakov and Gimelshein 2018, arXiv 1805.02867. Nothing is padded to a power of two.
Bytes, e being the element size: forward eMV + 8M read and 8M written; backward 2eMV + 16M. Backward recomputes the
probabilities from the logits and the saved log-sum-exp. Tokens whose label is ignored are not read at all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_kernels.cross_entropy.ref import Terms
from llm_kernels.device import arch, num_sms

# Below every logit that matters, and finite: a difference from it is never NaN.
_LOWEST = tl.constexpr(-1.0e38)
_LOG2E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    """Tile of columns that a program works on at once: bytes of logits, warps, and programs on one SM."""

    num_bytes: int
    num_warps: int
    per_sm: int


# Four 128-bit loads a thread in flight: 32 to 64 KiB for each SM, above the 16 KiB that latency times bandwidth of an
# H100 ask for. The same on sm_80, whose product is smaller.
TILES = {80: Tile(16384, 8, 4), 90: Tile(16384, 8, 4)}


@triton.jit
def _loss(top, total, target, words, count, ignored, label_smoothing, z_loss, SMOOTH: tl.constexpr):
    """(loss, log-sum-exp, share of every word in the smoothed label) from the joined statistics; 0 if ignored."""
    lse = tl.where(ignored, 0.0, top) + tl.log(tl.where(ignored, 1.0, total))
    target = tl.where(ignored, 0.0, target)
    # As a mean of two differences: lse - (1 - s) x - s mean(x) would round numbers as large as the logits.
    loss = (1.0 - label_smoothing) * (lse - target) + z_loss * lse * lse
    share = tl.zeros_like(lse)
    if SMOOTH:
        words_count = tl.maximum(count, 1.0)
        loss += label_smoothing * (lse - words / words_count)
        share = label_smoothing / words_count
    return loss, lse, share


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr,
    labels_ptr,
    stats_ptr,
    losses_ptr,
    lse_ptr,
    share_ptr,
    M,
    V,
    row_stride,
    first,
    num_valid,
    split_columns,
    ignore_index,
    label_smoothing,
    z_loss,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    SMOOTH: tl.constexpr,
    FINISH: tl.constexpr,
):
    """Statistics of one token over one split; with FINISH (one split, no group) the loss itself.

    A tile is [LANES, VEC]: VEC neighbours are one 128-bit load and belong to one thread, so the running maximum and
    sum of a lane need no other thread, and an element costs one exponential and an eighth.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    BLOCK: tl.constexpr = LANES * VEC
    label = tl.load(labels_ptr + row)
    ignored = label == ignore_index
    local = label - first
    begin = split * split_columns
    end = tl.minimum(begin + split_columns, num_valid)
    end = tl.where(ignored, begin, tl.maximum(begin, end))
    # A label that no part holds keeps -inf here and gives an infinite loss: seen at once, without a check that waits.
    here = (local >= begin) & (local < end)
    x_ptr = logits_ptr + row * row_stride
    target = tl.load(x_ptr + local, mask=here, other=float("-inf")).to(tl.float32)
    offsets = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    top = tl.full([LANES], _LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    words = tl.zeros([LANES], tl.float32)
    whole = begin + (end - begin) // BLOCK * BLOCK
    for start in range(begin, whole, BLOCK):
        x = tl.load(x_ptr + start + offsets).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp2((top - higher) * _LOG2E) + tl.sum(tl.exp2((x - higher[:, None]) * _LOG2E), 1)
        top = higher
        if SMOOTH:
            # Half the sum: Triton 3.6 and 3.7 can't compile a bare sum added up here (OptimizeThreadLocality asserts).
            words += 0.5 * tl.sum(x, 1)
    if whole < end:
        columns = whole + offsets
        # The load stops at the row's end, which is aligned more often than the last word is.
        x = tl.load(x_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)
        if SMOOTH:
            words += 0.5 * tl.sum(tl.where(columns < end, x, 0.0), 1)
        x = tl.where(columns < end, x, float("-inf"))
        higher = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp2((top - higher) * _LOG2E) + tl.sum(tl.exp2((x - higher[:, None]) * _LOG2E), 1)
        top = higher
    highest = tl.max(top, 0)
    total_all = tl.sum(total * tl.exp2((top - highest) * _LOG2E), 0)
    words_all = 2.0 * tl.sum(words, 0)
    count = (end - begin).to(tl.float32)
    if FINISH:
        loss, lse, share = _loss(highest, total_all, target, words_all, count, ignored, label_smoothing, z_loss, SMOOTH)
        tl.store(losses_ptr + row, loss)
        tl.store(lse_ptr + row, lse)
        if SMOOTH:
            tl.store(share_ptr + row, share)
    else:
        K: tl.constexpr = 5 if SMOOTH else 3
        out_ptr = stats_ptr + split.to(tl.int64) * K * M + row
        tl.store(out_ptr, highest)
        tl.store(out_ptr + M, total_all)
        tl.store(out_ptr + 2 * M, target)
        if SMOOTH:
            tl.store(out_ptr + 3 * M, words_all)
            tl.store(out_ptr + 4 * M, count)


@triton.jit
def _join_kernel(
    stats_ptr,
    labels_ptr,
    losses_ptr,
    lse_ptr,
    share_ptr,
    M,
    parts,
    ignore_index,
    label_smoothing,
    z_loss,
    BLOCK_M: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """Losses of BLOCK_M tokens from the statistics [parts, K, M], joined in the order of the parts."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = rows < M
    K: tl.constexpr = 5 if SMOOTH else 3
    top = tl.full([BLOCK_M], _LOWEST, tl.float32)
    target = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    words = tl.zeros([BLOCK_M], tl.float32)
    count = tl.zeros([BLOCK_M], tl.float32)
    at = stats_ptr + rows
    for _ in range(parts):
        part_top = tl.load(at, mask=mask, other=0.0)
        part_total = tl.load(at + M, mask=mask, other=0.0)
        target = tl.maximum(target, tl.load(at + 2 * M, mask=mask, other=0.0))
        higher = tl.maximum(top, part_top)
        total = total * tl.exp2((top - higher) * _LOG2E) + part_total * tl.exp2((part_top - higher) * _LOG2E)
        top = higher
        if SMOOTH:
            words += tl.load(at + 3 * M, mask=mask, other=0.0)
            count += tl.load(at + 4 * M, mask=mask, other=1.0)
        at += K * M
    ignored = tl.load(labels_ptr + rows, mask=mask, other=ignore_index) == ignore_index
    loss, lse, share = _loss(top, total, target, words, count, ignored, label_smoothing, z_loss, SMOOTH)
    tl.store(losses_ptr + rows, loss, mask=mask)
    tl.store(lse_ptr + rows, lse, mask=mask)
    if SMOOTH:
        tl.store(share_ptr + rows, share, mask=mask)


@triton.jit
def _cross_entropy_bwd_kernel(
    dlosses_ptr,
    dlse_ptr,
    logits_ptr,
    labels_ptr,
    lse_ptr,
    share_ptr,
    out_ptr,
    V,
    row_stride,
    out_row_stride,
    first,
    num_valid,
    ignore_index,
    label_smoothing,
    z_loss,
    BLOCK: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_DLOSSES: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """One block of columns of one token: a p - b [column is the label] - c, with p = exp(x - lse),
    a = dloss (1 + 2 z lse) + dlse, b = dloss (1 - smoothing), c = dloss share; 0 in padding. May write over the logits.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + row)
    kept = label != ignore_index
    lse = tl.load(lse_ptr + row)
    dloss = 0.0
    if HAS_DLOSSES:
        dloss = tl.where(kept, tl.load(dlosses_ptr + row), 0.0)
    along = dloss * (1.0 + 2.0 * z_loss * lse)
    if HAS_DLSE:
        along += tl.where(kept, tl.load(dlse_ptr + row), 0.0)
    mask = columns < V
    x = tl.load(logits_ptr + row * row_stride + columns, mask=mask & kept, other=0.0).to(tl.float32)
    grad = along * tl.exp2((x - lse) * _LOG2E)
    if HAS_DLOSSES:
        grad -= tl.where(columns == label - first, dloss * (1.0 - label_smoothing), 0.0)
        if SMOOTH:
            grad -= dloss * tl.load(share_ptr + row)
    grad = tl.where((columns < num_valid) & kept, grad, 0.0)
    tl.store(out_ptr + row * out_row_stride + columns, grad.to(out_ptr.dtype.element_ty), mask=mask)


def tile(columns: int, itemsize: int, aligned: bool, of_arch: int) -> tuple[int, int, int]:
    """(lanes, elements of a lane, warps): up to four 128-bit loads a thread, fewer threads for a narrow vocabulary.

    Rows that do not begin at multiples of 16 bytes are loaded element by element, neighbours by neighbouring threads.
    """
    table = TILES[90 if of_arch >= 90 else 80]
    vec = 16 // itemsize if aligned else 1
    limit = table.num_bytes // (itemsize if aligned else 8)
    block = min(limit, triton.next_power_of_2(max(columns, 32 * vec)))
    return block // vec, vec, max(1, table.num_warps * block // limit)


def is_aligned(rows: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes."""
    return rows.data_ptr() % 16 == 0 and rows.stride(0) * rows.element_size() % 16 == 0


def num_splits(tokens: int, columns: int, block: int, programs: int) -> int:
    """Programs for one token: enough to fill the GPU where tokens alone don't, each with a block or more."""
    return max(1, min(programs // max(tokens, 1), columns // block))


def _empty_outputs(tokens: int, smooth: bool, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    losses, lse = (torch.empty(tokens, dtype=torch.float32, device=like.device) for _ in range(2))
    return losses, lse, torch.empty(tokens if smooth else 0, dtype=torch.float32, device=like.device)


def forward(logits: Tensor, labels: Tensor, terms: Terms, whole: bool) -> tuple[Tensor, Tensor, Tensor] | Tensor:
    """logits [M, V], columns contiguous; labels [M] → (losses, lse, share), or statistics [splits, K, M].

    ``whole``: no other process has columns of these tokens. Otherwise statistics are returned, for ``join``.
    """
    tokens, columns = logits.shape
    smooth = terms.label_smoothing != 0.0
    table = TILES[90 if arch(logits) >= 90 else 80]
    lanes, vec, warps = tile(columns, logits.element_size(), is_aligned(logits), arch(logits))
    block = lanes * vec
    splits = num_splits(tokens, columns, block, num_sms(logits) * table.per_sm)
    split_columns = triton.cdiv(triton.cdiv(columns, block), splits) * block
    finish = whole and splits == 1
    outputs = _empty_outputs(tokens if finish else 0, smooth, logits)
    shape = (0, 0, 0) if finish else (splits, 5 if smooth else 3, tokens)
    stats = torch.empty(shape, dtype=torch.float32, device=logits.device)
    if tokens:
        _cross_entropy_fwd_kernel[(tokens, splits)](
            logits,
            labels,
            stats,
            *outputs,
            tokens,
            columns,
            logits.stride(0),
            terms.first,
            terms.num_valid,
            split_columns,
            terms.ignore_index,
            terms.label_smoothing,
            terms.z_loss,
            LANES=lanes,
            VEC=vec,
            SMOOTH=smooth,
            FINISH=finish,
            num_warps=warps,
        )
    if finish:
        return outputs
    return join(stats, labels, terms) if whole else stats


def join(stats: Tensor, labels: Tensor, terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics [parts, K, M] of all parts of the vocabulary → (losses, lse, share)."""
    parts, _, tokens = stats.shape
    smooth = terms.label_smoothing != 0.0
    outputs = _empty_outputs(tokens, smooth, stats)
    if tokens:
        block = 128
        _join_kernel[(triton.cdiv(tokens, block),)](
            stats,
            labels,
            *outputs,
            tokens,
            parts,
            terms.ignore_index,
            terms.label_smoothing,
            terms.z_loss,
            BLOCK_M=block,
            SMOOTH=smooth,
            num_warps=4,
        )
    return outputs


def backward(
    dlosses: Tensor | None,
    dlse: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    saved: tuple[Tensor, Tensor],
    terms: Terms,
    out: Tensor,
) -> None:
    """Writes the gradient of the logits [M, V] into ``out``, which may be the logits; ``saved`` is (lse, share)."""
    tokens, columns = logits.shape
    lanes, vec, warps = tile(columns, logits.element_size(), is_aligned(logits), arch(logits))
    if tokens:
        _cross_entropy_bwd_kernel[(tokens, triton.cdiv(columns, lanes * vec))](
            dlosses,
            dlse,
            logits,
            labels,
            *saved,
            out,
            columns,
            logits.stride(0),
            out.stride(0),
            terms.first,
            terms.num_valid,
            terms.ignore_index,
            terms.label_smoothing,
            terms.z_loss,
            BLOCK=lanes * vec,
            SMOOTH=terms.label_smoothing != 0.0,
            HAS_DLOSSES=dlosses is not None,
            HAS_DLSE=dlse is not None,
            num_warps=warps,
        )
