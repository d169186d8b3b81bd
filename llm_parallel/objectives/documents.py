"""Sums over the documents of a batch, whose tokens context-parallel ranks share."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Answers:
    """Sums over the weighted labels of each document, [b, d]: ``logps`` under the model, ``reference`` under the
    reference model (0 where none is read), each label's times its weight; ``lengths``: the number of those labels.
    ``exists``: whether there are any, which there are not in padding. ``here``: 1 where this process counts the
    document, else 0."""

    logps: Tensor
    reference: Tensor
    lengths: Tensor
    exists: Tensor
    here: Tensor

    @property
    def gains(self) -> Tensor:
        """log p - log q."""
        return self.logps - self.reference

    @property
    def per_token(self) -> Tensor:
        """1 / length, and 0 for documents that do not exist."""
        return self.exists / self.lengths.clamp(min=1.0)


def answers_of(batch: Batch, groups: Groups, losses: Tensor, reference: bool) -> Answers:
    """What objectives over whole answers need of the losses [b, s] of this process's labels."""
    weights, used = batch.weights, batch.weights != 0
    parts = [torch.where(used, -losses * weights, 0.0)]
    if reference:
        parts.append(torch.where(used, batch.columns["reference"] * weights, 0.0).to(losses.dtype))
    sums = sum_by_document(torch.stack([*parts, used.to(losses.dtype)]), batch, groups)
    exists = sums[-1] > 0
    here = exists & (groups.at.cp == 0)
    zero = torch.zeros_like(sums[0])
    return Answers(sums[0], sums[1] if reference else zero, sums[-1], exists, here.to(losses.dtype))


def fact(batch: Batch, name: str, like: Tensor) -> Tensor:
    """A fact of every document, [b, d], in the dtype and on the device of ``like``."""
    return batch.facts[name].to(like)
