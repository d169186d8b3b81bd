"""Attention over segments: the kernels against an explicit softmax in fp64, beside torch's attention in the same dtype.

The names of cases say which regime they cover. Tiles are at most 32 wide in fp32 and up to 128 in bf16, so at these
sizes fp32 has whole tiles as well as edges; in bf16 only what depends on the dtype is quick.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_kernels.attention import ref
from llm_kernels.attention.op import Segments, _options, attention, attention_qkv, merge
from llm_kernels.attention.ref import Options
from llm_kernels.testing import TOLERANCE, assert_matches, compare, default_device, grid, random

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE = default_device()
Rows = list[tuple[int, int, int, int, int]]
triton_only = pytest.mark.skipif(not __import__("llm_kernels.dispatch").dispatch.triton_installed(), reason="no triton")


def inputs_of(sq: int, sk: int, b: int, h: int, g: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(sq, b, h, d), (sk, b, g, d), (sk, b, g, d)]
    return [random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


def framework(table: Tensor, options: Options) -> Callable[..., Tensor]:
    """Torch's SDPA in the inputs' dtype with an explicit mask; plain products for features that SDPA lacks."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        visible = ref.visibility(table, q.shape[1], q.shape[0], k.shape[0], options).unsqueeze(1)
        seen = visible.any(-1, keepdim=True)
        repeats = q.shape[2] // k.shape[2]
        q, k, v = q.permute(1, 2, 0, 3), *(x.repeat_interleave(repeats, 2).permute(1, 2, 0, 3) for x in (k, v))
        if options.softcap == 0 and options.dropout_p == 0:
            out = F.scaled_dot_product_attention(q, k, v, visible | ~seen, scale=options.scale)
            return out.masked_fill(~seen, 0).permute(2, 0, 1, 3)
        scores = (q @ k.mT) * options.scale
        if options.softcap > 0:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        weights = scores.masked_fill(~visible & seen, -torch.inf).softmax(-1).masked_fill(~visible, 0)
        if options.dropout_p > 0:
            weights = weights * ref.dropout_keep(options, table, weights.shape) / (1 - options.dropout_p)
        return (weights @ v).permute(2, 0, 1, 3)

    return run


def check(case: str, inputs: list[Tensor], rows: Rows | None = None, **how: Any) -> None:
    """Asserts the rule of ``compare`` for the kernels on these inputs and options."""
    q, k = inputs[:2]
    b, sq, sk = q.shape[1], q.shape[0], k.shape[0]
    segments = Segments.from_rows(rows, b, sq, sk, DEVICE) if rows is not None else Segments.dense(b, sq, sk, DEVICE)
    dropout = (how.get("dropout_p", 0.0), how.get("seed"))
    names = ("causal", "scale", "window", "softcap")
    known = [how.get(name, default) for name, default in zip(names, (True, None, (-1, -1), 0.0))]
    options = _options(q.shape[-1], *known, dropout)
    compare(
        f"attention/{case}",
        lambda *x: attention(*x, segments=segments, backend="triton", **how),
        framework(segments.table, options),
        lambda *x: ref.explicit(*x, segments.table, options)[0],
        inputs,
    )


SHAPES = {
    "heads of one group": (130, 130, 1, 2, 1, 64),
    "groups, batch": (70, 70, 2, 4, 2, 32),
    "one head a group": (64, 64, 1, 2, 2, 128),
    "padded head dim": (70, 70, 1, 1, 1, 96),
    "widest head": (70, 70, 1, 1, 1, 256),
    "one new token": (1, 90, 1, 2, 1, 64),
    "fewer queries": (40, 130, 1, 2, 1, 64),
    "more queries: the first see nothing": (130, 40, 1, 2, 1, 64),
}


@triton_only
@pytest.mark.parametrize(("shape", "dtype"), grid(SHAPES, fp16=["groups, batch"]))
def test_dense(shape: str, dtype: torch.dtype) -> None:
    check(f"causal, {shape}", inputs_of(*SHAPES[shape], dtype))


@triton_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_sees_itself(dtype: torch.dtype) -> None:
    """The gradients of q and k are 0, up to the rounding of two sums of d products that cancel."""
    q, k, v = inputs_of(1, 1, 1, 2, 1, 16, dtype)
    out = attention(q, k, v, backend="triton")
    assert torch.equal(out, v.expand_as(out))
    dq, dk, dv = torch.autograd.grad(out.float().square().sum(), [q, k, v])
    assert torch.equal(dv, 4 * v)
    assert dq.abs().max() <= 1e-5 and dk.abs().max() <= 1e-5


