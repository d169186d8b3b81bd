"""Cross entropy over a vocabulary that is divided over processes, in plain torch (arXiv 1909.08053, section 3)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Saves the logits and one number per token; the softmax is computed again in backward, in fp32."""

    @staticmethod
    def forward(ctx, logits, labels, num_valid, group):
        parts = 1 if group is None else group.size()
        first = 0 if group is None else group.rank() * logits.shape[-1]
        valid = logits[..., :num_valid].float()
        if num_valid:
            log_sum = torch.logsumexp(valid, dim=-1)
        else:
            log_sum = torch.full(labels.shape, -torch.inf, device=logits.device)
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
        ctx.save_for_backward(logits, log_sum, local, here)
        ctx.num_valid = num_valid
        return log_sum - target

    @staticmethod
    def backward(ctx, grad):
        logits, log_sum, local, here = ctx.saved_tensors
        out = logits.float() - log_sum.unsqueeze(-1)
        out.exp_().mul_(grad.unsqueeze(-1))
        out[..., ctx.num_valid :] = 0.0
        out.scatter_add_(-1, local.unsqueeze(-1), -(grad * here).unsqueeze(-1))
        return out.to(logits.dtype), None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, num_valid: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Negative log-likelihood of each label.

    logits: [..., v], this process's columns of the vocabulary, which is divided evenly over ``group``; labels: [...] of
    global word numbers; num_valid: columns here that are words, the others are padding and take no part. Returns fp32
    [...], the same on every process of the group.
    """
    return _VocabParallelCrossEntropy.apply(logits, labels, num_valid, group)
