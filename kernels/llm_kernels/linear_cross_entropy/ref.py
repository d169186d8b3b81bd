"""Output projection and cross entropy in plain torch, one after the other: all logits exist."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from llm_kernels.cross_entropy import ref as cross_entropy
from llm_kernels.cross_entropy.ref import Terms
from llm_kernels.dispatch import first_derivative_only


class _EveryColumn(torch.autograd.Function):
    """Hidden states go to every process's columns, so their gradient is the sum over processes."""

    @staticmethod
    def forward(ctx, hidden, group):
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    @first_derivative_only("linear_cross_entropy")
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    terms: Terms,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Losses [...] of ``hidden @ weight.T + bias``. hidden: [..., h], weight: [v, h], bias: [v] or none, of one dtype;
    labels: [...] int64."""
    if group is not None and group.size() > 1:
        hidden = _EveryColumn.apply(hidden, group)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return cross_entropy.cross_entropy(logits, labels, terms, group)[0]