FEATURES: dict[str, dict[str, Any]] = {
    "full": {"causal": False},
    "scale": {"scale": 0.5},
    "window": {"window": (30, -1)},
    "window of one": {"window": (0, -1)},
    "window both sides": {"causal": False, "window": (20, 35)},
    "soft cap": {"softcap": 2.0},
    "soft cap, full": {"softcap": 30.0, "causal": False},
    "dropout": {"dropout_p": 0.2, "seed": 7},
    "dropout, wide seed": {"dropout_p": 0.6, "seed": 2**61 + 12345, "window": (50, -1)},
    "all": {"dropout_p": 0.1, "seed": 3, "window": (70, 10), "causal": False, "softcap": 5.0, "scale": 0.2},
}


@triton_only
# fp32 and 16-bit dtypes compute tanh differently, hence two soft caps in bf16.
@pytest.mark.parametrize(("feature", "dtype"), grid(FEATURES, bf16=["soft cap, full", "all"]))
def test_features(feature: str, dtype: torch.dtype) -> None:
    check(feature, inputs_of(100, 140, 1, 2, 1, 32, dtype), **FEATURES[feature])


# Shapes from the tests of FlashAttention 2 and 3 whose regime no case above has, in the dtype that those tests use.
PEERS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "odd lengths, three heads a group, odd head dim": ((113, 203, 1, 6, 2, 59), {}),
    "window that ends before the first key, multi-query": ((108, 256, 1, 3, 1, 40), {"window": (17, 0)}),
    "more queries than keys, window to both sides": ((203, 113, 1, 1, 1, 32), {"causal": False, "window": (25, 9)}),
    "soft cap, window, head dim padded to 256": ((64, 97, 1, 2, 1, 160), {"window": (30, 0), "softcap": 15.0}),
}


@triton_only
@pytest.mark.parametrize("case", PEERS)
def test_shapes_of_peers(case: str) -> None:
    shape, how = PEERS[case]
    check(case, inputs_of(*shape, torch.bfloat16), **how)


SEGMENTS: dict[str, tuple[int, int, Rows]] = {
    "documents": (150, 150, [(0, 0, 80, 0, 80), (0, 80, 81, 80, 81), (0, 81, 150, 81, 150), (1, 0, 150, 0, 150)]),
    "context shard": (60, 120, [(0, 0, 30, 0, 30), (0, 30, 60, 30, 120), (1, 0, 60, 0, 120)]),
    "holes": (70, 90, [(0, 10, 30, 5, 25), (0, 40, 69, 30, 90), (1, 3, 5, 0, 70)]),
    "no keys, no queries": (50, 50, [(0, 0, 20, 0, 0), (0, 20, 50, 0, 40), (1, 7, 7, 3, 50), (1, 0, 7, 0, 3)]),
    "nothing": (20, 20, []),
}


@triton_only
@pytest.mark.parametrize(("case", "dtype"), grid(SEGMENTS, bf16=["documents"]))
def test_segments(case: str, dtype: torch.dtype) -> None:
    sq, sk, rows = SEGMENTS[case]
    check(case, inputs_of(sq, sk, 2, 2, 1, 16, dtype), rows)


@triton_only
def test_cu_seqlens_with_empty_documents() -> None:
    cu = torch.tensor([0, 0, 33, 34, 34, 100], dtype=torch.int32, device=DEVICE)
    segments = Segments.from_cu_seqlens(cu, cu, 66, 66)
    inputs = inputs_of(100, 100, 1, 2, 1, 32, torch.bfloat16)
    options = _options(32, True, None, (-1, -1), 0.0, (0.0, None))
    compare(
        "attention/cu_seqlens",
        lambda *x: attention(*x, segments=segments, backend="triton"),
        framework(segments.table, options),
        lambda *x: ref.explicit(*x, segments.table, options)[0],
        inputs,
    )


PACKED = {"whole samples": False, "documents": True}


