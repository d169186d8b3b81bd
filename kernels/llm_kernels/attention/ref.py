"""Attention in plain torch over segments: whole samples, documents, or a context-parallel rank's part of them.

``attention`` is causal and fast (torch's own attention, segment by segment); ``explicit`` supports every option of the
kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Queries [q_start, q_end) of a row that see keys [k_start, k_end); the last query sees the last key (causal)."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: tuple[tuple[Segment, ...], ...],
    scale: float,
    left: int = -1,
    softcap: float = 0.0,
) -> Tensor:
    """Causal grouped-query attention. ``left``: keys before its own that a query sees, -1 for all.

    q: [sq, b, heads, d]; k, v: [sk, b, groups, d]; heads is a multiple of groups. ``segments`` has one tuple for each
    batch row, or a single one for all rows; its segments cover the queries in order. Returns [sq, b, heads, d].
    """
    if len(segments) == 1 and len(segments[0]) == 1:
        return _segment(q, k, v, scale, left, softcap)
    rows = segments if len(segments) > 1 else segments * q.shape[1]
    if softcap <= 0 and sum(map(len, rows)) >= MANY and _whole(rows):
        return _batched(q, k, v, rows, scale, left)
    if len(segments) == 1:
        return torch.cat([_segment(*_slice(q, k, v, part), scale, left, softcap) for part in segments[0]], dim=0)
    outputs = []
    for row, parts in enumerate(rows):
        qkv = (q[:, row : row + 1], k[:, row : row + 1], v[:, row : row + 1])
        outputs.append(torch.cat([_segment(*_slice(*qkv, part), scale, left, softcap) for part in parts], dim=0))
    return torch.cat(outputs, dim=1)


MANY = 8
"""Segments from which it pays to compute several in one call of torch's attention, padded to one length."""
LONGER = 1.25
"""Segments share a call if the longest has at most this many times the tokens of the shortest, or ``SHORT`` tokens."""
SHORT = 32


def _whole(rows: tuple[tuple[Segment, ...], ...]) -> bool:
    """Whether every segment has as many keys as queries, as documents that are not divided have."""
    return all(part.q_end - part.q_start == part.k_end - part.k_start for parts in rows for part in parts)


