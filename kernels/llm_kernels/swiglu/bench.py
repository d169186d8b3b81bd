"""SwiGLU's benchmark: shapes of real models, peers, least bytes, and the configurations to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_kernels.aot import AotCase
from llm_kernels.benchmark import Benchmark, Shape, Work, normal, sharded


def _bytes(shape: Shape, dtype: torch.dtype) -> Work:
    elements = shape["tokens"] * shape["width"] * dtype.itemsize
    return Work(3 * elements, 5 * elements)


def _ours(inplace: bool = False) -> Callable[..., Any]:
    from llm_kernels.swiglu.op import swiglu

    return lambda x: swiglu(x, inplace_backward=inplace, backend="triton")


def _torch(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _liger() -> Callable[..., Any]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda x: LigerSiLUMulFunction.apply(*x.chunk(2, dim=-1))


def _liger_packed() -> Callable[..., Any]:
    from liger_kernel.ops import swiglu

    packed = next(value for name, value in vars(swiglu).items() if "Fused" in name and name.endswith("Function"))
    return lambda x: packed.apply(x, False)


def _transformer_engine() -> Callable[..., Any]:
    import transformer_engine.pytorch.ops as te

    return te.SwiGLU()


BENCHMARK = Benchmark(
    name="swiglu",
    shapes=sharded(lambda llama, tp: {"tokens": 8192, "width": llama.ffn // tp}),
    small={"name": "small", "tokens": 64, "width": 2048},
    make=lambda shape, dtype, device: (normal(shape["tokens"], 2 * shape["width"], dtype=dtype, device=device),),
    providers={
        "ours": _ours,
        "torch": lambda: _torch,
        "torch.compile": lambda: torch.compile(_torch),
        "liger": _liger,
        "liger packed": _liger_packed,
        "transformer_engine": _transformer_engine,
    },
    bytes_moved=_bytes,
)


def aot_cases(arch: int) -> list[AotCase]:
    """Forward and backward at the widths of the models and at an odd one."""
    from llm_kernels.swiglu.kernel import BLOCK, FULL_OCCUPANCY, NUM_WARPS, _swiglu_bwd_kernel, _swiglu_fwd_kernel

    cases = []
    for width in (11008, 13824, 3584, 1001):
        shared = {"x_ptr": "*bf16", "x_row_stride": 2 * width, "F": width, "BLOCK": BLOCK}
        wants = frozenset({"wide"}) if width % 16 == 0 else frozenset()
        backward = {**shared, "dy_ptr": "*bf16", "dx_ptr": "*bf16", "dy_row_stride": width, "dx_row_stride": 2 * width}
        for name, kernel, arguments in (
            ("forward", _swiglu_fwd_kernel, {**shared, "y_ptr": "*bf16"}),
            ("backward", _swiglu_bwd_kernel, backward),
        ):
            most = FULL_OCCUPANCY if wants and name == "backward" else None
            name = f"swiglu {name} F={width}"
            cases.append(AotCase(name, kernel, arguments, NUM_WARPS, wants=wants, maxnreg=most, narrow_allowed=0))
    return cases
