"""AdamW's benchmark: shards of real models, peers, least bytes, and the configurations to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from llm_kernels.adamw.ref import AdamWStep
from llm_kernels.aot import AotCase
from llm_kernels.benchmark import Benchmark, Shape, Work

NUMBERS = AdamWStep(lr=3e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=10)


def _make(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """p, grad, m, v, one tensor each, which the providers divide into eight equal parts."""
    total = shape["parameters"]
    p, g, m = (torch.randn(total, device=device, dtype=torch.float32) for _ in range(3))
    return p, g, m, torch.rand(total, device=device, dtype=torch.float32)


def _parts(inputs: tuple[Tensor, ...]) -> list[list[Tensor]]:
    return [list(x.chunk(8)) for x in inputs]


def _ours() -> Callable[..., Any]:
    from llm_kernels.adamw.op import Addresses, adamw_

    addresses = Addresses()

    def run(*inputs: Tensor) -> None:
        p, g, m, v = _parts(inputs)
        adamw_(p, g, m, v, NUMBERS, addresses=addresses, backend="triton")

    return run


def _torch_with(**implementation: bool) -> Callable[..., Any]:
    def run(*inputs: Tensor) -> None:
        parts = _parts(inputs)
        steps = [torch.tensor(float(NUMBERS.step - 1), device=x.device) for x in parts[0]]
        adamw(
            *parts, [], steps, amsgrad=False, beta1=NUMBERS.beta1, beta2=NUMBERS.beta2, lr=NUMBERS.lr,
            weight_decay=NUMBERS.weight_decay, eps=NUMBERS.eps, maximize=False, **implementation,
        )  # fmt: skip

    return run


def _apex() -> Callable[..., Any]:
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier

    def run(*inputs: Tensor) -> None:
        p, g, m, v = _parts(inputs)
        skip = torch.zeros(1, dtype=torch.int32, device=inputs[0].device)
        multi_tensor_applier(
            amp_C.multi_tensor_adam, skip, [g, p, m, v], NUMBERS.lr, NUMBERS.beta1, NUMBERS.beta2, NUMBERS.eps,
            NUMBERS.step, 1, True, NUMBERS.weight_decay,
        )  # fmt: skip

    return run


BENCHMARK = Benchmark(
    name="adamw",
    shapes=[
        {"name": "64 M parameters", "parameters": 64 << 20},
        {"name": "llama2-7b, 1/64 shard", "parameters": 105_287_680},
        {"name": "llama3-8b, 1/16 shard", "parameters": 501_891_072},
    ],
    small={"name": "small", "parameters": 8 * 16384},
    make=_make,
    providers={
        "ours": _ours,
        "torch": lambda: _torch_with(foreach=True),
        "torch fused": lambda: _torch_with(fused=True),
        "apex": _apex,
    },
    bytes_moved=lambda shape, dtype: Work(28 * shape["parameters"], 0),
    dtypes=(torch.float32,),
    inplace=True,
    has_backward=False,
)


def aot_cases(arch: int) -> list[AotCase]:
    """fp32 and bf16 gradients, with and without the low-precision copy, and unaligned tensors."""
    import triton.language as tl

    from llm_kernels.adamw.kernel import BLOCK, CHUNK, NUM_WARPS, _adamw_kernel

    names = ("decay", "beta2", "one_minus_beta1", "one_minus_beta2", "step_size", "root_correction", "eps")
    base = {
        "addresses_ptr": "*i64", "sizes_ptr": "*i64", "chunk_tensor_ptr": "*i32", "chunk_number_ptr": "*i32",
        "scale_ptr": "*fp32", "skip_ptr": None, "CHUNK": CHUNK, "BLOCK": BLOCK, **dict.fromkeys(names, "fp32"),
    }  # fmt: skip
    variants = [
        ("fp32 gradient", tl.float32, None, True),
        ("fp32 gradient, bf16 copy", tl.float32, tl.bfloat16, True),
        ("bf16 gradient, bf16 copy", tl.bfloat16, tl.bfloat16, True),
        ("fp32 gradient, unaligned", tl.float32, None, False),
    ]
    # Narrow accesses are the 9 loads of addresses, size, chunk and scale, in a program that moves 400 KiB, and those of
    # 2-byte tensors, which are read and written 64 bits at a time, each twice in the loop.
    return [
        AotCase(
            f"adamw {name}",
            _adamw_kernel,
            {**base, "GRAD": grad, "LOW": low, "ALIGNED": aligned},
            NUM_WARPS,
            wants=frozenset({"wide"}) if aligned else frozenset(),
            narrow_allowed=9 + 2 * (grad != tl.float32) + 2 * (low is not None),
        )
        for name, grad, low, aligned in variants
    ]
