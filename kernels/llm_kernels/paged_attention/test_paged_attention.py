"""Paged attention: the kernels against an explicit softmax in fp64, beside torch's attention in the same dtype; bytes
moved; and the plan against a loop over keys.

The names of cases say which regime they cover. Where splits must be short, so that few keys make several, the tests
set the size of a split to that of a tile.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton")

from llm_kernels.memory_checker import Traffic
from llm_kernels.paged_attention import plan as plans
from llm_kernels.paged_attention import ref
from llm_kernels.paged_attention.op import heads_of, paged_attention
from llm_kernels.paged_attention.plan import Plan, Tables
from llm_kernels.paged_attention.tiles import Heads, Tile, large_tile, small_tile, split_keys
from llm_kernels.testing import cases_of, compare, default_device, random

DEVICE = default_device()


@dataclass(frozen=True)
class Case:
    """counts, lengths: queries and keys of each request; heads: (query heads of a group, groups, head dim)."""

    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    heads: tuple[int, int, int] = (3, 2, 32)
    page: int = 16
    dtype: torch.dtype = torch.float32
    how: dict[str, Any] = field(default_factory=dict)
    short: bool = False


def pages_of(case: Case, spare: int = 2) -> list[list[int]]:
    """Pages in random order; some belong to nobody."""
    needed = [-(-length // case.page) for length in case.lengths]
    order = torch.randperm(sum(needed) + spare, generator=torch.Generator().manual_seed(1)).tolist()
    return [[order.pop() for _ in range(number)] for number in needed]


def inputs_of(case: Case) -> tuple[list[Tensor], list[list[int]]]:
    """q, k, v and the pages. Slots that hold no key are NaN, as fresh memory may be."""
    members, groups, d = case.heads
    pages = pages_of(case)
    slots = case.page * (sum(map(len, pages)) + 2)
    q = random(sum(case.counts), groups * members, d, dtype=case.dtype).detach()
    held = torch.zeros(slots, dtype=torch.bool)
    for of, length in zip(pages, case.lengths):
        at = torch.arange(length)
        held[torch.tensor(of)[at // case.page] * case.page + at % case.page] = True
    k, v = (random(slots, groups, d, dtype=case.dtype, seed=seed).detach() for seed in (1, 2))
    return [q, *(x.masked_fill(~held.to(x.device)[:, None, None], math.nan) for x in (k, v))], pages


def framework(plan: Plan, scale: float, left: int, softcap: float) -> Callable[..., Tensor]:
    """Torch's attention in the inputs' dtype for each request; plain products for the soft cap."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = []
        for (first, count, length), of in zip(plan.parts.tolist(), plan.pages):
            at = torch.arange(length, device=q.device)
            slots = of[at // plan.page_tokens].long() * plan.page_tokens + at % plan.page_tokens
            repeats = q.shape[1] // k.shape[1]
            heads = [x[slots].repeat_interleave(repeats, 1).transpose(0, 1) for x in (k, v)]
            queries = q[first : first + count].transpose(0, 1)
            own = torch.arange(length - count, length, device=q.device)[:, None]
            seen = (at <= own) & ((at >= own - left) if left >= 0 else at >= 0)
            if softcap:
                scores = softcap * torch.tanh(queries @ heads[0].mT * scale / softcap)
                out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ heads[1]
            else:
                out = F.scaled_dot_product_attention(queries, *heads, seen, scale=scale)
            found.append(out.transpose(0, 1))
        return torch.cat(found)

    return run


CASES = {
    "decoding, ends of pages, splits of one request": Case((1,) * 5, (1, 15, 16, 17, 600), (4, 2, 64)),
    "decoding in bf16": Case((1, 1, 1), (700, 90, 2), (4, 1, 64), dtype=torch.bfloat16),
    "decoding in fp16": Case((1, 1), (300, 33), (2, 2, 32), dtype=torch.float16),
    "one head a group, wide pages": Case((1, 1), (100, 65), (1, 3, 32), page=128),
    "pages that are no power of two": Case((1, 2), (70, 31), page=12),
    "single tokens, a few queries, and a chunk of several tiles": Case((1, 3, 30), (40, 20, 50), short=True),
    "a chunk of several tiles in bf16": Case((1, 70), (20, 100), (2, 1, 16), dtype=torch.bfloat16, short=True),
    "more heads in a group than a tile has rows": Case((1, 1), (40, 3), (35, 1, 16), short=True),
    "padded head dim": Case((1, 2), (45, 20), (2, 1, 40), short=True),
    "widest head": Case((1,), (70,), (2, 1, 256), dtype=torch.bfloat16),
    "window over several splits": Case((1, 1, 4), (200, 20, 90), (2, 1, 16), how={"left": 50}, short=True),
    "window of one": Case((1, 3), (70, 40), (2, 1, 16), how={"left": 0}, short=True),
    "soft cap and scale": Case((1, 5), (70, 40), how={"softcap": 2.0, "scale": 0.4}, short=True),
    "soft cap in bf16": Case((1, 5), (70, 40), how={"softcap": 30.0}, dtype=torch.bfloat16, short=True),
}
QUICK = CASES.keys() - {"decoding in fp16", "widest head", "window of one"}


@pytest.mark.parametrize("case", cases_of({name: [case] for name, case in CASES.items()}, QUICK))
def test_against_fp64(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.short:
        monkeypatch.setattr(plans, "split_keys", lambda rows, heads, tile: tile.keys)
    inputs, pages = inputs_of(case)
    plan = Plan.make(case.counts, case.lengths, pages, case.page, heads_of(*inputs[:2]), DEVICE)
    options = {"scale": case.heads[2] ** -0.5, "left": -1, "softcap": 0.0, **case.how}
    compare(
        "paged_attention/" + str(case.lengths),
        lambda *x: paged_attention(*x, plan, backend="triton", **case.how),
        framework(plan, **options),
        lambda *x: ref.paged_attention(*x, plan, **options),
        inputs,
    )


def test_a_request_does_not_depend_on_the_others() -> None:
    """Bit for bit: neither its sums' order nor its tiles depend on what else is in the pass."""
    case = Case((1, 1, 1), (600, 40, 300), (3, 1, 16), dtype=torch.bfloat16)
    (q, k, v), pages = inputs_of(case)
    heads = heads_of(q, k)
    together = paged_attention(
        q, k, v, Plan.make(case.counts, case.lengths, pages, 16, heads, DEVICE), backend="triton"
    )
    for row, (length, of) in enumerate(zip(case.lengths, pages)):
        plan = Plan.make([1], [length], [of], 16, heads, DEVICE)
        alone = paged_attention(q[row : row + 1], k, v, plan, backend="triton")
        assert torch.equal(alone[0], together[row])


def test_queries_in_a_packed_projection_and_rows_of_no_request() -> None:
    """q is a view with gaps; two more rows of it belong to nobody, and get zeros."""
    case = Case((1, 2), (20, 9), (2, 2, 16))
    (q, k, v), pages = inputs_of(case)
    packed = torch.full((5, 2, 4, 16), math.nan, device=DEVICE)
    packed[:3, :, :2] = q.view(3, 2, 2, 16)
    tables = Tables.make(case.counts, case.lengths, pages, 16, heads_of(q, k), rows=5)
    out = paged_attention(packed[:, :, :2].flatten(1, 2), k, v, tables.to(DEVICE), backend="triton")
    whole = paged_attention(q, k, v, Plan.make(*case_plan(case, pages, q, k)), backend="triton")
    assert torch.equal(out[:3], whole) and not out[3:].any()


def case_plan(case: Case, pages: list[list[int]], q: Tensor, k: Tensor) -> tuple[Any, ...]:
    return case.counts, case.lengths, pages, case.page, heads_of(q, k), DEVICE


# Query heads of a group and head dim of the presets: Llama 2 7B and 13B, 3 8B, 2 and 3 70B, 405B; Qwen2.5 7B; SmolLM2.
PRESETS = {"m=1": (1, 128), "m=4": (4, 128), "m=8": (8, 128), "m=16": (16, 128), "m=7": (7, 128), "m=3": (3, 64)}


@pytest.mark.parametrize("heads", cases_of({name: [heads] for name, heads in PRESETS.items()}, ["m=8", "m=3"]))
def test_bytes_moved(heads: tuple[int, int], traffic: Traffic) -> None:
    """Within 3 % of the least: keys and values once, q and out once, and the numbers of the pages."""
    members, d = heads
    split = split_keys(members, Heads(members, d, 2, 80), small_tile(Heads(members, d, 2, 80)))
    lengths = (2 * split + 100, split)
    case = Case((1, 1), lengths, (members, 2, d), dtype=torch.bfloat16)
    inputs, pages = inputs_of(case)
    plan = Plan.make(*case_plan(case, pages, *inputs[:2]))
    paged_attention(*inputs, plan, backend="triton")
    least = 2 * 2 * 2 * d * sum(lengths) + 2 * 2 * inputs[0].numel() + 4 * sum(map(len, pages))
    moved = traffic.bytes_loaded + traffic.bytes_stored
    print(f"{members} heads a group, head dim {d}: {moved / least:.4f}")
    assert least <= moved <= 1.03 * least


requests = st.lists(st.tuples(st.integers(1, 90), st.integers(0, 300)), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(requests, st.sampled_from([1, 3, 8, 40]), st.sampled_from([16, 64]), st.booleans())
def test_the_plan_gives_every_visible_key_to_one_program(
    sizes: list[tuple[int, int]], members: int, d: int, short: bool
) -> None:
    heads = Heads(members, d, 4, 80)
    counts, lengths = [count for count, _ in sizes], [count + before for count, before in sizes]
    pages = [list(range(-(-length // 16))) for length in lengths]
    with pytest.MonkeyPatch.context() as patch:
        if short:
            patch.setattr(plans, "split_keys", lambda rows, heads, tile: tile.keys)
        plan = Tables.make(counts, lengths, pages, 16, heads).to("cpu")
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for launch, tile in ((plan.small, small_tile(heads)), (plan.large, large_tile(heads))):
        check_launch(launch, tile, plan, members, found)
    for part, count in enumerate(counts):
        for row in range(count * members):
            seen = lengths[part] - count + row // members + 1
            ranges = sorted(found[part, row])
            assert ranges[0][0] == 0 and all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
            assert ranges[-1][1] >= seen and ranges[-1][1] <= lengths[part]
    assert len(found) == sum(counts) * members


def check_launch(launch: plans.Launch, tile: Tile, plan: Plan, members: int, found: dict) -> None:
    """Collects the ranges of keys of every row, and asserts that slots are used once and merged as they were given."""
    given_slots: dict[tuple[int, int], list[int]] = {}
    for part, first, begin, end, slot in launch.work.tolist():
        assert begin < end and begin % tile.keys == 0
        rows = min(tile.rows, int(plan.parts[part, 1]) * members - first)
        assert 0 < rows <= launch.rows
        for row in range(first, first + rows):
            found.setdefault((part, row), []).append((begin, end))
        if slot >= 0:
            given_slots.setdefault((part, first), []).append(slot)
    merged = {(part, first): list(range(slot, slot + splits)) for part, first, slot, splits in launch.merges.tolist()}
    assert merged == given_slots
    assert sorted(slot for of in merged.values() for slot in of) == list(range(launch.slots))


def test_bad_input() -> None:
    case = Case((1, 2), (20, 9), (2, 2, 16))
    (q, k, v), pages = inputs_of(case)
    heads = heads_of(q, k)
    for counts, lengths, of, said in (
        ((0, 2), (20, 9), pages, "request 0 has 0 queries and 20 keys"),
        ((1, 10), (20, 9), pages, "request 1 has 10 queries and 9 keys"),
        ((1, 2), (33, 9), pages, "request 0 has 33 keys and 2 pages of 16 tokens"),
        ((1,), (20, 9), pages, "of 1, 2 and 2 requests"),
    ):
        with pytest.raises(ValueError, match=said):
            Plan.make(counts, lengths, of, 16, heads, DEVICE)
    with pytest.raises(ValueError, match="page_tokens = 0"):
        Plan.make((1, 2), (20, 9), pages, 0, heads, DEVICE)
    plan = Plan.make(*case_plan(case, pages, q, k))
    for inputs, how, said in (
        ((q[:, :3], k, v), {}, "not \\[t, h, d\\]"),
        ((q, k.bfloat16(), v), {}, "must have one dtype"),
        ((q, k, v), {"scale": -1.0}, "scale = -1.0 must be > 0"),
        ((q.clone().requires_grad_(), k, v), {}, "has no derivative"),
    ):
        with pytest.raises(ValueError, match=said):
            paged_attention(*inputs, plan, backend="triton", **how)
