"""What is looked at beside the loss: whether a label is the likeliest token, and the entropy of the distribution.

Shapes: S positions, B rows, V columns of the vocabulary that this tensor-parallel rank holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

BLOCK_NUMBERS = 1 << 24
"""Logits that are looked at together, in fp32: 64 MiB. More would be a second copy of all logits."""
NOTHING = -1e30
"""Below every logit; the maximum of a rank whose columns are all padding of the vocabulary."""


@dataclass
class Seen:
    """What one forward pass of the last stage leaves for the record; without gradient."""

    hits: Tensor | None = None
    """fp32 [B, S]: 1 where the label is the likeliest token; of equally likely ones the first counts."""
    entropies: Tensor | None = None
    """fp32 [B, S], in nats."""


@torch.no_grad()
def observe(
    block_of: Callable[[slice], Tensor],
    labels_SB: Tensor,
    columns: int,
    num_valid: int,
    softcap: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> Seen:
    """``block_of`` gives the logits [rows, V = ``columns``] of some of the S·B positions; the first ``num_valid``
    columns count. With a ``group`` the vocabulary is divided over its ranks, at the cost of one all-gather of four
    numbers per position."""
    labels, rows = labels_SB.reshape(-1), block_rows(columns)
    first = 0 if group is None else group.rank() * columns
    blocks = (slice(start, start + rows) for start in range(0, len(labels), rows))
    found = torch.cat([sums_of_columns(block_of(block), num_valid, softcap, first) for block in blocks], dim=1)
    if group is not None and group.size() > 1:
        gathered = found.new_empty(group.size(), *found.shape)
        dist.all_gather_into_tensor(gathered.view(-1), found.contiguous().view(-1), group=group)
        found = joined(gathered)
    _, token, total, moment = found
    shape = labels_SB.shape
    hits = (token == labels.float()).float()
    return Seen(hits.view(shape).t(), (total.log() - moment / total).view(shape).t())


def block_rows(columns: int) -> int:
    """Positions whose logits are looked at together."""
    return max(1, BLOCK_NUMBERS // columns)


def sums_of_columns(logits: Tensor, num_valid: int, softcap: float, first: int = 0) -> Tensor:
    """fp32 [4, rows] of this rank's columns: the largest logit x, its token, and the sums of e and of e·(x - largest)
    with e = exp(x - largest). Tokens are exact in fp32 up to 2^24."""
    if not num_valid:
        none = logits.new_zeros(4, logits.shape[0], dtype=torch.float32)
        none[0] = NOTHING
        return none
    x = logits[:, :num_valid].float()
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    top, column = x.max(-1)
    # max may give any of several equal columns; the first one is wanted, so that layouts agree.
    column = torch.where(x == top.unsqueeze(-1), torch.arange(num_valid, device=x.device), num_valid).amin(-1)
    x = x - top.unsqueeze(-1)
    e = x.exp()
    return torch.stack([top, (column + first).float(), e.sum(-1), (e * x).sum(-1)])


def joined(gathered: Tensor) -> Tensor:
    """The same for the whole vocabulary, from [ranks, 4, rows]."""
    tops, tokens, totals, moments = gathered.unbind(1)
    top = tops.amax(0)
    token = torch.where(tops == top, tokens, torch.inf).amin(0)
    gap = tops - top
    scale = gap.exp()
    return torch.stack([top, token, (totals * scale).sum(0), (scale * (moments + gap * totals)).sum(0)])