@triton_only
@pytest.mark.parametrize(("case", "dtype"), grid(PACKED, bf16=["documents"]))
def test_packed_qkv_is_read_and_written_in_place(case: str, dtype: torch.dtype) -> None:
    s, b, g, m, d = 70, 2, 2, 2, 32
    qkv = random(s, b, g, m + 2, d, dtype=dtype)
    rows: Rows = [(0, 0, 30, 0, 30), (0, 30, s, 30, s), (1, 0, s, 0, s)]
    segments = Segments.from_rows(rows, b, s, s, DEVICE) if PACKED[case] else Segments.dense(b, s, s, DEVICE)
    options = _options(d, True, None, (-1, -1), 0.0, (0.0, None))

    def of_parts(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: function(x[:, :, :, :m].flatten(2, 3), x[:, :, :, m], x[:, :, :, m + 1])

    compare(
        "attention/packed",
        lambda x: attention_qkv(x, segments, backend="triton"),
        of_parts(framework(segments.table, options)),
        of_parts(lambda *x: ref.explicit(*x, segments.table, options)[0]),
        [qkv],
    )


@triton_only
def test_strided_views() -> None:
    """q, k and v are views of a tensor that has other heads, of NaN, between their rows; these must not be read."""
    s, b, h, d = 50, 2, 2, 32
    whole = random(s, b, 3 * h + 5, d, dtype=torch.float32)
    with torch.no_grad():
        whole[:, :, 3 * h :] = torch.nan
    parts = [whole[:, :, i * h : (i + 1) * h].detach().requires_grad_() for i in range(3)]
    check("strided", parts)
    batch_major = [random(b, s, h, d, dtype=torch.float32, seed=i).detach().transpose(0, 1) for i in range(3)]
    check("batch-major", [x.requires_grad_() for x in batch_major])


@triton_only
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_gradient_through_lse(dtype: torch.dtype) -> None:
    rows: Rows = [(0, 0, 70, 0, 70), (0, 70, 90, 70, 75)]  # queries 70..84 see nothing
    segments = Segments.from_rows(rows, 1, 90, 90, DEVICE)
    options = _options(32, True, None, (-1, -1), 0.0, (0.0, None))

    def finite(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair[0], pair[1].masked_fill(pair[1] == -torch.inf, 0.0)

    def rounded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        _, lse = ref.explicit(q, k, v, segments.table, options)
        return framework(segments.table, options)(q, k, v), finite((q, lse))[1]

    compare(
        "attention/lse",
        lambda *x: finite(attention(*x, segments=segments, return_lse=True, backend="triton")),
        rounded,
        lambda *x: finite(ref.explicit(*x, segments.table, options)),
        inputs_of(90, 90, 1, 2, 1, 32, dtype),
    )


@triton_only
def test_merge_of_halves_of_keys_is_the_whole() -> None:
    """As in ring attention: attention to a rank's own keys, causal, and to earlier keys, full, is merged; query 0 sees
    no key of its own."""
    inputs = inputs_of(40, 80, 1, 2, 1, 32, torch.float32)

    def halves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        how: dict[str, Any] = {"return_lse": True, "backend": "triton"}
        earlier = attention(q, k[:41], v[:41], segments=Segments.dense(1, 40, 41, DEVICE), causal=False, **how)
        own = attention(q, k[41:], v[41:], causal=True, **how)
        out, lse = merge(*earlier, *own)
        nothing = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
        return merge(out, lse, *nothing)[0]

    options = _options(32, True, None, (-1, -1), 0.0, (0.0, None))
    table = Segments.dense(1, 40, 80, DEVICE).table
    compare(
        "attention/merged", halves, framework(table, options), lambda *x: ref.explicit(*x, table, options)[0], inputs
    )


@triton_only
def test_merge_of_nothing_has_gradients_of_zero() -> None:
    out = torch.zeros(3, 1, 1, 4, requires_grad=True)
    lse = torch.full((1, 1, 3), -torch.inf, requires_grad=True)
    merged, total = merge(out, lse, out, lse)
    assert not merged.any() and (total == -torch.inf).all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(merged.sum(), [out, lse]))


@triton_only
def test_gradients_are_the_same_bits_every_time() -> None:
    runs = []
    for _ in range(2):
        inputs = inputs_of(100, 100, 1, 4, 2, 32, torch.bfloat16)
        out = attention(*inputs, dropout_p=0.1, seed=5, backend="triton")
        runs.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    assert all(torch.equal(x, y) for x, y in zip(*runs))


def test_dropout_is_philox_and_keeps_its_share() -> None:
    table = torch.tensor([(row, 0, 64, 0, 64) for row in range(2)])
    keep = ref.dropout_keep(Options(1.0, dropout_p=0.25, seed=11), table, (2, 2, 64, 64))
    assert abs(keep.float().mean().item() - 0.75) < 0.02  # 16,384 draws: 0.0034 is one standard deviation
    # Masks of different heads, and of the weights that share a call of the generator, are uncorrelated.
    calls = keep.unflatten(3, (4, 2, 8)).unflatten(2, (4, 2, 8))
    for rows in (keep.view(4, -1), calls.permute(3, 6, 0, 1, 2, 4, 5, 7).reshape(4, -1)):
        assert torch.corrcoef(rows.float()).fill_diagonal_(0).abs().max() < 0.07
    other = ref.dropout_keep(Options(1.0, dropout_p=0.25, seed=11 + 2**32), table, (2, 2, 64, 64))
    assert not torch.equal(keep, other)
    # Known answer of Random123's philox4x32-7 for counter 0 and key 0; number 2 i + j decides for (8 i, 8 j).
    known = [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    zero = torch.zeros(1, dtype=torch.int64)
    assert [int(word) for word in ref._philox(0, (zero, zero, zero, zero))] == known
    table = torch.tensor([(0, 0, 9, 0, 9)])
    for place, word in zip([(0, 0), (0, 8), (8, 0), (8, 8)], known):
        for more, kept in ((0, True), (1, False)):
            options = Options(1.0, dropout_p=(word + 2**31 + more) % 2**32 / 2**32)
            assert ref.dropout_keep(options, table, (1, 1, 9, 9))[0, 0, place[0], place[1]].item() is kept


@triton_only
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_segments_window_and_tile(data: st.DataObject) -> None:
    """Tiles are small, so that small shapes have edges of every kind."""
    from llm_kernels.attention import kernel, kernel_backward
    from llm_kernels.attention import tiles as tiles_of

    tiles = [tiles_of.Tile(*data.draw(st.sampled_from([(16, 16), (32, 16), (16, 32)])), 4, 1) for _ in range(3)]
    limits = st.integers(-1, 40)
    how = {"causal": data.draw(st.booleans()), "window": (data.draw(limits), data.draw(limits))}
    rows: Rows = []
    ends = [0, 0]
    for _ in range(data.draw(st.integers(1, 3))):
        starts = [end + data.draw(st.integers(0, 2)) for end in ends]
        ends = [start + data.draw(st.integers(0, 50)) for start in starts]
        rows.append((0, starts[0], ends[0], starts[1], ends[1]))
    sq, sk = (end + data.draw(st.integers(0, 2)) for end in ends)
    group = data.draw(st.integers(1, 3))
    dtype = data.draw(st.sampled_from(DTYPES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "forward_tile", lambda *_: tiles[0])
        patch.setattr(kernel_backward, "dkdv_tile", lambda *_: tiles[1])
        patch.setattr(kernel_backward, "dq_tile", lambda *_: tiles[2])
        check("property", inputs_of(max(sq, 1), max(sk, 1), 1, group, 1, 16, dtype), rows, **how)


@pytest.mark.parametrize("case", SEGMENTS)
def test_visibility(case: str) -> None:
    """Against a loop over single queries."""
    sq, sk, rows = SEGMENTS[case]
    options = Options(1.0, left=20, right=3)
    expected = torch.zeros(2, sq, sk, dtype=torch.bool)
    for row, q_start, q_end, k_start, k_end in rows:
        for query in range(q_start, q_end):
            level = query - q_end + k_end
            expected[row, query, max(level - 20, k_start) : min(level + 4, k_end)] = level + 4 > k_start
    table = torch.tensor(rows, dtype=torch.int32).view(-1, 5)
    assert torch.equal(ref.visibility(table, 2, sq, sk, options), expected)


@pytest.mark.parametrize("feature", FEATURES)
def test_reference_gradients(feature: str) -> None:
    how = {"causal": True, "scale": None, "window": (-1, -1), "softcap": 0.0, **FEATURES[feature]}
    dropout = (how.pop("dropout_p", 0.0), how.pop("seed", None))
    options = _options(4, how["causal"], how["scale"], how["window"], how["softcap"], dropout)
    table = torch.tensor([(0, 0, 3, 0, 4), (0, 3, 6, 4, 6)], device=DEVICE)
    inputs = [x.detach().double().requires_grad_() for x in inputs_of(6, 7, 1, 2, 1, 4, torch.float32)]
    assert torch.autograd.gradcheck(lambda *x: ref.explicit(*x, table, options)[0], inputs)


@pytest.mark.parametrize("how", ({}, {"window": (3, -1)}, {"return_lse": True}))
def test_torch_backend(how: dict[str, Any]) -> None:
    rows: Rows = [(0, 0, 8, 0, 8), (0, 8, 12, 8, 12), (1, 0, 12, 0, 12)]
    segments = Segments.from_rows(rows, 2, 12, 12, DEVICE)
    options = _options(8, True, None, how.get("window", (-1, -1)), 0.0, (0.0, None))

    def ours(*x: Tensor) -> Tensor:
        out = attention(*x, segments=segments, backend="torch", **how)
        return out[0] if isinstance(out, tuple) else out

    truth = lambda *x: ref.explicit(*x, segments.table, options)[0]  # noqa: E731
    assert_matches(ours, truth, inputs_of(12, 12, 2, 4, 2, 8, torch.float32))


@triton_only
def test_custom_ops_agree_with_their_fakes() -> None:
    q, k, v = inputs_of(20, 20, 1, 2, 1, 16, torch.float32)
    arguments = (
        Segments.dense(1, 20, 20, DEVICE).table,
        20,
        20,
        True,
        True,
        *_options(16, True, None, (-1, -1), 0.0, (0.0, None)),
        False,
    )
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.llm_kernels.attention, (q, k, v, *arguments), test_utils=tests)
    qkv = random(20, 1, 1, 4, 16, dtype=torch.float32)
    torch.library.opcheck(torch.ops.llm_kernels.attention_qkv, (qkv, *arguments), test_utils=tests)


def test_refuses_what_cannot_be() -> None:
    q, k, v = inputs_of(4, 4, 1, 3, 2, 16, torch.float32)
    with pytest.raises(ValueError, match="h % g"):
        attention(q, k, v)
    with pytest.raises(ValueError, match="one dtype"):
        attention(q[:, :, :2], k.bfloat16(), v)
    with pytest.raises(ValueError, match="scale"):
        attention(q[:, :, :2], k, v, scale=0.0)
    with pytest.raises(ValueError, match="overlap"):
        Segments.from_rows([(0, 0, 3, 0, 2), (0, 2, 4, 2, 4)], 1, 4, 4, "cpu")
    with pytest.raises(ValueError, match="overlap or exceed"):
        Segments.from_rows([(0, 0, 3, 0, 5)], 1, 4, 4, "cpu")


# Tests of ref.attention, which runs on CPUs and in models without kernels. Here the key ranges may overlap.


def truth(q: Tensor, k: Tensor, v: Tensor, segments: tuple[tuple[ref.Segment, ...], ...]) -> Tensor:
    out = []
    for row in range(q.shape[1]):
        parts = segments[row if len(segments) > 1 else 0]
        table = [torch.tensor([(0, x.q_start, x.q_end, x.k_start, x.k_end)]) for x in parts]
        inputs = [x[:, row : row + 1] for x in (q, k, v)]
        out.append(sum(ref.explicit(*inputs, x.to(q.device), Options(0.3, right=0))[0] for x in table))
    return torch.cat(out, dim=1)


CASES: dict[str, tuple[int, tuple[tuple[ref.Segment, ...], ...]]] = {
    "whole samples": (12, ((ref.Segment(0, 12, 0, 12),),)),
    "one new token": (1, ((ref.Segment(0, 1, 0, 9),),)),
    "new tokens after cached ones": (4, ((ref.Segment(0, 4, 0, 12),),)),
    "context shard": (6, ((ref.Segment(0, 3, 0, 3), ref.Segment(3, 6, 0, 12)),)),
    "documents of each row": (8, ((ref.Segment(0, 3, 0, 3), ref.Segment(3, 8, 3, 8)), (ref.Segment(0, 8, 0, 8),))),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_by_segment(case: str, groups: int, dtype: torch.dtype) -> None:
    queries, segments = CASES[case]
    keys = max(part.k_end for row in segments for part in row)
    inputs = inputs_of(queries, keys, 2, 4, groups, 8, dtype)
    assert_matches(
        lambda q, k, v: ref.attention(q, k, v, segments, 0.3), lambda q, k, v: truth(q, k, v, segments), inputs
    )


def documents(*lengths: int) -> tuple[ref.Segment, ...]:
    ends = list(itertools.accumulate(lengths))
    return tuple(ref.Segment(end - length, end, end - length, end) for length, end in zip(lengths, ends))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sets(st.integers(1, 79), min_size=5, max_size=30), min_size=2, max_size=2), st.sampled_from([-1, 3]))
def test_many_documents_are_computed_together(cuts: list[set[int]], left: int) -> None:
    """With documents of many lengths, in several buckets, and a window."""
    rows = []
    for inner in cuts:
        edges = [0, *sorted(inner), 80]
        rows.append(documents(*(stop - start for start, stop in itertools.pairwise(edges))))
    assert sum(map(len, rows)) >= ref.MANY
    inputs = [torch.randn(80, 2, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    table = torch.tensor([(r, x.q_start, x.q_end, x.k_start, x.k_end) for r, row in enumerate(rows) for x in row])
    found = ref.attention(*inputs, tuple(rows), 0.3, left)
    wanted, _ = ref.explicit(*inputs, table, Options(0.3, left, 0))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(out.square().sum(), inputs) for out in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-11)
