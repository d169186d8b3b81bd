"""RoPE against complex multiplication in fp64, and the properties of Llama 3.1's scaling."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_kernels.memory_checker import Traffic
from llm_kernels.rope import ref
from llm_kernels.rope.bench import BENCHMARK
from llm_kernels.rope.op import rope, rope_qkv_
from llm_kernels.rope.ref import cos_sin, inverse_frequencies
from llm_kernels.rope.table import RopeTable
from llm_kernels.testing import TOLERANCE, assert_matches, compare, default_device, grid, random


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("seq", "rows", "heads", "dim"), [(17, 2, 3, 16), (1, 1, 1, 2), (5, 1, 4, 64)])
def test_is_a_rotation_of_pairs(seq: int, rows: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    frequencies = inverse_frequencies(dim, 10000.0)
    positions = torch.arange(seq).unsqueeze(1) * 3
    cos, sin = (table.unsqueeze(2) for table in cos_sin(positions, frequencies))

    def truth(x: Tensor) -> Tensor:
        pairs = torch.complex(x[..., : dim // 2], x[..., dim // 2 :])
        angles = (positions.double().unsqueeze(-1) * frequencies.double()).unsqueeze(2)
        turned = pairs * torch.exp(1j * angles)
        return torch.cat((turned.real, turned.imag), dim=-1)

    assert_matches(lambda x: ref.rope(x, cos, sin), truth, [random(seq, rows, heads, dim, dtype=dtype)])


def test_scaling_keeps_short_and_stretches_long_wavelengths() -> None:
    plain = inverse_frequencies(128, 500000.0)
    scaled = inverse_frequencies(128, 500000.0, (8.0, 1.0, 4.0, 8192))
    wavelengths = 2 * math.pi / plain
    short, long = wavelengths < 8192 / 4, wavelengths > 8192 / 1
    assert torch.equal(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long], plain[long] / 8)
    between = ~short & ~long
    assert between.any() and ((scaled < plain) & (scaled > plain / 8))[between].all()


triton = pytest.importorskip("triton", reason="the kernels need triton")


def make_table(num_positions: int, dim: int) -> RopeTable:
    return RopeTable.make(inverse_frequencies(dim, 10000.0, device=default_device()), num_positions)


def positions_of(table: RopeTable, tokens: int) -> Tensor:
    """Position of every token, [s, 1 or b]."""
    if table.token_positions is None:
        return (torch.arange(tokens) + table.offset).unsqueeze(1).to(table.cos.device)
    return table.token_positions.reshape(tokens, -1).long()


def turned(x: Tensor, table: RopeTable, interleaved: bool) -> Tensor:
    """The truth: complex multiplication in fp64, with the cosines and sines of the fp32 table."""
    at = positions_of(table, x.shape[0])
    factor = torch.complex(table.cos.double(), table.sin.double())[at].unsqueeze(2)
    wide = x.double()
    if interleaved:
        out = torch.view_as_real(torch.complex(wide[..., 0::2], wide[..., 1::2]) * factor).flatten(-2)
    else:
        half = x.shape[-1] // 2
        product = torch.complex(wide[..., :half], wide[..., half:]) * factor
        out = torch.cat((product.real, product.imag), dim=-1)
    return out


def usual(x: Tensor, table: RopeTable, interleaved: bool) -> Tensor:
    """The framework's way: two products and a sum in x's dtype, with tables rounded to it."""
    at = positions_of(table, x.shape[0])
    cos, sin = (half[at].unsqueeze(2).to(x.dtype) for half in (table.cos, table.sin))
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def variants(tokens: int, rows: int, dim: int) -> dict[str, RopeTable]:
    table = make_table(tokens + 50, dim)
    cu_seqlens = torch.tensor([0, min(3, tokens), min(3, tokens), tokens], device=default_device())
    generator = torch.Generator().manual_seed(1)
    return {
        "index": table,
        "offset": table.from_offset(37),
        "array": table.at(torch.randint(0, tokens + 50, (tokens, rows), generator=generator)),
        "documents": table.from_cu_seqlens(cu_seqlens, tokens),
    }


# Where positions come from, and which dims make a pair.
KINDS = {
    f"{kind}, {pairs}": (kind, pairs == "interleaved")
    for kind in ("index", "offset", "array", "documents")
    for pairs in ("half", "interleaved")
}


# Positions do not depend on the dtype; the pairing decides how elements are loaded and stored, in each dtype.
@pytest.mark.parametrize(
    ("case", "dtype"), grid(KINDS, bf16=["array, half", "array, interleaved"], fp16=["array, half"])
)
def test_kernel(case: str, dtype: torch.dtype) -> None:
    tokens, rows, dim = 7, 2, 64
    kind, interleaved = KINDS[case]
    table = variants(tokens, rows, dim)[kind]

    def both(op):
        return lambda q, k: tuple(op(x, table, interleaved) for x in (q, k))

    inputs = [random(tokens, rows, 6, dim, dtype=dtype), random(tokens, rows, 2, dim, dtype=dtype, seed=1)]
    ours = lambda q, k: rope(q, k, table, interleaved=interleaved, backend="triton")  # noqa: E731
    compare("rope/apart", ours, both(usual), both(turned), inputs)


@settings(max_examples=15)
@given(
    tokens=st.integers(1, 5),
    rows=st.integers(1, 3),
    groups=st.integers(1, 3),
    queries=st.integers(1, 5),
    dim=st.sampled_from([2, 16, 96, 128, 256]),
    dtype=st.sampled_from(list(TOLERANCE)),
    interleaved=st.booleans(),
)
def test_any_shape_from_packed_strides(
    tokens: int, rows: int, groups: int, queries: int, dim: int, dtype: torch.dtype, interleaved: bool
) -> None:
    """Queries and keys are strided views of one packed tensor."""
    table = make_table(tokens, dim)

    def parts(qkv: Tensor) -> tuple[Tensor, Tensor]:
        return qkv[:, :, : groups * queries], qkv[:, :, groups * queries : groups * (queries + 1)]

    def ours(qkv: Tensor):
        return rope(*parts(qkv), table, interleaved=interleaved, backend="triton")

    def by(op):
        return lambda qkv: tuple(op(x, table, interleaved) for x in parts(qkv))

    qkv = random(tokens, rows, groups * (queries + 2), dim, dtype=dtype)
    compare("rope/strided", ours, by(usual), by(turned), [qkv])


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize(("groups", "queries"), [(1, 1), (2, 1), (2, 3)])
def test_packed_in_place(groups: int, queries: int, interleaved: bool, backend: str) -> None:
    """Queries and keys are rotated and values unchanged; backward rotates the gradient back in place."""
    tokens, rows, dim = 5, 2, 16
    table = variants(tokens, rows, dim)["array"]
    start = random(tokens, rows, groups * (queries + 2) * dim, dtype=torch.float32)
    doubled = start * 2.0
    out = rope_qkv_(doubled, table, num_groups=groups, head_dim=dim, interleaved=interleaved, backend=backend)
    assert out.data_ptr() == doubled.data_ptr()
    before, after = ((x.detach().view(tokens, rows, groups, queries + 2, dim)) for x in (start * 2.0, out))
    assert torch.equal(after[:, :, :, -1], before[:, :, :, -1])
    for part in (slice(0, queries), slice(queries, queries + 1)):
        expected = turned(before[:, :, :, part].flatten(2, 3), table, interleaved)
        torch.testing.assert_close(after[:, :, :, part].flatten(2, 3).double(), expected, rtol=1e-6, atol=1e-6)
    upstream = random(tokens, rows, groups * (queries + 2) * dim, dtype=torch.float32, seed=3).detach()
    # A rotation preserves scalar products: <rotate(x), g> = <x, rotate_back(g)>.
    (gradient,) = torch.autograd.grad(out, start, upstream.clone())
    torch.testing.assert_close((out.detach() * upstream).sum(), (start * gradient).sum(), rtol=1e-5, atol=1e-5)
    back = gradient.view(tokens, rows, groups, queries + 2, dim)[:, :, :, :-1].flatten(2, 3) / 2.0
    again = turned(back, table, interleaved)
    wanted = upstream.view(tokens, rows, groups, queries + 2, dim)[:, :, :, :-1].flatten(2, 3)
    torch.testing.assert_close(again, wanted.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_equals_transformers(backend: str) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = (random(9, 2, heads, 64, dtype=torch.float32, seed=heads) for heads in (4, 2))
    table = make_table(9, 64)
    ours = rope(q, k, table, backend=backend)
    cos, sin = (x.squeeze(2).transpose(0, 1) for x in table.full(9))
    theirs = llama.apply_rotary_pos_emb(q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), cos, sin)
    for found, wanted in zip(ours, theirs):
        torch.testing.assert_close(found, wanted.permute(2, 0, 1, 3), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize(
    ("rotated", "dim"),
    [(8, 16), (4, 6), (8, 20)],
    ids=["half of a head rotates", "head dim is no power of two", "the rest is no power of two"],
)
def test_partial(rotated: int, dim: int, interleaved: bool, backend: str) -> None:
    """A table for the first dims of a head (GPT-NeoX, GLM, Phi): these rotate; the others, and their gradient, pass
    unchanged."""
    tokens, rows, groups, queries = 5, 2, 2, 3
    table = variants(tokens, rows, rotated)["array"]

    def whole(x: Tensor) -> Tensor:
        return torch.cat((turned(x[..., :rotated], table, interleaved), x[..., rotated:].double()), dim=-1)

    q, k = random(tokens, rows, 6, dim, dtype=torch.float32), random(tokens, rows, 2, dim, dtype=torch.float32, seed=1)
    options = {"rotary_dim": rotated, "interleaved": interleaved, "backend": backend}
    found = rope(q, k, table, **options)
    grads = [random(*x.shape, dtype=torch.float32, seed=5).detach() for x in found]
    gradients = torch.autograd.grad(found, (q, k), grads)
    wanted = [whole(x) for x in (q, k)]
    expected = torch.autograd.grad(wanted, (q, k), [g.double() for g in grads])
    for ours, right in zip((*found, *gradients), (*wanted, *expected)):
        torch.testing.assert_close(ours.double(), right.double(), rtol=1e-6, atol=1e-6)

    flat = random(tokens, rows, groups * (queries + 2) * dim, dtype=torch.float32)
    out = rope_qkv_(flat * 1.0, table, num_groups=groups, head_dim=dim, **options)
    before, after = (x.view(tokens, rows, groups, queries + 2, dim) for x in (flat, out))
    right = torch.stack([whole(before[..., i, :]) for i in range(queries + 1)], dim=-2)
    torch.testing.assert_close(after[..., :-1, :].double(), right, rtol=1e-6, atol=1e-6)
    assert torch.equal(after[..., -1, :], before[..., -1, :])
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.device)
    (gradient,) = torch.autograd.grad(out, flat, upstream.clone())
    (expected_gradient,) = torch.autograd.grad(right, flat, upstream.view(after.shape)[..., :-1, :].double())
    expected_gradient.view(after.shape)[..., -1, :] = upstream.view(after.shape)[..., -1, :]
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-6)


def test_reference_gradcheck() -> None:
    table = make_table(3, 8)
    for interleaved in (False, True):
        x = random(3, 2, 2, 8, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda x: ref.rope_table(x, table, interleaved), (x,))  # noqa: B023


def test_moves_the_least_bytes(traffic: Traffic) -> None:
    inputs = BENCHMARK.make(BENCHMARK.small, torch.bfloat16, default_device())
    out = BENCHMARK.providers["ours"]()(*inputs)
    forward = traffic.bytes_loaded + traffic.bytes_stored
    torch.autograd.grad(out, inputs, [torch.ones_like(x) for x in out])
    backward = traffic.bytes_loaded + traffic.bytes_stored - forward
    least = BENCHMARK.bytes_moved(BENCHMARK.small, torch.bfloat16)  # type: ignore[misc]
    print(f"rope: forward {forward / least.forward:.3f}, backward {backward / least.backward:.3f}")
    assert forward <= 1.03 * least.forward and backward <= 1.03 * least.backward


def test_packed_moves_no_value(traffic: Traffic) -> None:
    tokens, groups, queries, dim = 4, 2, 4, 128
    qkv = random(tokens, 1, groups * (queries + 2) * dim, dtype=torch.bfloat16).detach()
    rope_qkv_(qkv, make_table(tokens, dim), num_groups=groups, head_dim=dim, backend="triton")
    least = tokens * (2 * groups * (queries + 1) * dim * 2 + 4 * dim)
    assert traffic.bytes_loaded + traffic.bytes_stored == least


def test_bad_input_is_named() -> None:
    table = make_table(4, 8)
    q = torch.ones(5, 1, 2, 8, device=default_device())
    with pytest.raises(ValueError, match="position 4, the table has 4"):
        rope(q, q, table)
    with pytest.raises(ValueError, match="position -1, the table has 4"):
        rope(q[:3], q[:3], table.from_offset(-1))
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=f"position {wrong}, the table has 4"):
            rope(q[:2], q[:2], table.at(torch.tensor([0, wrong])))
    across = torch.ones(24, 1, 2, device=default_device()).transpose(0, 2)
    with pytest.raises(ValueError, match="contiguous"):
        rope_qkv_(across, table, num_groups=1, head_dim=8)
    with pytest.raises(ValueError, match="share memory"):
        rope_qkv_(torch.ones(2, 1, 24, device=default_device()).expand(2, 3, 24), table, num_groups=1, head_dim=8)
    with pytest.raises(ValueError, match="the table is for 8"):
        rope(q[:3, ..., :4], q[:3, ..., :4], table)
    with pytest.raises(ValueError, match="rotary_dim = 4, but the table is for 8"):
        rope(q[:3], q[:3], table, rotary_dim=4)
    with pytest.raises(ValueError, match=r"rotary_dim = 8, but .* heads are 4 wide"):
        rope(q[:3, ..., :4], q[:3, ..., :4], table, rotary_dim=8)
    with pytest.raises(ValueError, match="only the number of heads"):
        rope(q[:3], q[:2], table)
    with pytest.raises(ValueError, match="three or more heads"):
        rope_qkv_(torch.ones(2, 1, 16, device=default_device()), table, num_groups=2, head_dim=8)
