"""The fused output projection and loss against fp64, beside torch's two operators; its memory and its FLOPs.

A chunk is the tokens, a slice the columns of the vocabulary, whose logits exist at one time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_kernels.cross_entropy.ref import Terms
from llm_kernels.linear_cross_entropy import bench, ref
from llm_kernels.linear_cross_entropy.op import linear_cross_entropy, weighted_linear_cross_entropy
from llm_kernels.testing import TOLERANCE, compare, default_device, grid, random

# In the interpreter numpy warns where a difference from the lowest number becomes infinite, as it should.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

Op = Callable[[Tensor, Tensor], Tensor]
# With this factor on standard normal hidden states and weights, logits are about as large as a model's.
SCALE = 0.2


def labels_of(shape: tuple[int, ...], vocab_size: int, ignored: bool) -> Tensor:
    labels = torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(0))
    if ignored:
        labels.view(-1)[::3] = -100
    return labels.to(default_device())


def unfused(labels: Tensor, vocab_size: int, smoothing: float, z_loss: float) -> Op:
    """torch's operators one after the other; in fp64 they are the truth."""

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        valid = F.linear(hidden * SCALE, weight)[..., :vocab_size].reshape(-1, vocab_size)
        losses = F.cross_entropy(valid, labels.flatten(), reduction="none", label_smoothing=smoothing).view(
            labels.shape
        )
        if z_loss:
            losses = losses + z_loss * valid.logsumexp(-1).square().view(labels.shape).masked_fill(labels == -100, 0.0)
        return losses if losses.dtype == torch.float64 else losses.float()

    return run


def inputs_of(shape: tuple[int, ...], hidden: int, columns: int, dtype: torch.dtype) -> list[Tensor]:
    return [random(*shape, hidden, dtype=dtype), random(columns, hidden, dtype=dtype, seed=1)]


# Shape of the tokens, hidden size, columns, how many of them belong to the vocabulary, tokens of a chunk.
SHAPES: dict[str, tuple[tuple[int, ...], int, int, int, int | None]] = {
    "chunks divide the tokens": ((4, 4), 32, 512, 512, 8),
    "the last chunk is smaller": ((19,), 16, 700, 690, 5),
    "a token a chunk, the last slice all padding": ((3,), 16, 1000, 500, 1),
    "one slice": ((2, 3), 8, 40, 33, None),
}
CASES = {
    f"{name}{terms}": (*shape, *numbers)
    for name, shape in SHAPES.items()
    for terms, numbers in {"": (0.0, 0.0), ", all terms": (0.1, 1e-2)}.items()
}
ALL_TERMS = [name for name in CASES if name.endswith("all terms")]


@pytest.mark.parametrize(("case", "dtype"), grid(CASES, bf16=ALL_TERMS, fp16=["one slice, all terms"]))
def test_recomputing(case: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="the kernels need triton")
    shape, hidden, columns, vocab_size, chunk, smoothing, z_loss = CASES[case]
    labels = labels_of(shape, vocab_size, ignored=smoothing > 0)
    options = {"num_valid": vocab_size, "label_smoothing": smoothing, "z_loss": z_loss, "chunk_tokens": chunk}

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x * SCALE, weight, labels, **options, backend="triton")

    peer = unfused(labels, vocab_size, smoothing, z_loss)
    compare("linear_cross_entropy/recomputing", ours, peer, peer, inputs_of(shape, hidden, columns, dtype))


