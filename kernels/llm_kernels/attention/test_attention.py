"""Attention over segments against an explicit softmax in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_kernels.attention.ref import Segment, attention
from llm_kernels.testing import TOLERANCE, assert_matches, random

Rows = tuple[tuple[Segment, ...], ...]


def truth(q: Tensor, k: Tensor, v: Tensor, segments: Rows) -> Tensor:
    heads, groups = q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(heads // groups, dim=2) for x in (k, v))
    out = []
    for row in range(q.shape[1]):
        parts = []
        for part in segments[row if len(segments) > 1 else 0]:
            queries = q[part.q_start : part.q_end, row]
            keys, values = k[part.k_start : part.k_end, row], v[part.k_start : part.k_end, row]
            scores = torch.einsum("qhd,khd->hqk", queries, keys) * 0.3
            first = len(keys) - len(queries)
            seen = torch.arange(len(keys)) <= torch.arange(len(queries)).unsqueeze(1) + first
            parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values))
        out.append(torch.cat(parts))
    return torch.stack(out, dim=1)


CASES: dict[str, tuple[int, Rows]] = {
    "whole samples": (12, ((Segment(0, 12, 0, 12),),)),
    "one new token": (1, ((Segment(0, 1, 0, 9),),)),
    "new tokens after cached ones": (4, ((Segment(0, 4, 0, 12),),)),
    "context shard": (6, ((Segment(0, 3, 0, 3), Segment(3, 6, 0, 12)),)),
    "documents of each row": (8, ((Segment(0, 3, 0, 3), Segment(3, 8, 3, 8)), (Segment(0, 8, 0, 8),))),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_matches_fp64(case: str, groups: int, dtype: torch.dtype) -> None:
    queries, segments = CASES[case]
    keys = max(part.k_end for row in segments for part in row)
    inputs = [
        random(queries, 2, 4, 8, dtype=dtype),
        random(keys, 2, groups, 8, dtype=dtype, seed=1),
        random(keys, 2, groups, 8, dtype=dtype, seed=2),
    ]
    assert_matches(lambda q, k, v: attention(q, k, v, segments, 0.3), lambda q, k, v: truth(q, k, v, segments), inputs)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_documents_of_any_length(lengths: list[int]) -> None:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    segments = (tuple(Segment(end - size, end, end - size, end) for end, size in zip(ends, lengths)),)
    inputs = [random(ends[-1], 1, 2, 4, dtype=torch.float32, seed=seed) for seed in range(3)]
    assert_matches(lambda q, k, v: attention(q, k, v, segments, 0.3), lambda q, k, v: truth(q, k, v, segments), inputs)
