"""Causal attention in plain torch over segments: whole samples, documents, or a context shard's part of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


@dataclass(frozen=True)
class Segment:
    """Queries [q_start, q_end) of a row that see keys [k_start, k_end); the last query sees the last key (causal)."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int


def attention(q: Tensor, k: Tensor, v: Tensor, segments: tuple[tuple[Segment, ...], ...], scale: float) -> Tensor:
    """Causal grouped-query attention.

    q: [sq, b, heads, d]; k, v: [sk, b, groups, d]; heads is a multiple of groups. ``segments`` has one tuple for each
    batch row, or a single one for all rows; its segments cover the queries in order. Returns [sq, b, heads, d].
    """
    if len(segments) == 1 and len(segments[0]) == 1:
        return _segment(q, k, v, scale)
    rows = segments if len(segments) > 1 else segments * q.shape[1]
    if len(segments) == 1:
        return torch.cat([_segment(*_slice(q, k, v, part), scale) for part in segments[0]], dim=0)
    outputs = []
    for row, parts in enumerate(rows):
        qkv = (q[:, row : row + 1], k[:, row : row + 1], v[:, row : row + 1])
        outputs.append(torch.cat([_segment(*_slice(*qkv, part), scale) for part in parts], dim=0))
    return torch.cat(outputs, dim=1)


def _slice(q: Tensor, k: Tensor, v: Tensor, part: Segment) -> tuple[Tensor, Tensor, Tensor]:
    keys = slice(part.k_start, part.k_end)
    return q[part.q_start : part.q_end], k[keys], v[keys]


def _segment(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    num_queries, num_keys, heads, groups = q.shape[0], k.shape[0], q.shape[2], k.shape[2]
    q_BHSD, k_BHSD, v_BHSD = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    mask = None
    if num_queries not in (1, num_keys):
        # torch's is_causal aligns the first query with the first key; ours ends with the last.
        if q.is_cuda:
            mask = causal_lower_right(num_queries, num_keys)
        else:
            ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
            mask = ones.tril_(num_keys - num_queries)
    causal = num_queries == num_keys and num_queries > 1
    out = F.scaled_dot_product_attention(
        q_BHSD, k_BHSD, v_BHSD, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=heads != groups
    )
    return out.permute(2, 0, 1, 3)
