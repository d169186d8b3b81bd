"""Cross entropy over a vocabulary that is divided over processes, in plain torch (arXiv 1909.08053, section 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from llm_kernels.dispatch import first_derivative_only


class Terms(NamedTuple):
    """The options of a loss, and which part of the vocabulary a rank's columns (or a slice of them) are.

    first: token id of column 0; num_valid: number of columns that belong to the vocabulary, the rest are padding;
    softcap: 0 for none.
    """

    first: int
    num_valid: int
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0


def first_token_id(columns: int, group: dist.ProcessGroup | None) -> int:
    """The token id of this rank's first column."""
    return 0 if group is None else group.rank() * columns


def forward(
    logits: Tensor, labels: Tensor, terms: Terms, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [...], log-sum-exp [...], saved [2 or 3, ...]), fp32 or fp64.

    ``saved``: the maximum, the sum of exponentials relative to it and, with smoothing, the share of a column in the
    smoothed label. Maximum and sum are two numbers because their log-sum-exp, as one, would lose precision where all
    logits have a common offset. One collective: an all-gather of each rank's (maximum, sum, label's logit and, with
    smoothing, sum of distances from the maximum, number of columns).
    """
    lowest = torch.finfo(torch.float64 if logits.dtype == torch.float64 else torch.float32).min
    wide, _ = _capped(logits, terms)
    ignored = labels == terms.ignore_index
    local, here = _local(labels, terms)
    smooth = terms.label_smoothing != 0.0
    if terms.num_valid:
        target = wide.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(~here, -torch.inf)
        # Where all columns of this rank are -inf, a difference from the maximum would be NaN.
        top = wide.amax(-1).clamp_min_(lowest)
        shifted = wide - top.unsqueeze(-1)
        gaps = -shifted.sum(-1) if smooth else top
        total = shifted.exp_().sum(-1)
    else:  # a rank whose columns are all padding
        top = wide.new_full(labels.shape, lowest)
        target, total, gaps = top - torch.inf, top * 0.0, top * 0.0
    columns = torch.full_like(top, terms.num_valid)
    if group is not None and group.size() > 1:
        parts = torch.stack([top, total, target, *((gaps, columns) if smooth else ())])
        gathered = parts.new_empty(group.size(), *parts.shape)
        dist.all_gather_into_tensor(gathered.view(-1), parts.view(-1), group=group)
        top, target = gathered[:, 0].amax(0), gathered[:, 2].amax(0)
        below = top - gathered[:, 0]
        total = (gathered[:, 1] * (-below).exp()).sum(0)
        if smooth:
            counts = gathered[:, 4]
            gaps = (gathered[:, 3] + (counts * below).masked_fill(counts == 0, 0.0)).sum(0)
            columns = counts.sum(0)
    log_total = total.log()
    lse = top + log_total
    losses = log_total + (1.0 - terms.label_smoothing) * (top - target)
    if terms.z_loss:
        losses = losses + terms.z_loss * lse * lse
    saved = torch.stack([top, total, *([terms.label_smoothing / columns] if smooth else ())])
    if smooth:
        losses = losses + saved[2] * gaps
    return losses.masked_fill(ignored, 0.0), lse.masked_fill(ignored, 0.0), saved


def gradient(
    dlosses: Tensor | None, dlse: Tensor | None, logits: Tensor, labels: Tensor, saved: Tensor, terms: Terms
) -> Tensor:
    """Gradient of the logits, in their dtype; ``saved`` as from ``forward``."""
    top, total = saved[0], saved[1]
    ignored = labels == terms.ignore_index
    zero = torch.zeros_like(top)
    # Filled with 0, not multiplied by 0, because the upstream gradient of a mean over no tokens is NaN.
    upstream = zero if dlosses is None else dlosses.masked_fill(ignored, 0.0)
    along = zero if dlse is None else dlse.masked_fill(ignored, 0.0)
    along = along + (upstream * (1.0 + 2.0 * terms.z_loss * (top + total.log())) if terms.z_loss else upstream)
    wide, bent = _capped(logits, terms)
    out = (wide - top.unsqueeze(-1)).exp_().mul_((along / total).unsqueeze(-1))
    if terms.num_valid:
        local, here = _local(labels, terms)
        push = (upstream * here).mul_(terms.label_smoothing - 1.0)
        out.scatter_add_(-1, local.unsqueeze(-1), push.unsqueeze(-1))
    if terms.label_smoothing:
        out.sub_((upstream * saved[2]).unsqueeze(-1))
    if bent is not None:
        out.mul_(1.0 - bent.square_())
    padding = logits.shape[-1] - terms.num_valid
    return torch.nn.functional.pad(out.to(logits.dtype), (0, padding)) if padding else out.to(logits.dtype)


def _capped(logits: Tensor, terms: Terms) -> tuple[Tensor, Tensor | None]:
    """The logits without padding in fp32 or fp64, capped if there is a cap; and the tanh of the cap, or None."""
    valid = logits[..., : terms.num_valid]
    wide = valid if valid.dtype == torch.float64 else valid.float()
    if not terms.softcap:
        return wide, None
    bent = (wide / terms.softcap).tanh_()
    return bent * terms.softcap, bent


def _local(labels: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """(column of each label, clamped into the columns of this rank; whether the label is one of them)."""
    local = labels - terms.first
    here = (local >= 0) & (local < terms.num_valid) & (labels != terms.ignore_index)
    return local.clamp(0, max(terms.num_valid - 1, 0)), here


class _CrossEntropy(torch.autograd.Function):
    """Saves the logits and two or three numbers per token."""

    @staticmethod
    def forward(ctx, logits, labels, terms, group):
        losses, lse, saved = forward(logits, labels, terms, group)
        ctx.save_for_backward(logits, labels, saved)
        ctx.terms = terms
        ctx.set_materialize_grads(False)
        return losses, lse

    @staticmethod
    @first_derivative_only("cross_entropy")
    def backward(ctx, dlosses, dlse):
        logits, labels, saved = ctx.saved_tensors
        if dlosses is None and dlse is None:
            return None, None, None, None
        return gradient(dlosses, dlse, logits, labels, saved, ctx.terms), None, None, None


def cross_entropy(
    logits: Tensor, labels: Tensor, terms: Terms, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """(losses, log-sum-exp) of each token, both differentiable: see op.py for the formula.

    logits: [..., v] of any float dtype, this rank's columns; labels: [...] int64. Computed in fp32 (fp64 for fp64).
    """
    return _CrossEntropy.apply(logits, labels, terms, group)
