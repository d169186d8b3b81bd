"""Cross entropy in Triton: one pass over the logits forward, one read and one write backward.

Shapes: M tokens, V columns (fp32, bf16 or fp16), of which the first ``num_valid`` belong to the vocabulary and the rest
are padding; all arithmetic is fp32. One program reads all columns of a token; if there are few tokens, several programs
do (splits). Each split produces "statistics": the maximum, the sum of exponentials relative to it, the label's logit
and, for label smoothing, the sum of the distances of all logits from the maximum, and the number of logits: fp32
[parts, K, M] with K = 3 or 5. Parts are the splits, over a process group the splits of every rank. One kernel joins
them in a fixed order, so results are deterministic and equal on every rank. Online normalizer: Milakov and Gimelshein
2018, arXiv 1805.02867. Nothing is padded to a power of two.

The maximum and the sum are kept as two numbers everywhere, for backward too. As one fp32 number, the log-sum-exp, they
would lose precision where all logits have a common offset, which should have no effect (at an offset of 1e4, loss and
gradient would be wrong by 4e-4).

Bytes, for an element size of e: forward reads eMV + 8M and writes 16M; backward moves 2eMV + 20M. Backward computes the
probabilities again from the logits, the maximum and the sum. Logits of tokens whose label is ignored are not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_kernels.cross_entropy.ref import Terms
from llm_kernels.cross_entropy.tiles import plan_of

# The finite limits of fp32. Unlike -inf, the lowest number as a maximum never makes a difference NaN; only a logit of
# -inf is below it.
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_HIGHEST = tl.constexpr(3.4028234663852886e38)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _cap(x, softcap, inverse_cap):
    """softcap tanh(x / softcap), computed as softcap - 2 softcap e / (1 + e) with e = exp(-2 |x / softcap|), which near
    the cap is rounded only once; near zero, where that would cancel, by a polynomial with an error of 5e-9."""
    u = x * inverse_cap
    e = tl.exp2(tl.abs(u) * (-2.0 * _LOG2E))
    far = softcap - softcap * (2.0 * e / (1.0 + e))
    z = u * u
    near = -0.005648315743573625 * z + 0.020589825731649657
    near = near * z - 0.05372512634347648
    near = near * z + 0.13331274428798262
    near = near * z - 0.33333276059143274
    return tl.where(tl.abs(u) < 0.625, softcap * (near * z * u + u), tl.where(u < 0.0, -far, far))


@triton.jit
def _add_tile(x, inside, top, total, gaps, seen, SMOOTH: tl.constexpr, MASKED: tl.constexpr):
    """Adds a tile to the running statistics of every lane: the maximum, the sum of exponentials, and half the sum of
    distances from the maximum. ``seen``: number of logits that a lane has seen before this tile."""
    if MASKED:
        x = tl.where(inside, x, float("-inf"))
    higher = tl.maximum(top, tl.max(x, 1))
    total = total * tl.exp2((top - higher) * _LOG2E) + tl.sum(tl.exp2((x - higher[:, None]) * _LOG2E), 1)
    if SMOOTH:
        gap = higher[:, None] - x
        if MASKED:
            gap = tl.where(inside, gap, 0.0)
        # Half the sum, because Triton 3.6 and 3.7 fail to compile the plain sum (assertion in OptimizeThreadLocality).
        gaps += 0.5 * (seen * tl.minimum(higher - top, _HIGHEST)) + 0.5 * tl.sum(gap, 1)
    return higher, total, gaps


@triton.jit
def _loss(top, total, target, gaps, count, ignored, label_smoothing, z_loss, SMOOTH: tl.constexpr):
    """(loss, log-sum-exp, maximum, sum, share of every column in the smoothed label) from the joined statistics. Loss
    and log-sum-exp of an ignored token are 0.

    The loss is a sum of differences from the maximum. lse - (1 - s) x - s mean(x), which is the same in exact
    arithmetic, would round numbers as large as the logits.
    """
    top = tl.where(ignored, 0.0, top)
    total = tl.where(ignored, 1.0, total)
    log_total = tl.log(total)
    lse = top + log_total
    loss = log_total + (1.0 - label_smoothing) * (top - tl.where(ignored, 0.0, target)) + z_loss * lse * lse
    share = tl.zeros_like(lse)
    if SMOOTH:
        share = label_smoothing / tl.maximum(count, 1.0)
        loss += gaps * share
    return loss, lse, top, total, share


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr,
    labels_ptr,
    stats_ptr,
    losses_ptr,
    lse_ptr,
    saved_ptr,
    M,
    V,
    row_stride,
    first,
    num_valid,
    split_columns,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    inverse_cap,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    SMOOTH: tl.constexpr,
    CAP: tl.constexpr,
    FINISH: tl.constexpr,
):
    """Statistics of one token over one split; with FINISH (one split and no group) the loss itself.

    A tile is [LANES, VEC]. The VEC neighbours of a lane are one 128-bit load of one thread, so a lane's running maximum
    and sum need no exchange with other threads, and one rescaling by an exponential serves VEC elements.
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
    # The logit of a label outside of the vocabulary stays -inf, so its loss is infinite. That is noticed at once, while
    # a check of the labels would make the host wait.
    here = (local >= begin) & (local < end)
    x_ptr = logits_ptr + row * row_stride
    target = tl.load(x_ptr + local, mask=here, other=float("-inf")).to(tl.float32)
    if CAP:
        target = tl.where(here, _cap(target, softcap, inverse_cap), target)
    offsets = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    top = tl.full([LANES], _LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    gaps = tl.zeros([LANES], tl.float32)
    whole = begin + (end - begin) // BLOCK * BLOCK
    for start in range(begin, whole, BLOCK):
        x = tl.load(x_ptr + start + offsets).to(tl.float32)
        if CAP:
            x = _cap(x, softcap, inverse_cap)
        seen = ((start - begin) // LANES).to(tl.float32)
        top, total, gaps = _add_tile(x, x, top, total, gaps, seen, SMOOTH, False)
    seen = ((whole - begin) // LANES).to(tl.float32) + tl.zeros([LANES], tl.float32)
    if whole < end:
        columns = whole + offsets
        # The mask ends at the row's end, not at num_valid, because the row's end is aligned more often.
        x = tl.load(x_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)
        if CAP:
            x = _cap(x, softcap, inverse_cap)
        top, total, gaps = _add_tile(x, columns < end, top, total, gaps, seen, SMOOTH, True)
        if SMOOTH:
            seen += tl.sum((columns < end).to(tl.float32), 1)
    highest = tl.max(top, 0)
    total_all = tl.sum(total * tl.exp2((top - highest) * _LOG2E), 0)
    gaps_all = 0.0
    if SMOOTH:
        gaps_all = tl.sum(2.0 * gaps + seen * tl.minimum(highest - top, _HIGHEST), 0)
    count = (end - begin).to(tl.float32)
    if FINISH:
        loss, lse, highest, total_all, share = _loss(
            highest, total_all, target, gaps_all, count, ignored, label_smoothing, z_loss, SMOOTH
        )
        tl.store(losses_ptr + row, loss)
        tl.store(lse_ptr + row, lse)
        tl.store(saved_ptr + row, highest)
        tl.store(saved_ptr + M + row, total_all)
        if SMOOTH:
            tl.store(saved_ptr + M + M + row, share)
    else:
        K: tl.constexpr = 5 if SMOOTH else 3
        out_ptr = stats_ptr + split.to(tl.int64) * K * M + row
        tl.store(out_ptr, highest)
        tl.store(out_ptr + M, total_all)
        tl.store(out_ptr + M + M, target)
        if SMOOTH:
            tl.store(out_ptr + M + M + M, gaps_all)
            tl.store(out_ptr + M + M + M + M, count)


@triton.jit
def _join_kernel(
    stats_ptr,
    labels_ptr,
    losses_ptr,
    lse_ptr,
    saved_ptr,
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
    top = tl.full([BLOCK_M], _LOWEST, tl.float32)
    target = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    gaps = tl.zeros([BLOCK_M], tl.float32)
    count = tl.zeros([BLOCK_M], tl.float32)
    at = stats_ptr + rows
    for _ in range(parts):
        part_top = tl.load(at, mask=mask, other=0.0)
        part_total = tl.load(at + M, mask=mask, other=0.0)
        target = tl.maximum(target, tl.load(at + M + M, mask=mask, other=0.0))
        higher = tl.maximum(top, part_top)
        total = total * tl.exp2((top - higher) * _LOG2E) + part_total * tl.exp2((part_top - higher) * _LOG2E)
        at += M
        at += M
        at += M
        if SMOOTH:
            part_count = tl.load(at + M, mask=mask, other=1.0)
            gaps += count * tl.minimum(higher - top, _HIGHEST) + part_count * tl.minimum(higher - part_top, _HIGHEST)
            gaps += tl.load(at, mask=mask, other=0.0)
            count += part_count
            at += M
            at += M
        top = higher
    ignored = tl.load(labels_ptr + rows, mask=mask, other=ignore_index) == ignore_index
    loss, lse, top, total, share = _loss(top, total, target, gaps, count, ignored, label_smoothing, z_loss, SMOOTH)
    tl.store(losses_ptr + rows, loss, mask=mask)
    tl.store(lse_ptr + rows, lse, mask=mask)
    tl.store(saved_ptr + rows, top, mask=mask)
    tl.store(saved_ptr + M + rows, total, mask=mask)
    if SMOOTH:
        tl.store(saved_ptr + M + M + rows, share, mask=mask)


@triton.jit
def _cross_entropy_bwd_kernel(
    dlosses_ptr,
    dlse_ptr,
    logits_ptr,
    labels_ptr,
    saved_ptr,
    out_ptr,
    M,
    V,
    row_stride,
    out_row_stride,
    first,
    num_valid,
    ignore_index,
    label_smoothing,
    z_loss,
    inverse_cap,
    softcap,
    BLOCK: tl.constexpr,
    SMOOTH: tl.constexpr,
    CAP: tl.constexpr,
    HAS_DLOSSES: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """Gradient of one block of columns of one token: a p - b [column is the label] - c, with p = exp(x - top) / total,
    a = dloss (1 + 2 z lse) + dlse, b = dloss (1 - smoothing), c = dloss share. With CAP, x is the capped logit and the
    result is multiplied by the cap's derivative. Padding gets 0. The output may be the logits.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + row)
    kept = label != ignore_index
    top = tl.load(saved_ptr + row)
    total = tl.load(saved_ptr + M + row)
    dloss = 0.0
    if HAS_DLOSSES:
        dloss = tl.where(kept, tl.load(dlosses_ptr + row), 0.0)
    along = dloss * (1.0 + 2.0 * z_loss * (top + tl.log(total)))
    if HAS_DLSE:
        along += tl.where(kept, tl.load(dlse_ptr + row), 0.0)
    mask = columns < V
    x = tl.load(logits_ptr + row * row_stride + columns, mask=mask & kept, other=0.0).to(tl.float32)
    raw = x
    if CAP:
        x = _cap(raw, softcap, inverse_cap)
    grad = along / total * tl.exp2((x - top) * _LOG2E)
    if HAS_DLOSSES:
        grad -= tl.where(columns == label - first, dloss * (1.0 - label_smoothing), 0.0)
        if SMOOTH:
            grad -= dloss * tl.load(saved_ptr + M + M + row)
    if CAP:  # 1 - tanh^2, in a form that does not cancel
        e = tl.exp2(tl.abs(raw * inverse_cap) * (-2.0 * _LOG2E))
        grad *= 4.0 * e / ((1.0 + e) * (1.0 + e))
    grad = tl.where((columns < num_valid) & kept, grad, 0.0)
    tl.store(out_ptr + row * out_row_stride + columns, grad.to(out_ptr.dtype.element_ty), mask=mask)


def _outputs(tokens: int, smooth: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(tokens, dtype=torch.float32, device=device),
        torch.empty(tokens, dtype=torch.float32, device=device),
        torch.empty(3 if smooth else 2, tokens, dtype=torch.float32, device=device),
    )


def forward(logits: Tensor, labels: Tensor, terms: Terms, whole: bool) -> tuple[Tensor, Tensor, Tensor] | Tensor:
    """logits [M, V], columns contiguous; labels [M] → (losses, lse, saved), or statistics [splits, K, M].

    ``saved`` [2 or 3, M]: maximum, sum of exponentials relative to it and, with smoothing, the share of a column in the
    smoothed label. ``whole``: no other process has columns of these tokens; if one has, statistics are returned, for
    ``join``.
    """
    tokens, columns = logits.shape
    smooth = terms.label_smoothing != 0.0
    plan = plan_of(logits)
    finish = whole and plan.splits == 1
    outputs, stats = None, None
    if finish:
        outputs = _outputs(tokens, smooth, logits.device)
    else:
        stats = torch.empty(plan.splits, 5 if smooth else 3, tokens, dtype=torch.float32, device=logits.device)
    if tokens:
        _cross_entropy_fwd_kernel[(tokens, plan.splits)](
            logits,
            labels,
            stats,
            *(outputs or (None, None, None)),
            tokens,
            columns,
            logits.stride(0),
            terms.first,
            terms.num_valid,
            plan.split_columns,
            terms.ignore_index,
            terms.label_smoothing,
            terms.z_loss,
            terms.softcap,
            _inverse(terms),
            LANES=plan.lanes,
            VEC=plan.vec,
            SMOOTH=smooth,
            CAP=terms.softcap != 0.0,
            FINISH=finish,
            num_warps=plan.warps,
        )
    if outputs is not None:
        return outputs
    assert stats is not None
    return join(stats, labels, terms) if whole else stats


def _inverse(terms: Terms) -> float:
    return 1.0 / terms.softcap if terms.softcap else 0.0


def join(stats: Tensor, labels: Tensor, terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics [parts, K, M] of all parts of the vocabulary → (losses, lse, saved)."""
    parts, _, tokens = stats.shape
    smooth = terms.label_smoothing != 0.0
    outputs = _outputs(tokens, smooth, stats.device)
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
    saved: Tensor,
    terms: Terms,
    out: Tensor,
) -> None:
    """Writes the gradient of the logits [M, V] into ``out``, which may be the logits; ``saved`` as from forward."""
    tokens, columns = logits.shape
    plan = plan_of(logits)
    if tokens:
        _cross_entropy_bwd_kernel[(tokens, plan.backward_grid_columns)](
            dlosses,
            dlse,
            logits,
            labels,
            saved,
            out,
            tokens,
            columns,
            logits.stride(0),
            out.stride(0),
            terms.first,
            terms.num_valid,
            terms.ignore_index,
            terms.label_smoothing,
            terms.z_loss,
            _inverse(terms),
            terms.softcap,
            BLOCK=plan.lanes * plan.vec,
            SMOOTH=terms.label_smoothing != 0.0,
            CAP=terms.softcap != 0.0,
            HAS_DLOSSES=dlosses is not None,
            HAS_DLSE=dlse is not None,
            num_warps=plan.warps,
        )
