"""SwiGLU against its formula in fp64, beside torch's own in the same dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_kernels.memory_checker import Traffic
from llm_kernels.swiglu import ref
from llm_kernels.swiglu.bench import BENCHMARK
from llm_kernels.swiglu.op import swiglu
from llm_kernels.testing import TOLERANCE, assert_matches, compare, default_device, grid, random

pytest.importorskip("triton", reason="the kernels need triton")


def truth(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def framework(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def ours(x: Tensor) -> Tensor:
    return swiglu(x, backend="triton")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(3, 2, 64), (1, 1, 2), (7, 34)], ids=str)
def test_reference_matches_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_matches(ref.swiglu, truth, [random(*shape, dtype=dtype)])


def test_reference_gradcheck() -> None:
    assert torch.autograd.gradcheck(ref.swiglu, (random(3, 10, dtype=torch.float64),))


SHAPES: dict[str, tuple[int, ...]] = {
    "a real width": (2, 2, 2 * 11008),
    "two blocks and a part of one": (3, 4500),
    "less than a block": (5, 34),
    "one pair": (1, 2),
    "no rows": (0, 8),
}


@pytest.mark.parametrize(("case", "dtype"), grid(SHAPES, fp16=["two blocks and a part of one"]))
def test_kernel(case: str, dtype: torch.dtype) -> None:
    compare("swiglu/plain", ours, framework, truth, [random(*SHAPES[case], dtype=dtype)])


@settings(max_examples=15)
@given(
    rows=st.integers(1, 8),
    width=st.integers(1, 1500),
    padding=st.sampled_from([0, 1, 16]),
    dtype=st.sampled_from(list(TOLERANCE)),
    expanded=st.booleans(),
)
def test_any_shape_and_stride(rows: int, width: int, padding: int, dtype: torch.dtype, expanded: bool) -> None:
    """The input is columns of a wider tensor, and the upstream gradient may be one row, expanded."""

    def view(op):
        def run(x: Tensor) -> Tensor:
            y = op(x[:, padding : padding + 2 * width])
            return y.sum(0).expand(rows, width) if expanded else y

        return run

    inputs = [random(rows, 2 * width + 2 * padding, dtype=dtype)]
    compare("swiglu/strided", view(ours), view(framework), view(truth), inputs, floor=4.0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_inplace_backward_gives_the_same_gradient_in_the_input(dtype: torch.dtype) -> None:
    x, dy = random(3, 1400, dtype=dtype), random(3, 700, dtype=dtype, seed=1).detach()
    (expected,) = torch.autograd.grad(ours(x), x, dy)
    consumed = x * 1.0
    y = swiglu(consumed, inplace_backward=True, backend="triton")
    (gradient,) = torch.autograd.grad(y, consumed, dy, retain_graph=True)
    assert torch.equal(gradient, expected) and gradient.data_ptr() == consumed.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, consumed, dy)


def test_inplace_backward_of_columns_of_a_wider_tensor() -> None:
    wide = random(4, 3, 40, dtype=torch.float32)
    view = (wide * 1.0)[:, 1:, 4:24]
    dy = random(4, 2, 10, dtype=torch.float32, seed=1).detach()
    (expected,) = torch.autograd.grad(ours(view), view, dy, retain_graph=True)
    (gradient,) = torch.autograd.grad(swiglu(view, inplace_backward=True, backend="triton"), view, dy)
    assert torch.equal(gradient, expected)


def test_moves_the_least_bytes(traffic: Traffic) -> None:
    (x,) = BENCHMARK.make(BENCHMARK.small, torch.bfloat16, default_device())
    y = ours(x)
    forward = traffic.bytes_loaded + traffic.bytes_stored
    torch.autograd.grad(y, x, torch.ones_like(y))
    backward = traffic.bytes_loaded + traffic.bytes_stored - forward
    least = BENCHMARK.bytes_moved(BENCHMARK.small, torch.bfloat16)  # type: ignore[misc]
    print(f"swiglu: forward {forward / least.forward:.3f}, backward {backward / least.backward:.3f}")
    assert forward <= 1.03 * least.forward and backward <= 1.03 * least.backward


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="must be even"):
        swiglu(torch.ones(2, 3))
    repeated = torch.ones(1, 4, device=default_device()).expand(3, 4)
    with pytest.raises(ValueError, match="share memory"):
        swiglu(repeated, inplace_backward=True, backend="triton")
