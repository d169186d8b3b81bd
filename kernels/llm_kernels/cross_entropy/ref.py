"""Cross entropy over a vocabulary that is divided over processes, in plain torch (arXiv 1909.08053, section 3)."""

from __future__ import annotations

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
