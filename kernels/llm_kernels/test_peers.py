"""Our operators beside Liger's kernels: for the same inputs, outputs and gradients agree within some roundings.

Liger (arXiv 2410.10989) is a second oracle, independent of our references. Both run in the same interpreter.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton")
pytest.importorskip("liger_kernel", reason="the peer is not installed")

from llm_kernels.cross_entropy.op import cross_entropy
from llm_kernels.linear_cross_entropy.op import linear_cross_entropy
from llm_kernels.rms_norm.op import add_rms_norm, rms_norm
from llm_kernels.rope.op import rope
from llm_kernels.rope.ref import inverse_frequencies
from llm_kernels.rope.table import RopeTable
from llm_kernels.swiglu.op import swiglu
from llm_kernels.testing import default_device, random

EPS = 1e-6
# Two kernels that sum in different orders differ by some roundings of the largest value.
ROUNDINGS = 8.0
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def library_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the one function that Liger takes from libdevice, which Triton's interpreter does not have."""
    import triton.language as tl
    from liger_kernel.ops import fused_add_rms_norm, rms_norm
    from triton.runtime.interpreter import TensorHandle

    def rsqrt(x):
        return tl.tensor(TensorHandle(1 / np.sqrt(x.handle.data), x.handle.dtype), x.type)

    if not torch.cuda.is_available():
        for module in (rms_norm, fused_add_rms_norm):
            monkeypatch.setattr(module, "rsqrt", rsqrt)


def agree(ours: Callable, theirs: Callable, inputs: list[Tensor]) -> None:
    """Asserts that outputs and gradients of both differ by at most ROUNDINGS of the largest value."""
    results = []
    for op in (ours, theirs):
        copies = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        out = op(*copies)
        outputs = [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]
        generator = torch.Generator().manual_seed(7)
        weights = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
        leaves = [x for x in copies if x.requires_grad]
        kept = [x.detach().clone() for x in outputs]
        results.append([*kept, *torch.autograd.grad(outputs, leaves, weights)])
    for found, wanted in zip(*results, strict=True):
        assert found.shape == wanted.shape
        limit = ROUNDINGS * torch.finfo(inputs[0].dtype).eps * wanted.float().abs().max()
        assert (found.float() - wanted.float()).abs().max() <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 16, 256), (3, 7, 41)], ids=["power of two", "odd width"])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    agree(
        lambda x, w: rms_norm(x, w, EPS, backend="triton"),
        lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "none" if dtype == torch.float32 else "gemma", False),
        [random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)],
    )


@pytest.mark.parametrize(
    ("shape", "offset"),
    [((1, 760), 0.0), ((19, 1128), 0.0), ((5, 256), 1.0)],
    ids=["multiple of 8, no power of two", "several rows of such a width", "Gemma's weight, which is added to 1"],
)
def test_rms_norm_of_other_widths_and_offset(shape: tuple[int, ...], offset: float) -> None:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    agree(
        lambda x, w: rms_norm(x, w + offset, EPS, backend="triton"),
        lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, offset, "gemma", False),
        [random(*shape, dtype=torch.bfloat16), random(shape[-1], dtype=torch.float32, seed=1)],
    )


@pytest.mark.parametrize("shape", [(2, 16, 256), (3, 7, 41)], ids=["power of two", "odd width"])
def test_add_rms_norm(shape: tuple[int, ...]) -> None:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    agree(
        lambda x, r, w: add_rms_norm(x, r, w, EPS, backend="triton"),
        lambda x, r, w: LigerFusedAddRMSNormFunction.apply(x, r, w, EPS, 0.0, "llama", False),
        [
            *(random(*shape, dtype=torch.float32, seed=i) for i in range(2)),
            random(shape[-1], dtype=torch.float32, seed=2),
        ],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 8, 2 * 64), (6, 2 * 41), (9, 2 * 1341)],
    ids=["power of two", "odd width", "a block and a part of one"],
)
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    agree(
        lambda x: swiglu(x, backend="triton"),
        lambda x: LigerSiLUMulFunction.apply(*(half.contiguous() for half in x.chunk(2, dim=-1))),
        [random(*shape, dtype=dtype)],
    )


@pytest.mark.parametrize(("heads", "groups", "dim"), [(4, 2, 64), (3, 1, 32)], ids=["groups", "multi-query"])
def test_rope(heads: int, groups: int, dim: int) -> None:
    from liger_kernel.ops.rope import LigerRopeFunction

    tokens, rows = 9, 2
    table = RopeTable.make(inverse_frequencies(dim, 10000.0, device=default_device()), tokens)

    def theirs(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        cos, sin = (x.squeeze(2).transpose(0, 1).contiguous() for x in table.full(tokens))
        turned = LigerRopeFunction.apply(q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), cos, sin)
        return tuple(x.permute(2, 0, 1, 3) for x in turned)

    inputs = [random(tokens, rows, n, dim, dtype=torch.float32, seed=n) for n in (heads, groups)]
    agree(lambda q, k: rope(q, k, table, backend="triton"), theirs, inputs)


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-3), (0.1, 1e-3)])
@pytest.mark.parametrize(("tokens", "vocab_size"), [(17, 301), (8, 1024)], ids=["odd vocabulary", "power of two"])
def test_cross_entropy(tokens: int, vocab_size: int, smoothing: float, z_loss: float) -> None:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    labels = torch.randint(0, vocab_size, (tokens,), generator=torch.Generator().manual_seed(1)).to(default_device())
    labels[::5] = -100
    options = {"label_smoothing": smoothing, "z_loss": z_loss}

    def theirs(x: Tensor) -> Tensor:
        return LigerCrossEntropyFunction.apply(x * 1.0, labels, None, -100, z_loss, smoothing, "sum")[0]

    agree(lambda x: cross_entropy(x, labels, **options, backend="triton").sum(), theirs, [
        random(tokens, vocab_size, dtype=torch.float32)
    ])  # fmt: skip


def test_linear_cross_entropy() -> None:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    tokens, columns, vocab_size = 24, 32, 200
    labels = torch.randint(0, vocab_size, (tokens,), generator=torch.Generator().manual_seed(1)).to(default_device())
    labels[3] = -100

    def theirs(hidden: Tensor, weight: Tensor) -> Tensor:
        return LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, labels, None, None, -100, 0.0, 0.0, "sum"
        )[0]  # fmt: skip

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, chunk_tokens=8, backend="triton").sum()

    hidden, weight = (
        random(tokens, columns, dtype=torch.float32),
        random(vocab_size, columns, dtype=torch.float32, seed=1),
    )
    agree(ours, theirs, [hidden, weight])
