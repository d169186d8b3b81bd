"""Cross entropy against its formula in fp64, beside torch's own in the same dtype.

In names and comments a split is a part of a token's columns that one program reads, and a tile what it loads at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_kernels.cross_entropy import ref
from llm_kernels.cross_entropy.bench import BENCHMARK
from llm_kernels.cross_entropy.op import cross_entropy
from llm_kernels.cross_entropy.ref import Terms
from llm_kernels.memory_checker import Traffic
from llm_kernels.testing import TOLERANCE, assert_matches, compare, default_device, grid, random

# In the interpreter numpy warns where a difference from the lowest number becomes infinite, as it should.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def labels_of(shape: tuple[int, ...], vocab_size: int, ignored: bool = False) -> Tensor:
    labels = torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(0))
    if ignored and labels.numel():
        labels.view(-1)[::3] = -100
    return labels.to(default_device())


def peer(labels: Tensor, vocab_size: int, smoothing: float = 0.0, z_loss: float = 0.0) -> Callable[[Tensor], Tensor]:
    """The loss by torch's own operators; in fp64 it is the truth."""

    def run(logits: Tensor) -> Tensor:
        valid = logits[..., :vocab_size].reshape(-1, vocab_size)
        losses = F.cross_entropy(valid, labels.flatten(), reduction="none", label_smoothing=smoothing).view(
            labels.shape
        )
        if z_loss:
            losses = losses + z_loss * valid.logsumexp(-1).square().view(labels.shape).masked_fill(labels == -100, 0.0)
        return losses if losses.dtype == torch.float64 else losses.float()

    return run


def ours(labels: Tensor, vocab_size: int, smoothing: float = 0.0, z_loss: float = 0.0) -> Callable[[Tensor], Tensor]:
    options = {"num_valid": vocab_size, "label_smoothing": smoothing, "z_loss": z_loss}
    return lambda logits: cross_entropy(logits, labels, **options, backend="triton")  # type: ignore[return-value,arg-type]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("columns", "vocab_size"), [(50, 50), (64, 50), (1, 1), (8, 3)])
def test_reference_matches_fp64(columns: int, vocab_size: int, dtype: torch.dtype) -> None:
    labels = labels_of((5, 3), vocab_size)
    run = lambda x: ref.cross_entropy(x, labels, Terms(0, vocab_size))[0]  # noqa: E731
    assert_matches(run, peer(labels, vocab_size), [random(5, 3, columns, dtype=dtype)])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_reference_with_everything(dtype: torch.dtype) -> None:
    labels = labels_of((5, 3), 20, ignored=True)
    terms = Terms(0, 20, label_smoothing=0.1, z_loss=0.01)
    compare(
        "cross_entropy/reference",
        lambda x: ref.cross_entropy(x, labels, terms)[0],
        peer(labels, 20, 0.1, 0.01),
        peer(labels, 20, 0.1, 0.01),
        [random(5, 3, 24, dtype=dtype)],
    )


def test_reference_gradcheck() -> None:
    labels = labels_of((4,), 5, ignored=True)
    terms = Terms(0, 5, label_smoothing=0.1, z_loss=0.01)
    assert torch.autograd.gradcheck(lambda x: ref.cross_entropy(x, labels, terms), random(4, 7, dtype=torch.float64))


# Shape of the tokens, columns, and how many of them belong to the vocabulary.
SHAPES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "several tiles and a part of one": ((20,), 20000, 20000),
    "exactly one tile": ((17,), 8192, 8192),
    "padding": ((3, 7), 1024, 1000),
    "odd vocabulary in aligned rows": ((2, 9), 5056, 5025),
    "unaligned rows": ((19,), 5025, 5025),
    "one token in several splits": ((1,), 40000, 39000),
    "unaligned rows in several splits": ((3,), 30001, 30001),
    "one column": ((5,), 1, 1),
    "no tokens": ((0,), 64, 64),
    "less than a tile": ((50,), 128, 100),
}