@lru_cache(maxsize=8)
def _buckets(
    rows: tuple[tuple[Segment, ...], ...], sq: int, device: torch.device
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Places of the segments' tokens in tensors [sq, b] made flat: for each bucket of segments of similar lengths
    (queries, keys), int64 [segments, longest], in which padding repeats the last token; and where each token's result
    lies among those of all buckets."""
    b = len(rows)
    ordered = sorted(
        ((part.q_end - part.q_start, row, part) for row, parts in enumerate(rows) for part in parts),
        key=lambda item: (item[0], item[1], item[2].q_start),
    )
    buckets: list[list[tuple[int, int, Segment]]] = []
    for item in ordered:
        if not buckets or item[0] > max(LONGER * buckets[-1][0][0], SHORT):
            buckets.append([])
        buckets[-1].append(item)
    places, results, before = [], torch.empty(sq * b, dtype=torch.int64), 0
    for bucket in buckets:
        lengths, of_row = (torch.tensor([item[n] for item in bucket]).unsqueeze(1) for n in (0, 1))
        starts = [
            torch.tensor([part.q_start for _, _, part in bucket]),
            torch.tensor([p.k_start for _, _, p in bucket]),
        ]
        longest = bucket[-1][0]
        steps = torch.arange(longest).minimum(lengths - 1)
        queries, keys = ((start.unsqueeze(1) + steps) * b + of_row for start in starts)
        places.append((queries.to(device), keys.to(device)))
        slots = torch.arange(before, before + queries.numel()).view_as(queries)
        real = torch.arange(longest) < lengths
        results[queries[real]] = slots[real]
        before += queries.numel()
    return places, results.to(device)


def _batched(q: Tensor, k: Tensor, v: Tensor, rows: tuple[tuple[Segment, ...], ...], scale: float, left: int) -> Tensor:
    """``attention`` for segments with as many keys as queries. A query does not see what comes after it, so padding at
    a segment's end changes nothing before it."""
    places, results = _buckets(rows, q.shape[0], q.device)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    found = []
    for queries, keys in places:
        chosen = zip(flat, (queries, keys, keys))
        taken = [x.index_select(0, at.flatten()).unflatten(0, at.shape) for x, at in chosen]
        q_LND, k_LND, v_LND = (x.transpose(0, 1) for x in taken)
        out = _segment(q_LND, k_LND, v_LND, scale, left, 0.0)
        found.append(out.transpose(0, 1).flatten(0, 1))
    return torch.cat(found).index_select(0, results).view_as(q)


def _slice(q: Tensor, k: Tensor, v: Tensor, part: Segment) -> tuple[Tensor, Tensor, Tensor]:
    keys = slice(part.k_start, part.k_end)
    return q[part.q_start : part.q_end], k[keys], v[keys]


def _segment(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, softcap: float) -> Tensor:
    num_queries, num_keys, heads, groups = q.shape[0], k.shape[0], q.shape[2], k.shape[2]
    if softcap > 0:
        table = torch.tensor([[row, 0, num_queries, 0, num_keys] for row in range(q.shape[1])], device=q.device)
        return explicit(q, k, v, table, Options(scale, left, 0, softcap))[0]
    q_BHSD, k_BHSD, v_BHSD = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    mask = None
    if 0 <= left < num_keys - 1:
        ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
        mask = ones.tril_(num_keys - num_queries).triu_(num_keys - num_queries - left)
    elif num_queries not in (1, num_keys):
        # torch's is_causal aligns the first query with the first key; ours ends with the last.
        if q.is_cuda:
            from torch.nn.attention.bias import causal_lower_right  # imports triton

            mask = causal_lower_right(num_queries, num_keys)
        else:
            ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
            mask = ones.tril_(num_keys - num_queries)
    causal = mask is None and num_queries == num_keys and num_queries > 1
    out = F.scaled_dot_product_attention(
        q_BHSD, k_BHSD, v_BHSD, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=heads != groups
    )
    return out.permute(2, 0, 1, 3)


class Options(NamedTuple):
    """How scores become weights. ``causal`` is ``right = 0`` here; -1 in left or right means no limit."""

    scale: float
    left: int = -1
    right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0
    seed: int = 0


def explicit(q: Tensor, k: Tensor, v: Tensor, table: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Attention with all scores in memory: the reference. Computed in fp64 for fp64 inputs, in fp32 for all others.

    q: [sq, b, h, d]; k, v: [sk, b, g, d]; table: int [n, 5] of (batch row, q_start, q_end, k_start, k_end).
    Query i of a segment sees those keys j of the segment with ``-left <= j - (i + len_k - len_q) <= right``.
    s = scale q k', or softcap tanh(scale q k' / softcap) where softcap > 0; weights = softmax(s) over the seen keys.
    Dropout zeroes weights by ``dropout_keep`` and divides the others by 1 - dropout_p. The log-sum-exp is of s, before
    dropout. Returns out [sq, b, h, d] in q's dtype and lse [b, h, sq] in fp32 (fp64 for fp64). For a query that sees no
    key these are 0 and -inf.
    """
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    repeats = q.shape[2] // k.shape[2]
    keys, values = (x.to(exact).repeat_interleave(repeats, dim=2) for x in (k, v))
    scores = torch.einsum("qbhd,kbhd->bhqk", q.to(exact) * options.scale, keys)
    if options.softcap > 0:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    visible = visibility(table, q.shape[1], q.shape[0], k.shape[0], options).unsqueeze(1)
    seen = visible.any(-1)
    # Softmax of a row that is all -inf is NaN, and so is its gradient, even if the value is replaced afterwards.
    scores = scores.masked_fill(~visible & seen.unsqueeze(-1), -torch.inf)
    lse = torch.logsumexp(scores, -1).masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1).masked_fill(~visible, 0.0)
    if options.dropout_p > 0:
        keep = dropout_keep(options, table, weights.shape)
        weights = weights * keep / (1 - options.dropout_p)
    return torch.einsum("bhqk,kbhd->qbhd", weights, values).to(q.dtype), lse


def visibility(table: Tensor, b: int, sq: int, sk: int, options: Options) -> Tensor:
    """Which keys each query sees, bool [b, sq, sk]. The host reads no number from the device."""
    of_query, of_key, (q_start, q_end, k_start, k_end) = _places(table, b, sq, sk)
    shift = (k_end - k_start) - (q_end - q_start) - q_start
    aligned = torch.arange(sq, device=table.device) + shift[of_query]
    key = torch.arange(sk, device=table.device) - k_start[of_key]
    distance = key.unsqueeze(1) - aligned.unsqueeze(2)
    visible = (of_query.unsqueeze(2) == of_key.unsqueeze(1)) & (of_query > 0).unsqueeze(2)
    if options.left >= 0:
        visible &= distance >= -options.left
    if options.right >= 0:
        visible &= distance <= options.right
    return visible


def _places(table: Tensor, b: int, sq: int, sk: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The segment of each query [b, sq] and of each key [b, sk], counted from 1, with 0 for none; and, indexed by these
    numbers, the starts and ends of the segments' queries and keys."""
    number = torch.arange(1, len(table) + 1, device=table.device).unsqueeze(1)
    here = (table[:, :1] == torch.arange(b, device=table.device)) * number
    found = []
    for first, length in ((1, sq), (3, sk)):
        at = torch.arange(length, device=table.device)
        inside = (at >= table[:, first : first + 1]) & (at < table[:, first + 1 : first + 2])
        found.append((here.double().mT @ inside.double()).long())  # CUDA has no matrix product of integers
    bounds = torch.cat([table.new_zeros(1, 5), table]).long()
    return found[0], found[1], bounds.unbind(1)[1:]


def dropout_threshold(dropout_p: float) -> int:
    """A weight is kept if 32 random bits, read as a signed integer, are at least this number."""
    return int(dropout_p * 2**32) - 2**31


def dropout_keep(options: Options, table: Tensor, shape: Sequence[int]) -> Tensor:
    """The kernels' dropout mask, bool [b, h, sq, sk], true where a weight is kept. Where query and key are in different
    segments its values mean nothing.

    Philox4x32-7 (Salmon et al. 2011, doi 10.1145/2063384.2063405) with the 64 bits of the seed as key. One call decides
    for four weights: its counter is (key, query, batch row * h + head, q_start of the segment), where key and query
    count from the start of the segment and bit 3 of both is left out; of its four results, number 2 (query's bit 3) +
    (key's bit 3) decides. So the mask does not depend on the tiles.
    """
    b, h, sq, sk = shape
    of_query, of_key, (q_start, _q_end, k_start, _k_end) = _places(table, b, sq, sk)
    last = q_start[of_query].view(b, 1, sq, 1)
    query = torch.arange(sq, device=table.device).view(sq, 1) - last
    key = (torch.arange(sk, device=table.device) - k_start[of_key]).view(b, 1, 1, sk)
    head = torch.arange(b * h, device=table.device).view(b, h, 1, 1)
    words = _philox(options.seed, (_without_bit_3(key), _without_bit_3(query), head, last))
    low, high = (torch.where(key & 8 > 0, words[i + 1], words[i]) for i in (0, 2))
    bits = torch.where(query & 8 > 0, high, low)
    return bits - (bits >= 2**31) * 2**32 >= dropout_threshold(options.dropout_p)


def _without_bit_3(index: Tensor) -> Tensor:
    return (index >> 4 << 3) | (index & 7)


def _philox(seed: int, counter: tuple[Tensor, ...]) -> list[Tensor]:
    """The four 32-bit results of philox4x32-7 for a counter of four 32-bit numbers, all held in int64."""
    low = 0xFFFFFFFF
    words = list(counter)
    key_0, key_1 = seed & low, (seed >> 32) & low
    for _ in range(7):
        high_0, low_0 = _multiply(words[0], 0xD2511F53)
        high_2, low_2 = _multiply(words[2], 0xCD9E8D57)
        words = [high_2 ^ words[1] ^ key_0, low_2, high_0 ^ words[3] ^ key_1, low_0]
        key_0, key_1 = (key_0 + 0x9E3779B9) & low, (key_1 + 0xBB67AE85) & low
    return words


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of the product of two 32-bit numbers held in int64, which would overflow at 63 bits."""
    high = (((x & 0xFFFF) * factor >> 16) + (x >> 16) * factor) >> 16
    return high, (x * factor) & 0xFFFFFFFF
