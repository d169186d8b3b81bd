"""The repaired interpreter rounds and multiplies bf16 as torch does, and the memory checker finds faults."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the interpreter is triton's")
import triton
import triton.language as tl

from llm_kernels.memory_checker import Race, Traffic, check_memory_accesses

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: kernels are not interpreted")


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, out_ptr, scale, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(out_ptr + at, a + b)
    tl.store(out_ptr + N + at, a * b)
    tl.store(out_ptr + 2 * N + at, tl.where(a > b, a, -b))
    tl.store(out_ptr + 3 * N + at, (a.to(tl.float32) * scale).to(tl.bfloat16))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    square = at[:, None] * N + at[None, :]
    tl.store(out_ptr + square, tl.dot(tl.load(a_ptr + square), tl.load(b_ptr + square)))


@triton.jit
def _copy_kernel(x_ptr, out_ptr, n, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(out_ptr + at + SHIFT, x, mask=at + SHIFT < n)


@triton.jit
def _sum_kernel(x_ptr, out_ptr, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    if ATOMIC:
        tl.atomic_add(out_ptr, tl.sum(x, 0))
    else:
        tl.store(out_ptr, tl.load(out_ptr) + tl.sum(x, 0))


@triton.jit
def _loop_kernel(out_ptr, n):
    for i in range(n):
        tl.store(out_ptr + i, i)


@triton.jit
def _order_kernel(counter_ptr, out_ptr):
    tl.store(out_ptr + tl.atomic_add(counter_ptr, 1), tl.program_id(0))


@triton.jit
def _shifted(at, by):
    return at + by


@triton.jit
def _device_function_kernel(out_ptr, by, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, _shifted(at, by) * 3 - tl.max(at, 0))


def bits(seed: int, count: int) -> torch.Tensor:
    """bf16 numbers of many magnitudes and both signs, the first of which carry into the exponent when rounded."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(count, generator=generator) * 2.0 ** torch.randint(-20, 20, (count,), generator=generator)
    spread[:4] = torch.tensor([1.9921875, -1.9921875, 0.0, 255.0])
    return spread.to(torch.bfloat16)


@interpreted
def test_bf16_arithmetic_rounds_to_nearest_even() -> None:
    count = 1024
    a, b, out = bits(0, count), bits(1, count), torch.empty(4 * count, dtype=torch.bfloat16)
    _arithmetic_kernel[(1,)](a, b, out, 1.0 + 2**-9, N=count)
    scaled = (a.float() * (1.0 + 2**-9)).to(torch.bfloat16)
    expected = torch.cat((a + b, a * b, torch.where(a > b, a, -b), scaled))
    assert torch.equal(out, expected)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dot_accumulates_in_fp32(dtype: torch.dtype) -> None:
    a, b = (torch.randn(32, 32, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    out = torch.empty(32, 32)
    _dot_kernel[(1,)](a, b, out, N=32)
    assert (out.double() - a.double() @ b.double()).abs().max() < 1e-5


@interpreted
def test_loop_bound_known_at_run_time() -> None:
    out = torch.zeros(5, dtype=torch.int32)
    _loop_kernel[(1,)](out, 5)
    assert out.tolist() == [0, 1, 2, 3, 4]


@interpreted
def test_device_functions_work_in_every_launch_and_the_language_is_as_before_after_it() -> None:
    before = {name: value for name, value in vars(tl).items() if name not in ("core", "standard")}
    for by in (1, 10):
        out = torch.empty(4, dtype=torch.int32)
        _device_function_kernel[(1,)](out, by, N=4)
        assert out.tolist() == [3 * (at + by) - 3 for at in range(4)]
        assert {name: value for name, value in vars(tl).items() if name in before} == before


@interpreted
@pytest.mark.parametrize("by", [2**31 - 3, -(2**31), 2**30])
def test_an_integer_that_does_not_fit_is_an_error(by: int) -> None:
    with pytest.raises(Exception, match=r"OverflowError\('(add|mul) of int32 gives"):
        _device_function_kernel[(1,)](torch.empty(4, dtype=torch.int32), by, N=4)


@interpreted
def test_bytes_are_counted(checked: Traffic | None) -> None:
    x, out = torch.ones(100), torch.empty(100)
    with check_memory_accesses() as traffic:
        _copy_kernel[(4,)](x, out, 100, SHIFT=0, BLOCK=32)
    assert torch.equal(x, out)
    assert (traffic.bytes_loaded, traffic.bytes_stored, traffic.launches) == (400, 400, 1)


@interpreted
def test_out_of_bounds_is_a_fault() -> None:
    x, out = torch.ones(100), torch.empty(100)
    with pytest.raises(Exception, match=r"load of 1 element.* out of bounds"):
        _copy_kernel[(4,)](x, out, 101, SHIFT=0, BLOCK=32)
    with pytest.raises(Exception, match=r"store of 1 element.* out of bounds"):
        _copy_kernel[(4,)](x, out, 100, SHIFT=-1, BLOCK=32)


@interpreted
def test_overlapping_stores_are_a_race() -> None:
    x = torch.ones(128)
    with pytest.raises(Exception, match=Race.__name__):
        _copy_kernel[(4,)](x, x, 128, SHIFT=1, BLOCK=32)


@interpreted
def test_sum_needs_atomics() -> None:
    x, out = torch.ones(128), torch.zeros(1)
    with pytest.raises(Exception, match=Race.__name__):
        _sum_kernel[(4,)](x, out, ATOMIC=False, BLOCK=32)
    out.zero_()
    _sum_kernel[(4,)](x, out, ATOMIC=True, BLOCK=32)
    assert out.item() == 128


@interpreted
def test_programs_run_in_a_random_order() -> None:
    orders = []
    for seed in range(3):
        counter, out = torch.zeros(1, dtype=torch.int32), torch.empty(8, dtype=torch.int32)
        with check_memory_accesses(seed=seed):
            _order_kernel[(8,)](counter, out)
        orders.append(out.tolist())
    assert all(sorted(order) == list(range(8)) for order in orders) and len({str(order) for order in orders}) == 3
