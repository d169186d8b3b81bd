"""Attention of ``kernels.deterministic``: the keys of a sequence are taken in blocks that begin at its first one, and
the blocks are added in order, so that a query gets the same numbers alone and among others, and whether its keys come
from a cache or from the same call.

Shapes: n queries, L keys, G key/value groups, M query heads of a group, D head dim, C blocks of keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_kernels.attention.ref import Segment
from llm_kernels.attention.ref import attention as attention_by_segment

KEYS = 64
"""Keys of a block."""
QUERIES = 256
"""Queries of one call; its scores are all in memory."""
ROWS = 16
"""torch's batched products round a row alike if the number of rows is a multiple of 16, for up to 16 threads."""


@dataclass(frozen=True)
class Scores:
    """scale: of the scores; left: keys before its own that a query sees, -1 for all; softcap: 0 for none."""

    scale: float
    left: int = -1
    softcap: float = 0.0


def whole_blocks(length: int) -> int:
    """Keys of the blocks that hold ``length`` keys."""
    return -(-length // KEYS) * KEYS


def attend(q_nGMD: Tensor, k_GLD: Tensor, v_GLD: Tensor, length: int | Tensor, how: Scores) -> Tensor:
    """Attention of ``n`` queries that belong to the last of ``length`` keys → [n, G, M, D] in q's dtype, without a
    gradient. k, v: fp32, L a multiple of ``KEYS``; finite numbers stand behind the last key. ``length``: one number, or
    int64 [G] for each group (sequences that are put side by side)."""
    n, groups, members, dim = q_nGMD.shape
    rows, blocks = n * members, k_GLD.shape[1] // KEYS
    q_GRD = q_nGMD.permute(1, 0, 2, 3).reshape(groups, rows, dim).float() * how.scale
    q_GRD = F.pad(q_GRD, (0, 0, 0, -rows % ROWS))
    scores = torch.bmm(q_GRD, k_GLD.transpose(1, 2))
    if how.softcap:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    lengths = torch.as_tensor(length).reshape(-1, 1, 1)
    own = lengths - n + (torch.arange(q_GRD.shape[1]) // members).clamp(max=n - 1).unsqueeze(-1)
    keys = torch.arange(k_GLD.shape[1])
    hidden = keys > own
    if how.left >= 0:
        hidden |= keys < own - how.left
    scores.masked_fill_(hidden, -torch.inf)
    weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_().unflatten(-1, (blocks, KEYS))
    sums = weights.sum(-1)
    found = torch.bmm(
        weights.transpose(1, 2).reshape(groups * blocks, -1, KEYS), v_GLD.reshape(groups * blocks, KEYS, dim)
    ).unflatten(0, (groups, blocks))
    out, total = found[:, 0], sums[:, :, 0]
    for block in range(1, blocks):
        out, total = out + found[:, block], total + sums[:, :, block]
    out = (out / total.unsqueeze(-1))[:, :rows].unflatten(1, (n, members))
    return out.permute(1, 0, 2, 3).to(q_nGMD.dtype)


def in_blocks(x_LGD: Tensor) -> Tensor:
    """Keys or values [L, G, D] → fp32 [G, whole blocks, D] with zeros behind the last."""
    length = x_LGD.shape[0]
    wide = x_LGD.new_zeros(x_LGD.shape[1], whole_blocks(length), x_LGD.shape[2], dtype=torch.float32)
    wide[:, :length] = x_LGD.transpose(0, 1)
    return wide


def attend_in_chunks(q_nGMD: Tensor, k_LGD: Tensor, v_LGD: Tensor, how: Scores) -> Tensor:
    """``attend`` for keys [L, G, D] of one sequence, some queries at a time."""
    n, length = q_nGMD.shape[0], k_LGD.shape[0]
    k_GLD, v_GLD = in_blocks(k_LGD), in_blocks(v_LGD)
    found = []
    for start in range(0, n, QUERIES):
        end = min(start + QUERIES, n)
        seen = length - n + end
        size = whole_blocks(seen)
        found.append(attend(q_nGMD[start:end], k_GLD[:, :size], v_GLD[:, :size], seen, how))
    return found[0] if len(found) == 1 else torch.cat(found)


def _pieces(q: Tensor, segments: Sequence[Sequence[Segment]]) -> Iterator[tuple[slice, slice, slice]]:
    """(queries, keys, rows of the batch) of each call."""
    for row, parts in enumerate(segments):
        rows = slice(None) if len(segments) == 1 else slice(row, row + 1)
        for part in parts:
            yield slice(part.q_start, part.q_end), slice(part.k_start, part.k_end), rows


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Any, how: Scores) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.segments, ctx.how = segments, how
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        groups = k.shape[2]
        for queries, keys, rows in _pieces(q, segments):
            # Rows of the batch that see the same places are groups beside each other.
            q_nGMD = q[queries, rows].unflatten(2, (groups, -1)).flatten(1, 2)
            k_LGD, v_LGD = (x[keys, rows].flatten(1, 2) for x in (k, v))
            found = attend_in_chunks(q_nGMD, k_LGD, v_LGD, how)
            out[queries, rows] = found.unflatten(1, (-1, groups)).flatten(2, 3)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradient of torch's own attention, which is computed again for it."""
        with torch.enable_grad():
            inputs = q, k, v = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            how = ctx.how
            out = attention_by_segment(q, k, v, ctx.segments, how.scale, how.left, how.softcap)
        return *torch.autograd.grad(out, inputs, grad), None, None


def attention(q: Tensor, k: Tensor, v: Tensor, segments: tuple[tuple[Segment, ...], ...], how: Scores) -> Tensor:
    """Causal grouped-query attention: arguments and result of ``llm_kernels.attention.ref.attention``."""
    out: Tensor = _Attention.apply(q, k, v, segments, how)
    return out
