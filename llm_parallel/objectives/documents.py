"""Sums over the documents of a batch, whose tokens context-parallel ranks share."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from llm_parallel.data.batch import Batch
from llm_parallel.parallel.groups import Groups


class _SumOverContext(torch.autograd.Function):
    """Sum over context-parallel ranks. Each rank receives the whole sum; in backward it passes the gradient to its own
    tokens only."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def sum_by_document(values: Tensor, batch: Batch, groups: Groups) -> Tensor:
    """Sums ``values`` [..., b, s], one or more numbers for each token of this process, over each document's tokens on
    all context-parallel ranks, in one collective. Returns [..., b, d], with 0 for documents that a row does not have.
    ``batch`` is this process's context shard and must have ``documents``."""
    assert batch.documents is not None
    mesh = groups.mesh
    ranges = mesh.token_ranges(values.shape[-1] * mesh.cp, groups.at.cp)
    positions = torch.cat([torch.arange(part.start, part.stop) for part in ranges])
    numbers = batch.documents.of_positions(positions).to(values.device)
    sums = values.new_zeros(*values.shape[:-1], batch.documents.most).scatter_add(-1, numbers.expand_as(values), values)
    return _SumOverContext.apply(sums, groups.collection.cp) if mesh.cp > 1 else sums


def counted_once(total: Tensor, groups: Groups) -> Tensor:
    """Takes a sum that is the same on all context-parallel ranks and returns it with the value 0 on all but one, so
    that a sum over ranks counts it once; its gradient reaches all of them."""
    return total if groups.at.cp == 0 else total - total.detach()
