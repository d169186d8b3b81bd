"""Cross entropy over a vocabulary that is divided over processes, in plain torch (arXiv 1909.08053, section 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Saves exp(logits - row maximum) in the logits' dtype, in place of the logits, so that backward is one pass."""

    @staticmethod
    def forward(ctx, logits, labels, num_valid, group):
        parts = 1 if group is None else group.size()
        first = 0 if group is None else group.rank() * logits.shape[-1]
        valid = logits[..., :num_valid].float()
        if num_valid:
            top = valid.amax(dim=-1)
            exponentials = (valid - top.unsqueeze(-1)).exp_()
            log_sum = exponentials.sum(dim=-1).log_().add_(top)
        else:  # a process whose columns are all padding
            top = log_sum = torch.full(labels.shape, -torch.inf, device=logits.device)
            exponentials = valid
        if parts > 1:
            gathered = torch.empty(parts, *labels.shape, device=logits.device)
            dist.all_gather_into_tensor(gathered.view(-1), log_sum.view(-1), group=group)
            log_sum = torch.logsumexp(gathered, dim=0)
        local = labels - first
        here = (local >= 0) & (local < num_valid)
        local = local.clamp(0, max(num_valid - 1, 0))
        target = logits.gather(-1, local.unsqueeze(-1)).squeeze(-1).float().masked_fill_(~here, 0.0)
        if parts > 1:
            dist.all_reduce(target, group=group)
        ctx.save_for_backward(exponentials.to(logits.dtype), (top - log_sum).exp_(), local, here)
        ctx.columns = logits.shape[-1]
        return log_sum - target

    @staticmethod
    def backward(ctx, grad):
        exponentials, scale, local, here = ctx.saved_tensors
        num_valid = exponentials.shape[-1]
        if num_valid < ctx.columns:
            out = exponentials.new_zeros(*grad.shape, ctx.columns)
            torch.mul(exponentials, (grad * scale).unsqueeze(-1), out=out[..., :num_valid])
        else:
            out = (exponentials * (grad * scale).unsqueeze(-1)).to(exponentials.dtype)
        out.scatter_add_(-1, local.unsqueeze(-1), -(grad * here).unsqueeze(-1).to(out.dtype))
        return out, None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, num_valid: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Negative log-likelihood of each label.

    logits: [..., v], this process's columns of the vocabulary, which is divided evenly over ``group``; labels: [...] of
    global word numbers; num_valid: columns here that are words, the others are padding and take no part. Returns fp32
    [...], the same on every process of the group.
    """
    return _VocabParallelCrossEntropy.apply(logits, labels, num_valid, group)


class Terms(NamedTuple):
    """What a loss is made of, for the columns of one process (or a slice of them).

    first: number of the word in column 0; num_valid: columns that are words, the rest are padding.
    """

    first: int
    num_valid: int
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0


def first_word(columns: int, group: dist.ProcessGroup | None) -> int:
    """Number of the word in this process's first column."""
    return 0 if group is None else group.rank() * columns


def forward(
    logits: Tensor, labels: Tensor, terms: Terms, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, log-sum-exp, smoothing share of a word; empty without smoothing), each [...], fp32 or fp64.

    One collective: all-gather of (log-sum-exp of the columns here, label's logit, sum of logits, number of words).
    """
    wide = _wide(logits[..., : terms.num_valid])
    ignored = labels == terms.ignore_index
    local, here = _local(labels, terms)
    if terms.num_valid:
        target = wide.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(~here, -torch.inf)
        lse = wide.logsumexp(-1)
    else:
        lse = target = wide.new_full(labels.shape, -torch.inf)
    count = torch.full_like(lse, terms.num_valid)
    parts = torch.stack([lse, target, wide.sum(-1), count] if terms.label_smoothing else [lse, target])
    if group is not None and group.size() > 1:
        gathered = parts.new_empty(group.size(), *parts.shape)
        dist.all_gather_into_tensor(gathered.view(-1), parts.view(-1), group=group)
        lse, target = gathered[:, 0].logsumexp(0), gathered[:, 1].amax(0)
        parts = torch.stack([lse, target, *gathered[:, 2:].sum(0)])
    losses = (1.0 - terms.label_smoothing) * (lse - target)
    if terms.z_loss:
        losses = losses + terms.z_loss * lse.square()
    share = lse.new_empty(0)
    if terms.label_smoothing:
        share = terms.label_smoothing / parts[3]
        losses = losses + terms.label_smoothing * (lse - parts[2] / parts[3])
    return losses.masked_fill(ignored, 0.0), lse.masked_fill(ignored, 0.0), share


def gradient(
    dlosses: Tensor | None,
    dlse: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    saved: tuple[Tensor, Tensor],
    terms: Terms,
) -> Tensor:
    """Gradient of the logits, in their dtype; ``saved`` is (log-sum-exp, share) as from ``forward``."""
    lse, share = saved
    keep = (labels != terms.ignore_index).to(lse.dtype)
    zero = torch.zeros_like(lse)
    upstream = zero if dlosses is None else dlosses * keep
    along = upstream * (1.0 + 2.0 * terms.z_loss * lse) + (zero if dlse is None else dlse * keep)
    out = (_wide(logits[..., : terms.num_valid]) - lse.unsqueeze(-1)).exp_().mul_(along.unsqueeze(-1))
    if terms.num_valid:
        local, here = _local(labels, terms)
        push = (upstream * here).mul_(terms.label_smoothing - 1.0)
        out.scatter_add_(-1, local.unsqueeze(-1), push.unsqueeze(-1))
    if terms.label_smoothing:
        out.sub_((upstream * share).unsqueeze(-1))
    padding = logits.shape[-1] - terms.num_valid
    return torch.nn.functional.pad(out.to(logits.dtype), (0, padding)) if padding else out.to(logits.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _local(labels: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """(column of each label, clamped into the columns here; whether it was in them)."""
    local = labels - terms.first
    here = (local >= 0) & (local < terms.num_valid) & (labels != terms.ignore_index)
    return local.clamp(0, max(terms.num_valid - 1, 0)), here


class _CrossEntropy(torch.autograd.Function):
    """Saves the logits and one or two numbers per token."""

    @staticmethod
    def forward(ctx, logits, labels, terms, group):
        losses, lse, share = forward(logits, labels, terms, group)
        ctx.save_for_backward(logits, labels, lse, share)
        ctx.terms = terms
        ctx.set_materialize_grads(False)
        return losses, lse

    @staticmethod
    def backward(ctx, dlosses, dlse):
        logits, labels, lse, share = ctx.saved_tensors
        if dlosses is None and dlse is None:
            return None, None, None, None
        return gradient(dlosses, dlse, logits, labels, (lse, share), ctx.terms), None, None, None


def cross_entropy(
    logits: Tensor, labels: Tensor, terms: Terms, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """(losses, log-sum-exp) of each token, both differentiable: see op.py for the formula.

    logits: [..., v] of any float dtype, this process's columns; labels: [...] int64. Computed in fp32 (fp64 for fp64).
    """
    return _CrossEntropy.apply(logits, labels, terms, group)
