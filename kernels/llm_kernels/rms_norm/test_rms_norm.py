"""RMSNorm against its formula in fp64, beside torch's own in the same dtype.

A piece is the part of a row that a program loads at a time; the names of shapes say which regime they cover.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_kernels.memory_checker import Traffic
from llm_kernels.rms_norm import ref
from llm_kernels.rms_norm.bench import BENCHMARK
from llm_kernels.rms_norm.op import add_rms_norm, rms_norm
from llm_kernels.testing import TOLERANCE, assert_matches, compare, default_device, grid, random

EPS = 1e-5
triton = pytest.importorskip("triton", reason="the kernels need triton")


def truth(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def framework(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def ours(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPS, backend="triton")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(3, 2, 64), (1, 1, 2), (7, 33), (2, 3, 1000)], ids=str)
def test_reference_matches_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)]
    assert_matches(lambda x, w: ref.rms_norm(x, w, EPS), truth, inputs)


def test_reference_gradcheck() -> None:
    inputs = (random(3, 5, dtype=torch.float64), random(5, dtype=torch.float64, seed=1))
    assert torch.autograd.gradcheck(lambda x, w: ref.rms_norm(x, w, EPS), inputs)


SHAPES: dict[str, tuple[int, ...]] = {
    "two pieces, a real width": (2, 3, 4096),
    "less than a piece": (9, 1000),
    "one column more than a piece": (5, 1025),
    "five full pieces forward, two and a half backward": (7, 5120),
    "odd width, the last piece not full": (2, 5003),
    "one column": (3, 1),
    "several rows in a tile, the last tile not full": (37, 48),
    "no rows": (0, 64),
}


@pytest.mark.parametrize(("case", "dtype"), grid(SHAPES, fp16=["less than a piece"]))
def test_kernel(case: str, dtype: torch.dtype) -> None:
    shape = SHAPES[case]
    inputs = [random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)]
    compare("rms_norm/plain", ours, framework, truth, inputs)


WITH_RESIDUAL: dict[str, tuple[int, ...]] = {
    "several rows in a tile, the last tile not full": (2, 3, 512),
    "fewer rows than a tile": (9, 100),
    "two full pieces": (6, 2048),
    "several pieces, the last not full": (3, 5003),
    "no rows": (0, 64),
}


@pytest.mark.parametrize(("case", "dtype"), grid(WITH_RESIDUAL, fp16=["fewer rows than a tile"]))
def test_kernel_with_residual(case: str, dtype: torch.dtype) -> None:
    shape = WITH_RESIDUAL[case]

    def exact(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return truth(x + residual, weight), x + residual

    def peer(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return framework(x + residual, weight), x + residual

    inputs = [*(random(*shape, dtype=dtype, seed=i) for i in range(2)), random(shape[-1], dtype=dtype, seed=2)]
    compare("rms_norm/residual", lambda *a: add_rms_norm(*a, EPS, backend="triton"), peer, exact, inputs)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_weight_of_another_dtype(weight_dtype: torch.dtype) -> None:
    """An fp32 weight with bf16 activations, as in mixed precision, and the other way round."""
    dtype = torch.bfloat16 if weight_dtype == torch.float32 else torch.float32
    x, weight = random(5, 64, dtype=dtype), random(64, dtype=weight_dtype, seed=1)
    y = ours(x, weight)
    dy = torch.ones_like(y)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = truth(*wide)
    wanted = torch.autograd.grad(exact, wide, dy.double())
    assert (y.dtype, dx.dtype, dweight.dtype) == (dtype, dtype, weight_dtype)
    for found, right in zip((y, dx, dweight), (exact.detach(), *wanted)):
        limit = torch.finfo(found.dtype).eps * right.abs().max().item() * (2 if found.dtype == torch.float32 else 0.51)
        assert (found.double() - right).abs().max() <= limit


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    ("dtype", "residual_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_residual_of_another_dtype(dtype: torch.dtype, residual_dtype: torch.dtype, backend: str) -> None:
    """The sum has the residual's dtype, for models that keep the residual stream in fp32 and compute layers in bf16."""
    x, residual, weight = (
        random(5, 64, dtype=dtype),
        random(5, 64, dtype=residual_dtype, seed=1),
        random(64, dtype=dtype),
    )
    y, total = add_rms_norm(x, residual, weight, EPS, backend=backend)
    assert (y.dtype, total.dtype) == (dtype, residual_dtype)
    grads = [random(5, 64, dtype=t.dtype, seed=3 + i).detach() for i, t in enumerate((y, total))]
    found = torch.autograd.grad([y, total], (x, residual, weight), grads)
    # The sum is rounded as the operator documents, everything else is fp64; the gradient ignores the rounding.
    wide = [t.detach().double().requires_grad_() for t in (x, residual, weight)]
    exact_sum = wide[0] + wide[1]
    rounded = exact_sum + (exact_sum.to(residual_dtype).double() - exact_sum).detach()
    exact = truth(rounded, wide[2])
    wanted = torch.autograd.grad([exact, rounded], wide, [g.double() for g in grads])
    for ours_, right in zip((y, total, *found), (exact.detach(), rounded.detach(), *wanted)):
        # The kernel rounds each gradient once, to its own dtype; torch rounds that of x to the sum's dtype first.
        twice = backend == "torch" and ours_ is found[0]
        roundings = 2.0 if twice else 4.0 if ours_.dtype == torch.float32 else 0.6
        coarse = torch.bfloat16 if twice else ours_.dtype
        limit = torch.finfo(coarse).eps * right.abs().max().item() * roundings
        assert (ours_.double() - right).abs().max() <= limit
    only_sum = add_rms_norm(x, residual, weight, EPS, backend=backend)[1]
    assert [g.dtype for g in torch.autograd.grad(only_sum.sum(), (x, residual))] == [dtype, residual_dtype]