@pytest.mark.parametrize(("case", "dtype"), grid(CASES, bf16=ALL_TERMS, fp16=["one slice, all terms"]))
def test_weighted(case: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="the kernels need triton")
    shape, hidden, columns, vocab_size, chunk, smoothing, z_loss = CASES[case]
    labels = labels_of(shape, vocab_size, ignored=smoothing > 0)
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(3)).to(labels.device)
    options = {"num_valid": vocab_size, "label_smoothing": smoothing, "z_loss": z_loss, "chunk_tokens": chunk}

    def ours(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weighted_linear_cross_entropy(x * SCALE, weight, labels, weights, **options, backend="triton")

    def peer(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        losses = unfused(labels, vocab_size, smoothing, z_loss)(x, weight)
        return (losses * weights).sum(), losses.detach()

    compare("linear_cross_entropy/weighted", ours, peer, peer, inputs_of(shape, hidden, columns, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("weighted", [False, True])
def test_bias_and_soft_cap(weighted: bool, dtype: torch.dtype) -> None:
    """A bias is added before the cap; there are several chunks, and a slice that is all padding."""
    pytest.importorskip("triton", reason="the kernels need triton")
    labels = labels_of((9,), 500, ignored=True)
    known = torch.rand(9, generator=torch.Generator().manual_seed(3)).to(labels.device)
    options = {"num_valid": 500, "softcap": 3.0, "label_smoothing": 0.1, "chunk_tokens": 2, "backend": "triton"}

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...] | Tensor:
        if weighted:
            return weighted_linear_cross_entropy(x, weight, labels, known, bias=bias, **options)  # type: ignore
        return linear_cross_entropy(x, weight, labels, bias=bias, **options)  # type: ignore[arg-type]

    def peer(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...] | Tensor:
        logits = 3.0 * (F.linear(x, weight, bias)[:, :500] / 3.0).tanh()
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
        losses = losses if losses.dtype == torch.float64 else losses.float()
        return ((losses * known).sum(), losses.detach()) if weighted else losses

    inputs = [*inputs_of((9,), 16, 700, dtype), random(700, dtype=dtype, seed=2)]
    compare("linear_cross_entropy/bias and soft cap", ours, peer, peer, inputs)


@settings(max_examples=10, deadline=None)
@given(
    tokens=st.integers(1, 12),
    vocab_size=st.integers(8, 400),
    padding=st.integers(0, 200),
    chunk=st.integers(1, 15),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_any_chunk(tokens: int, vocab_size: int, padding: int, chunk: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="the kernels need triton")
    labels = labels_of((tokens,), vocab_size, ignored=False)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        options = {"num_valid": vocab_size, "chunk_tokens": chunk}
        return linear_cross_entropy(x * SCALE, weight, labels, **options, backend="triton")  # type: ignore[arg-type]

    peer = unfused(labels, vocab_size, 0.0, 0.0)
    compare("linear_cross_entropy/any chunk", ours, peer, peer, inputs_of((tokens,), 16, vocab_size + padding, dtype))


def test_reference_gradcheck() -> None:
    labels = labels_of((4,), 5, ignored=True)
    inputs = inputs_of((4,), 3, 6, torch.float64)
    terms = Terms(0, 5, label_smoothing=0.1, z_loss=1e-2)
    assert torch.autograd.gradcheck(lambda x, w: ref.linear_cross_entropy(x, w, None, labels, terms), inputs)
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, labels), inputs)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_is_added_where_it_is_wanted(backend: str, weighted: bool) -> None:
    labels = labels_of((10,), 300, ignored=False)
    hidden, weight = inputs_of((10,), 16, 300, torch.float32)
    into = torch.ones_like(weight, requires_grad=False)
    options = {"chunk_tokens": 4, "backend": backend}

    def total(**more: Tensor) -> Tensor:
        if weighted:
            share = torch.full((10,), 0.1, device=hidden.device)
            return weighted_linear_cross_entropy(hidden, weight, labels, share, **options, **more)[0] * 3
        return linear_cross_entropy(hidden, weight, labels, **options, **more).mean() * 3  # type: ignore[arg-type]

    plain = torch.autograd.grad(total(), [hidden, weight])
    found = torch.autograd.grad(total(weight_grad=into), [hidden, weight], allow_unused=True)
    assert found[1] is None and torch.allclose(found[0], plain[0], atol=1e-6)
    assert torch.allclose(into - 1, plain[1], atol=2e-6) and plain[1].abs().max() > 1e-3


def test_only_wanted_gradients_are_computed() -> None:
    pytest.importorskip("triton", reason="the kernels need triton")
    labels = labels_of((8,), 200, ignored=False)
    share = torch.ones(8, device=labels.device)
    product = 2 * 8 * 16 * 200

    def products(run: Callable[[Tensor, Tensor], Tensor], wants_hidden: bool, wants_weight: bool) -> float:
        hidden, weight = (x.detach() for x in inputs_of((8,), 16, 200, torch.float32))
        hidden.requires_grad_(wants_hidden)
        weight.requires_grad_(wants_weight)
        with bench.Watch() as watch:
            out = run(hidden, weight)
            if out.requires_grad:
                out.sum().backward()
        assert (hidden.grad is not None, weight.grad is not None) == (wants_hidden, wants_weight)
        return watch.flops / product

    def recomputing(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, backend="triton")

    def weighted(hidden: Tensor, weight: Tensor) -> Tensor:
        return weighted_linear_cross_entropy(hidden, weight, labels, share, backend="triton")[0]

    wanted = [(False, False), (True, False), (False, True), (True, True)]
    assert [products(recomputing, *x) for x in wanted] == [1, 3, 3, 4]
    assert [products(weighted, *x) for x in wanted] == [1, 2, 2, 3]


def _assert_as_predicted(rows: dict[str, tuple[int, int, int, int]], shape: bench.Shape) -> None:
    for name, (peak, expected, _, flops) in rows.items():
        print(f"{name}: peak {peak / 1e6:.2f} MB, closed form {expected / 1e6:.2f} MB")
        assert abs(peak / expected - 1) < 0.02, (name, peak, expected)
        product = 2 * shape["tokens"] * shape["hidden"] * shape["vocab_size"]
        assert flops == product * (4 if name == "ours" else 3)


def test_peak_memory_at_llama3s_shape() -> None:
    """On the meta device: tensors have sizes but no data."""
    pytest.importorskip("triton", reason="the kernels need triton")
    rows = bench.memory_table(bench.LLAMA3_8B, torch.bfloat16, "meta")
    _assert_as_predicted(rows, bench.LLAMA3_8B)
    logits = 2 * 8192 * 128256
    results = 2 * 4096 * (8192 + 128256)
    assert rows["ours"][2] < logits and rows["ours"][0] - results < logits / 5  # [tokens, vocabulary] never exists
    assert rows["ours, unfused in place"][0] - results >= logits


def test_peak_memory_with_data(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the kernels need triton")
    monkeypatch.setattr("llm_kernels.linear_cross_entropy.op.CHUNK_BYTES", 1 << 18)
    monkeypatch.setattr("llm_kernels.linear_cross_entropy.op.WEIGHTED_CHUNK_TOKENS", 128)
    shape = {"tokens": 256, "hidden": 96, "vocab_size": 512}
    gc.collect()
    gc.freeze()  # bench.Watch collects garbage at every large tensor: not to look at all older objects saves seconds
    try:
        rows = bench.memory_table(shape, torch.float32, str(default_device()))
    finally:
        gc.unfreeze()
    _assert_as_predicted(rows, shape)


def test_bad_input_is_named() -> None:
    hidden, weight, labels = torch.ones(3, 4), torch.ones(8, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="last dims and dtypes must match"):
        linear_cross_entropy(hidden, weight.bfloat16(), labels)
    with pytest.raises(ValueError, match="labels are"):
        linear_cross_entropy(hidden, weight, labels[:2])
    with pytest.raises(ValueError, match="num_valid = 9"):
        linear_cross_entropy(hidden, weight, labels, num_valid=9)
    with pytest.raises(ValueError, match=r"bias is torch.float32 \(7,\), not torch.float32 \(8,\)"):
        linear_cross_entropy(hidden, weight, labels, bias=torch.ones(7))
    with pytest.raises(ValueError, match=r"softcap = -1\.0"):
        linear_cross_entropy(hidden, weight, labels, softcap=-1.0)
    with pytest.raises(ValueError, match="weight_grad is"):
        linear_cross_entropy(hidden, weight, labels, weight_grad=weight.bfloat16())
    with pytest.raises(ValueError, match="token_weights"):
        weighted_linear_cross_entropy(hidden, weight, labels, torch.ones(2))