@pytest.mark.parametrize(("case", "dtype"), grid(SHAPES, fp16=["padding"]))
def test_kernel(case: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="the kernels need triton")
    shape, columns, vocab_size = SHAPES[case]
    labels = labels_of(shape, vocab_size)
    run = ours(labels, vocab_size), peer(labels, vocab_size), peer(labels, vocab_size)
    compare("cross_entropy/plain", *run, [random(*shape, columns, dtype=dtype)])


# Tokens, columns and how many of them belong to the vocabulary; label smoothing and z-loss.
TERMS = {
    f"{terms}, {splits}": (*shape, *numbers)
    for splits, shape in {"one split": (18, 9000, 9000), "several splits": (2, 30000, 29990)}.items()
    for terms, numbers in {"smoothing": (0.1, 0.0), "z-loss": (0.0, 1e-2), "both": (0.2, 1e-2)}.items()
}


# Both terms at once cover the sums of each; each alone covers the branch that leaves the other out.
@pytest.mark.parametrize(("case", "dtype"), grid(TERMS, bf16=["both, one split", "both, several splits"], fp16=[]))
def test_kernel_terms(case: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="the kernels need triton")
    tokens, columns, vocab_size, smoothing, z_loss = TERMS[case]
    labels = labels_of((tokens,), vocab_size, ignored=True)
    arguments = labels, vocab_size, smoothing, z_loss
    run = ours(*arguments), peer(*arguments), peer(*arguments)
    compare("cross_entropy/smoothing, z-loss, ignored", *run, [random(tokens, columns, dtype=dtype)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_soft_cap(dtype: torch.dtype) -> None:
    """A cap of 30, as Gemma has, which changes only the largest logits, and a cap that changes all."""
    pytest.importorskip("triton", reason="the kernels need triton")
    labels = labels_of((6,), 9000, ignored=True)
    for cap, scale in ((30.0, 10.0), (1.0, 1.0)):
        both = peer(labels, 9000, 0.1, 1e-2)

        def theirs(x: Tensor) -> Tensor:
            return both(cap * (x * scale / cap).tanh())  # noqa: B023

        def found(x: Tensor) -> Tensor:
            options = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": cap, "num_valid": 9000}  # noqa: B023
            return cross_entropy(x * scale, labels, **options, backend="triton")  # type: ignore  # noqa: B023

        compare("cross_entropy/soft cap", found, theirs, theirs, [random(6, 9008, dtype=dtype)])


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(1, 20),
    vocab_size=st.integers(8, 300),  # with fewer, all gradients may be near 0, and any rounding is large beside them
    padding=st.sampled_from([0, 1, 8, 300]),
    gap=st.sampled_from([0, 1, 16]),
    smoothing=st.sampled_from([0.0, 0.1]),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_any_shape_and_stride(tokens: int, vocab_size: int, padding: int, gap: int, smoothing: float, dtype) -> None:
    """Rows may have gaps between them, and padding may hold NaN."""
    pytest.importorskip("triton", reason="the kernels need triton")
    labels = labels_of((tokens,), vocab_size, ignored=True)
    columns = vocab_size + padding
    garbage = torch.zeros(columns + gap, dtype=dtype, device=labels.device)
    garbage[vocab_size:] = torch.nan

    def view(op: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: op((x + garbage.to(x.dtype))[:, :columns])

    run = ours(labels, vocab_size, smoothing), peer(labels, vocab_size, smoothing), peer(labels, vocab_size, smoothing)
    compare("cross_entropy/strided", *map(view, run), [random(tokens, columns + gap, dtype=dtype)])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_log_sum_exp_is_an_output(backend: str) -> None:
    labels = labels_of((6,), 300, ignored=True)

    def both(logits: Tensor) -> tuple[Tensor, Tensor]:
        lse = logits.logsumexp(-1).masked_fill(labels == -100, 0.0)
        return peer(labels, 300)(logits), lse

    def found(logits: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy(logits, labels, return_lse=True, backend=backend)  # type: ignore[return-value]

    logits = random(6, 300, dtype=torch.float32)
    compare("cross_entropy/log-sum-exp", found, both, both, [logits])
    only = torch.autograd.grad(found(logits)[1].sum(), logits)[0]  # the losses are not used
    wanted = torch.autograd.grad(both(logits)[1].sum(), logits)[0]
    torch.testing.assert_close(only, wanted)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradient_over_the_logits(dtype: torch.dtype) -> None:
    labels = labels_of((9,), 500, ignored=True)
    x = random(9, 512, dtype=dtype)
    grads = []
    for inplace in (False, True):
        logits = x * 1
        losses = cross_entropy(logits, labels, num_valid=500, z_loss=1e-3, inplace_backward=inplace, backend="triton")
        losses.sum().backward(retain_graph=True)  # type: ignore[union-attr]
        assert x.grad is not None
        grads.append(x.grad.clone())
        x.grad = None
        assert torch.equal(logits.detach(), grads[-1]) == inplace
    assert torch.equal(*grads)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("ignore_index", [0, 5])
def test_ignored_label_may_be_a_token_id(ignore_index: int, backend: str) -> None:
    """A case of Liger's: ignore_index is a token id of the vocabulary, which still counts in the losses of tokens with
    other labels."""
    labels = labels_of((30,), 8)
    assert (labels == ignore_index).any()

    def ours(x: Tensor) -> Tensor:
        return cross_entropy(x, labels, ignore_index=ignore_index, label_smoothing=0.1, backend=backend)  # type: ignore

    def theirs(x: Tensor) -> Tensor:
        return F.cross_entropy(x, labels, ignore_index=ignore_index, label_smoothing=0.1, reduction="none")

    compare("cross_entropy/ignored token id", ours, theirs, theirs, [random(30, 8, dtype=torch.float32)])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_mean_over_no_token(backend: str) -> None:
    """A case of Transformer Engine's: if all tokens are ignored the mean is 0 / 0, and its NaN must not reach the
    gradient."""
    logits, labels = random(4, 40, dtype=torch.float32), torch.full((4,), -100, device=default_device())
    losses = cross_entropy(logits, labels, label_smoothing=0.1, z_loss=1e-3, backend=backend)
    mean = losses.sum() / (labels != -100).sum()  # type: ignore[union-attr]
    mean.backward()
    assert mean.isnan() and logits.grad is not None and not logits.grad.any()


def test_largest_vocabulary_and_turned_rows() -> None:
    """Cases of QuACK and Transformer Engine: 262,144 columns, as Gemma has, and logits [S, B, V] read as [B, S, V]."""
    pytest.importorskip("triton", reason="the kernels need triton")
    for shape, vocab_size in (((1, 1), 262144), ((3, 2), 1000)):
        labels = labels_of(shape[::-1], vocab_size)

        def turned(op: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda x: op(x.transpose(0, 1))

        run = map(turned, (ours(labels, vocab_size), peer(labels, vocab_size), peer(labels, vocab_size)))
        compare("cross_entropy/turned", *run, [random(*shape, vocab_size, dtype=torch.bfloat16)])


@pytest.mark.parametrize("tokens", [3, 40])
def test_parts_of_a_vocabulary_join_to_the_whole(tokens: int) -> None:
    """Joins the statistics that four ranks would compute, in one process; the columns of the last are all padding."""
    kernel = pytest.importorskip("llm_kernels.cross_entropy.kernel", reason="the kernels need triton")
    logits, labels = random(tokens, 6000, dtype=torch.float32).detach(), labels_of((tokens,), 4100, ignored=True)
    whole = Terms(0, 4100, label_smoothing=0.1, z_loss=1e-2)
    stats = []
    for rank in range(4):
        terms = whole._replace(first=1500 * rank, num_valid=min(max(4100 - 1500 * rank, 0), 1500))
        stats.append(kernel.forward(logits[:, 1500 * rank : 1500 * (rank + 1)], labels, terms, whole=False))
    found = kernel.join(torch.cat(stats), labels, whole)
    wanted = ref.forward(logits.double(), labels, whole)
    for x, y in zip(found, wanted, strict=True):
        kept = labels != -100
        torch.testing.assert_close(x[..., kept].double(), y[..., kept], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_extremes(backend: str) -> None:
    """Large logits do not overflow, -inf has probability 0, and a label outside of the vocabulary or a NaN shows in the
    loss."""
    values = [[1e4, -1e4, 0.0], [-torch.inf, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, torch.nan, 0.0], [3e38, 3e38, -3e38]]
    logits = torch.tensor(values, device=default_device(), requires_grad=True)
    labels = torch.tensor([1, 1, 3, 0, 0], device=logits.device)
    losses = cross_entropy(logits, labels, backend=backend)
    losses[:2].sum().backward()  # type: ignore[index]
    found = losses.tolist()  # type: ignore[union-attr]
    assert found[0] == 2e4 and abs(found[1] - 0.693147) < 1e-6 and found[2] == torch.inf and found[3] != found[3]
    assert abs(found[4]) < 1e32  # 3e38 + log 2 - 3e38
    assert logits.grad is not None and logits.grad[0].tolist() == [1.0, -1.0, 0.0]
    assert logits.grad[1].tolist() == pytest.approx([0.0, -0.5, 0.5])


def test_moves_the_least_bytes(traffic: Traffic) -> None:
    shape = BENCHMARK.small
    logits, labels = BENCHMARK.make(shape, torch.bfloat16, default_device())
    losses = BENCHMARK.providers["ours"]()(logits, labels)
    least = BENCHMARK.bytes_moved(shape, torch.bfloat16)  # type: ignore[misc]
    forward = traffic.bytes_loaded + traffic.bytes_stored
    losses.backward(torch.ones_like(losses))
    backward = traffic.bytes_loaded + traffic.bytes_stored - forward
    print(f"cross_entropy: forward {forward / least.forward:.3f}, backward {backward / least.backward:.3f}")
    assert forward <= 1.03 * least.forward and backward <= 1.03 * least.backward


def test_ignored_tokens_are_not_read(traffic: Traffic) -> None:
    logits = random(32, 1024, dtype=torch.float32)
    cross_entropy(logits, torch.full((32,), -100), backend="triton").sum().backward()  # type: ignore[union-attr]
    assert traffic.bytes_loaded < 32 * 64 and logits.grad is not None and not logits.grad.any()


def test_bad_input_is_named() -> None:
    logits = torch.ones(2, 4, requires_grad=True)
    with pytest.raises(ValueError, match="labels are"):
        cross_entropy(logits, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels are"):
        cross_entropy(logits, torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="num_valid = 5"):
        cross_entropy(logits, torch.zeros(2, dtype=torch.int64), num_valid=5)
    for option, value in (("label_smoothing", 1.5), ("softcap", -30.0), ("softcap", torch.inf)):
        with pytest.raises(ValueError, match=f"{option} = {value}"):
            cross_entropy(logits, torch.zeros(2, dtype=torch.int64), **{option: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="inplace_backward"):
        cross_entropy(logits, torch.zeros(2, dtype=torch.int64), inplace_backward=True)


def test_fake_tensors_see_through() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        logits = torch.empty(2, 3, 64, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.empty(2, 3, dtype=torch.int64)
        losses, lse = cross_entropy(logits, labels, label_smoothing=0.1, return_lse=True, backend="triton")
        losses.sum().backward()
    assert losses.shape == lse.shape == labels.shape and losses.dtype == torch.float32
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


def test_liger_agrees() -> None:
    liger = pytest.importorskip("liger_kernel.ops.cross_entropy", reason="a second opinion where it is installed")
    logits, labels = random(6, 300, dtype=torch.float32), labels_of((6,), 300, ignored=True)
    kept = (labels != -100).sum()
    # Arguments: input, target, weight, ignore_index, z-loss, label smoothing, reduction.
    theirs = liger.LigerCrossEntropyFunction.apply(logits.detach().clone(), labels, None, -100, 1e-2, 0.1, "sum")[0]
    found = cross_entropy(logits, labels, label_smoothing=0.1, z_loss=1e-2, backend="triton")
    assert kept and torch.allclose(found.sum(), theirs, rtol=1e-6)  # type: ignore[union-attr]