def test_frozen_weight_costs_no_pass_for_its_gradient(traffic: Traffic) -> None:
    rows, columns = 512, 256
    x, weight = random(rows, columns, dtype=torch.bfloat16), random(columns, dtype=torch.bfloat16, seed=1)
    residual = random(rows, columns, dtype=torch.bfloat16, seed=2)

    def gradient(weight: Tensor, with_residual: bool) -> tuple[Tensor, int, int]:
        y = add_rms_norm(x, residual, weight, EPS, backend="triton")[0] if with_residual else ours(x, weight)
        launches, moved = traffic.launches, traffic.bytes_loaded + traffic.bytes_stored
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        return dx, traffic.launches - launches, traffic.bytes_loaded + traffic.bytes_stored - moved

    for with_residual in (False, True):
        trained, frozen = gradient(weight, with_residual), gradient(weight.detach(), with_residual)
        assert torch.equal(trained[0], frozen[0]) and (trained[1], frozen[1]) == (2, 1)
        assert frozen[2] <= 1.03 * (3 * rows * columns * 2 + 4 * rows)


@settings(max_examples=15)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 300),
    padding=st.sampled_from([0, 1, 16]),
    dtype=st.sampled_from(list(TOLERANCE)),
    expanded=st.booleans(),
)
def test_any_shape_and_stride(rows: int, columns: int, padding: int, dtype: torch.dtype, expanded: bool) -> None:
    """The input is columns of a wider tensor, and the upstream gradient may be one row, expanded."""

    def view(op):
        def run(x: Tensor, weight: Tensor) -> Tensor:
            y = op(x[:, padding : padding + columns], weight)
            return y.sum(0).expand(rows, columns) if expanded else y

        return run

    inputs = [random(rows, columns + 2 * padding, dtype=dtype), random(columns, dtype=dtype, seed=1)]
    compare("rms_norm/strided", view(ours), view(framework), view(truth), inputs, floor=4.0)


def test_tiles_pad_little_and_fit_registers() -> None:
    """Rows of published models' widths lose less than a fifth to padding (narrow ones less than a half), and the pieces
    fit the registers."""
    from llm_kernels.rms_norm.kernel import tile

    for columns in (1536, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192, 12288, 14336, 16384, 65536):
        for direction in ("forward", "backward"):
            cut = tile(columns, direction)
            assert columns <= cut.pieces * cut.block_n and cut.block_n == 256 * cut.warps, cut
            allowed = 1.5 if columns < 2048 or (columns, direction) == (2560, "backward") else 1.2
            assert cut.pieces * cut.block_n <= allowed * columns, (columns, cut)
            assert cut.warps_per_sm >= cut.warps or cut.warps == 32
    # Two programs of 8 warps fit on an SM, where one of 16 would be alone.
    assert [tile(columns, "backward").warps for columns in (5120, 8192)] == [8, 8]


def test_only_one_output_used() -> None:
    x, residual, weight = (random(4, 32, dtype=torch.float32, seed=i) for i in range(3))
    weight = weight[0].detach().requires_grad_()
    add_rms_norm(x, residual, weight, EPS, backend="triton")[1].sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x)) and weight.grad is None


def test_weight_gradient_is_deterministic() -> None:
    inputs = [random(200, 64, dtype=torch.bfloat16), random(64, dtype=torch.bfloat16, seed=1)]
    first, second = (torch.autograd.grad(ours(*inputs).sum(), inputs[1])[0] for _ in range(2))
    assert torch.equal(first, second)


# 2,048 rows, beside which the weight and the partial sums of its gradient are small.
@pytest.mark.parametrize("residual", [False, True])
def test_moves_the_least_bytes(traffic: Traffic, residual: bool) -> None:
    shape = {**BENCHMARK.small, "tokens": 2048, "residual": residual}
    inputs = BENCHMARK.make(shape, torch.bfloat16, default_device())
    out = BENCHMARK.providers["ours"]()(*inputs)
    least = BENCHMARK.bytes_moved(shape, torch.bfloat16)  # type: ignore[misc]
    outputs = out if isinstance(out, tuple) else (out,)
    forward = traffic.bytes_loaded + traffic.bytes_stored
    torch.autograd.grad(outputs, inputs, [torch.ones_like(x) for x in outputs])
    backward = traffic.bytes_loaded + traffic.bytes_stored - forward
    print(
        f"rms_norm residual={residual}: forward {forward / least.forward:.3f}, backward {backward / least.backward:.3f}"
    )
    assert forward <= 1.03 * least.forward and backward <= 1.03 * least.backward


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="weight has shape"):
        rms_norm(torch.ones(2, 4), torch.ones(3), EPS)
    with pytest.raises(ValueError, match="residual has shape"):
        add_rms_norm(torch.ones(2, 4), torch.ones(2, 3), torch.ones(4), EPS)
    with pytest.raises(ValueError, match="backend"):
        rms_norm(torch.ones(2, 4), torch.ones(4), EPS, backend="cuda")


def test_fake_tensors_see_through() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, weight = torch.empty(2, 3, 64, dtype=torch.bfloat16), torch.empty(64, dtype=torch.bfloat16)
        y, rstd = torch.ops.llm_kernels.rms_norm(x, weight, EPS)
    assert y.shape == x.shape and y.dtype == x.dtype and rstd.shape == (6,)
