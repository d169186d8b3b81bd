"""The C++ extension for passes of few tokens: its products, attention and choices against fp64, for every set of
instructions that this processor runs; and whole models against torch's operators, which a build without it uses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_parallel.generate import adapters, extension, layers, native, packed
from llm_parallel.generate.engine import Generator, GeneratorOptions
from llm_parallel.generate.extension import best_of, few_rows
from llm_parallel.generate.native import NativeAttention, NativeChunk
from llm_parallel.generate.packed import GROUP, PackedMatrix
from llm_parallel.generate.paged import AttentionOptions, LayerCache, Pass
from llm_parallel.generate.requests import Request
from llm_parallel.generate.sampling import Sampling
from llm_parallel.generate.seen import Seen
from llm_parallel.model.deterministic import rows_computed
from tests.support.parity_models import random_folder
from tests.support.served import served_folder

_decode = pytest.importorskip("llm_parallel._decode", reason="the extension was built without a C++ compiler")
LEVELS = _decode.levels()
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8}
"""Of one result, beside the size of what was summed."""


@pytest.fixture(autouse=True)
def best_level() -> Iterator[None]:
    yield
    _decode.use(LEVELS[0])


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25)
@given(st.integers(1, 20), st.integers(1, 70), st.integers(1, 90), st.integers(1, 3), st.integers(0, 99))
def test_products_are_those_in_fp64(
    level: str, dtype: Any, tokens: int, rows: int, columns: int, threads: int, seed: int
) -> None:
    _decode.use(level)
    weight, x = normal(seed, rows, columns).to(dtype), normal(seed + 1, tokens, columns).to(dtype)
    product = few_rows(weight, lambda _: pytest.fail("this many tokens are few"))
    torch.set_num_threads(threads)
    try:
        found = product(x)
    finally:
        torch.set_num_threads(1)
    exact = x.double() @ weight.double().t()
    size = x.double().abs() @ weight.double().abs().t()
    assert ((found.double() - exact).abs() <= ROUNDING[dtype] * exact.abs() + 2.0**-20 * size).all()
    alone = torch.cat([product(x[n : n + 1]) for n in range(tokens)])
    assert torch.equal(found, alone), "a token's numbers do not depend on the others or on threads"


def held(values: torch.Tensor, bits: int) -> torch.Tensor:
    """What the codes of a matrix stand for, fp64."""
    if bits == 8:
        codes, scales = packed._int8(values, None)
        return codes.double() * scales.double().unsqueeze(1)
    codes, scales = packed._int4(values)
    by_group = codes.double().unflatten(1, (-1, GROUP)) - 8
    return (by_group * scales[:, :, :1].double() + scales[:, :, 1:].double()).flatten(1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", [8, 4])
@settings(max_examples=15)
@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
@example(11, 5, 1, 3)  # a tie, whose result is much larger than the exact one
def test_products_in_few_bits_are_those_of_rounded_activations(
    level: str, bits: Any, tokens: int, blocks: int, groups: int, seed: int
) -> None:
    """Both factors are what their codes stand for, so that only sums of fp32 and the result's bf16 are rounded."""
    _decode.use(level)
    rows = 16 * blocks - (5 if bits == 8 else 0)
    values = normal(seed, rows, 32 * groups) * normal(seed + 1, rows, 1)
    x = (normal(seed + 2, tokens, 32 * groups) * 10 ** normal(seed + 3, tokens, 1)).bfloat16()
    parts = x.double().unflatten(1, (-1, GROUP))
    step = (parts.abs().amax(2, keepdim=True).float() / 127).double()
    rounded = ((parts / step.clamp(min=1e-300)).round() * step).flatten(1)
    weight = held(values, bits)
    exact, found = rounded @ weight.t(), PackedMatrix(values, bits)(x).double()
    # A number that lies half way between two codes may be rounded to the other one.
    ties = ((parts / step.clamp(min=1e-300)) % 1 - 0.5).abs() < 1e-4
    tied = (ties * step).flatten(1) @ weight.abs().t()
    size = rounded.abs() @ weight.abs().t()
    largest = exact.abs().maximum(found.abs())  # the result that was found is the one that bf16 rounds
    assert ((found - exact).abs() <= 2.0**-8 * largest + 2.0**-20 * size + tied).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1, 8), (3, 3, 64), (2, 4, 24), (1, 8, 128)]),
    how=st.sampled_from([(-1, 0.0), (20, 0.0), (-1, 5.0), (0, 2.0)]),
    page_tokens=st.sampled_from([1, 16, 24]),
    seed=st.integers(0, 99),
)
def test_attention_over_pages_is_that_in_fp64(
    level: str, dtype: Any, lengths: Any, heads: Any, how: Any, page_tokens: int, seed: int
) -> None:
    _decode.use(level)
    (groups, members, dim), (left, softcap) = heads, how
    counts = [-(-length // page_tokens) for length in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)).int()
    cache = LayerCache(len(order) * page_tokens, groups, dim, dtype, torch.device("cpu"), page_tokens)
    cache.k.copy_(normal(seed, *cache.k.shape))
    cache.v.copy_(normal(seed + 1, *cache.v.shape))
    q = normal(seed + 2, len(lengths), groups, members, dim).to(dtype)
    starts = np.cumsum([0, *counts[:-1]])
    seen = Seen(order, torch.from_numpy(starts), torch.tensor(lengths))
    empty = torch.zeros(len(lengths), dtype=torch.int64)
    info = Pass(empty, empty, empty, empty, (), (1,) * len(lengths), empty, None, seen)
    options = AttentionOptions(dim**-0.5, left, softcap, "torch")
    attention = NativeAttention.of(cache, members, options)
    assert attention is not None
    found = attention(q, cache, info, options)
    for row, (start, count, length) in enumerate(zip(starts, counts, lengths)):
        slots = (order[start : start + count, None] * page_tokens + torch.arange(page_tokens)).flatten()[:length].long()
        slots = slots[max(length - left - 1, 0) :] if left >= 0 else slots
        k, v = cache.k[slots].double(), cache.v[slots].double()
        scores = torch.einsum("gmd,lgd->gml", q[row].double(), k) * options.scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        exact = torch.einsum("gml,lgd->gmd", scores.softmax(-1), v).flatten()
        atol = 2e-6 if dtype == torch.float32 else 2.0**-8 * float(exact.abs().max())
        torch.testing.assert_close(found[row].double(), exact, atol=atol, rtol=2e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("columns", [1, 15, 301, 5000])
def test_the_best_token_and_the_sum_of_exponentials(level: str, columns: int) -> None:
    _decode.use(level)
    wide = 8 * normal(3, 5, columns + 7)
    logits = wide[:, :columns]
    logits[1, columns // 2 :] = -torch.inf if columns > 1 else 0.0
    logits[2] = 4.0  # all are the largest
    found = best_of(logits)
    assert found is not None
    assert found.tokens == [int(np.argmax(row)) for row in logits.numpy()], "the first of several"
    assert found.logits == logits.amax(1).tolist()
    np.testing.assert_allclose(found.log_sums, torch.logsumexp(logits.double(), 1).numpy(), atol=2e-6, rtol=2e-7)
    for damage in (torch.nan, torch.inf):
        logits[3, columns - 1] = damage
        damaged = best_of(logits)
        assert damaged is not None and np.isnan(damaged.log_sums[3]) and not np.isnan(damaged.log_sums[4])


FAMILIES = ("llama with every bias", "qwen3", "olmo2", "smollm3", "mistral", "grouped")


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("family", "precision"), [*((f, "fp32") for f in FAMILIES), ("qwen3", "bf16"), ("grouped", "int4")]
)
def test_a_model_is_the_same_without_the_extension(
    tmp_path: Path, family: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm_parallel.generate.load import load_model
    from llm_parallel.parallel.groups import close_groups

    folder, found = random_folder(family, tmp_path / "model"), {}
    sampling = Sampling(max_new_tokens=12, top_log_probs=1)
    requests = [Request(n, tuple(range(5 + n, 9 + 17 * n)), sampling) for n in range(5)]
    for kind in ("whole chunks", "products and attention", "torch"):
        if kind == "products and attention":
            monkeypatch.setattr(layers.NativeChunk, "of", lambda *_: None)
        elif kind == "torch":
            for module in (extension, native):
                monkeypatch.setattr(module, "_decode" if module is extension else "extension", None)
        network = load_model(folder, "cpu", weights=precision).network
        generator = Generator(network, GeneratorOptions(cache_tokens=2048, page_tokens=8))
        uses = (
            any(chunk.native for chunk in generator._chunks),
            any(
                isinstance(layer.attention.attend, NativeAttention)
                for chunk in generator._chunks
                for layer in chunk.layers
            ),
        )
        assert uses == {"whole chunks": (True, True), "products and attention": (False, True)}.get(kind, (False, False))
        found[kind] = generator.run(requests)
        close_groups()
    for kind in ("products and attention", "torch"):
        for ours, theirs in zip(found["whole chunks"], found[kind]):
            if precision == "fp32":
                assert ours.tokens == theirs.tokens
                np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=2e-5)
            else:  # the first token, before which nothing differs but roundings
                assert abs(ours.log_probs[0] - theirs.log_probs[0]) < {"bf16": 0.05, "int4": 0.3}[precision]
    assert NativeChunk.of is not None


@pytest.mark.gloo
def test_products_of_prompts_have_few_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN keeps a compiled program for each number of rows; with every number, a server grew by 700 MB."""
    from llm_parallel.generate.load import load_model
    from llm_parallel.parallel.groups import close_groups

    sizes = set()
    onednn = layers._onednn()
    if onednn is None:
        pytest.skip("torch was built without oneDNN")

    def counted(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.add(x.shape[0])
        found: torch.Tensor = onednn(x, *rest)
        return found

    monkeypatch.setattr(layers, "_onednn", lambda: counted)
    network = load_model(random_folder("llama-2", tmp_path / "model"), "cpu").network
    generator = Generator(network, GeneratorOptions(cache_tokens=2048))
    generator.run([Request(n, tuple(range(5, 70 + 3 * n)), Sampling(max_new_tokens=2)) for n in range(40)])
    close_groups()
    assert sizes <= {96 + 32 * n for n in range(14)}, "no number of rows beside multiples of 32"
    assert [rows_computed(rows) for rows in (1, 7, 9, 63, 65, 512, 513)] == [1, 7, 16, 64, 96, 512, 544]


def test_products_of_adapters_have_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, linear = set(), torch.nn.functional.linear

    def counted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        sizes.add(x.shape[0])
        return linear(x, weight)

    monkeypatch.setattr(adapters, "F", SimpleNamespace(linear=counted))
    a, wide_b = normal(0, 4, 24), normal(1, 40, 4)
    delta = adapters._delta(adapters._Factors(a, wide_b, 0.5), None, None)
    for rows in range(1, 200):
        x = normal(rows, rows, 24)
        torch.testing.assert_close(delta(x), 0.5 * x @ a.t() @ wide_b.t(), atol=1e-4, rtol=1e-5)
    assert sizes == {rows_computed(rows) for rows in range(1, 200)} and len(sizes) == 20


@pytest.mark.gloo
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_threads_change_no_bit(tmp_path: Path, precision: str) -> None:
    """With a model and a batch that are large enough for three threads; prompts are small enough for the extension."""
    from llm_parallel.generate.load import load_model
    from llm_parallel.parallel.groups import close_groups

    network = load_model(served_folder(tmp_path / "model", hidden=256), "cpu", weights=precision).network
    generator = Generator(network, GeneratorOptions(cache_tokens=1024))
    requests = [Request(n, tuple(range(5, 9 + n)), Sampling(max_new_tokens=6)) for n in range(6)]
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            generator.refresh()
            found.append(generator.run(requests))
        finally:
            torch.set_num_threads(1)
    close_groups()
    assert [(a.tokens, a.log_probs) for a in found[0]] == [(a.tokens, a.log_probs) for a in found[1]]
