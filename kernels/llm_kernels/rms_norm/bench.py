"""RMSNorm: real shapes, peers, minimal bytes and the configurations to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_kernels.aot import AotCase
from llm_kernels.benchmark import Benchmark, Shape, Work, normal, sharded

EPS = 1e-5


def _make(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    rows, columns = shape["tokens"], shape["hidden"]
    x, residual = (normal(rows, columns, dtype=dtype, device=device) for _ in range(2))
    return (x, residual, normal(columns, dtype=dtype, device=device)) if shape["residual"] else (x, x.new_ones(columns))


def _make_leaves(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_() for x in _make(shape, dtype, device))


def _bytes(shape: Shape, dtype: torch.dtype) -> Work:
    """The weight's partial sums are not counted: they stay in the L2 cache."""
    rows, columns, size = shape["tokens"], shape["hidden"], dtype.itemsize
    tensors = (4, 4) if shape["residual"] else (2, 3)
    forward, backward = (n * rows * columns * size + columns * size + 4 * rows for n in tensors)
    return Work(forward, backward + columns * size)


def _ours() -> Callable[..., Any]:
    from llm_kernels.rms_norm.op import add_rms_norm, rms_norm

    def run(x: Tensor, *rest: Tensor) -> Any:
        if len(rest) == 1:
            return rms_norm(x, rest[0], EPS, backend="triton")
        return add_rms_norm(x, rest[0], rest[1], EPS, backend="triton")

    return run


def _torch() -> Callable[..., Any]:
    def run(x, *rest):
        if len(rest) == 1:
            return F.rms_norm(x, x.shape[-1:], rest[0], EPS)
        total = x + rest[0]
        return F.rms_norm(total, x.shape[-1:], rest[1], EPS), total

    return run


def _liger() -> Callable[..., Any]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def run(x, *rest):
        if len(rest) == 1:
            return LigerRMSNormFunction.apply(x, rest[0], EPS, 0.0, "llama", False)
        return LigerFusedAddRMSNormFunction.apply(x, *rest, EPS, 0.0, "llama", False)

    return run


def _transformer_engine() -> Callable[..., Any]:
    import transformer_engine.pytorch as te

    def run(x, *rest):
        total = x + rest[0] if len(rest) == 2 else x
        norm = te.RMSNorm(x.shape[-1], eps=EPS, dtype=x.dtype, device=x.device)
        norm.weight = torch.nn.Parameter(rest[-1].detach())
        return norm(total)

    return run


BENCHMARK = Benchmark(
    name="rms_norm",
    shapes=[
        {**shape, "name": f"{shape['name']}{' + residual' if residual else ''}", "residual": residual}
        # Sequence parallelism gives a process its part of the tokens, whole.
        for shape in sharded(lambda llama, tp: {"tokens": 8192 // tp, "hidden": llama.hidden})
        for residual in (False, True)
    ],
    small={"name": "small", "tokens": 4096, "hidden": 256, "residual": False},
    make=_make_leaves,
    providers={
        "ours": _ours,
        "torch": _torch,
        "torch.compile": lambda: torch.compile(_torch()),
        "liger": _liger,
        "transformer_engine": _transformer_engine,
    },
    bytes_moved=_bytes,
)


def aot_cases(arch: int) -> list[AotCase]:
    """Forward and backward, with and without the residual, at every model's hidden size and at an odd one."""
    from llm_kernels.rms_norm.kernel import (
        _rms_norm_bwd_kernel,
        _rms_norm_fwd_kernel,
        _sum_rows_kernel,
        reload_weight,
        tile,
    )

    cases = []
    for columns in (128, 1024, 4096, 5120, 8192, 16384, 4095):
        block_m, block_n, warps = tile(columns)
        wants = frozenset({"wide"}) if columns % 16 == 0 else frozenset()
        shared: dict[str, Any] = {
            "M": "i32",
            "x_row_stride": columns,
            "N": columns,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
        }
        for residual in (False, True):
            pointer = "*bf16" if residual else None
            tail = f"N={columns}{' +residual' if residual else ''}"
            forward = {
                **shared, "x_ptr": "*bf16", "residual_ptr": pointer, "sum_ptr": pointer, "w_ptr": "*bf16",
                "y_ptr": "*bf16", "rstd_ptr": "*fp32", "residual_row_stride": columns if residual else 0,
                "eps": "fp32", "HAS_RESIDUAL": residual,
            }  # fmt: skip
            backward = {
                **shared, "dy_ptr": "*bf16", "dsum_ptr": pointer, "x_ptr": "*bf16", "w_ptr": "*bf16",
                "rstd_ptr": "*fp32", "dx_ptr": "*bf16", "dresidual_ptr": None, "partial_ptr": "*fp32",
                "dy_row_stride": columns,
                "dsum_row_stride": columns if residual else 0, "HAS_DSUM": residual, "STAGES": 2,
                "RELOAD_W": reload_weight(block_n),
            }  # fmt: skip
            cases.append(AotCase(f"rms_norm forward {tail}", _rms_norm_fwd_kernel, forward, warps, wants=wants))
            cases.append(AotCase(f"rms_norm backward {tail}", _rms_norm_bwd_kernel, backward, warps, wants=wants))
    arguments = {"partial_ptr": "*fp32", "out_ptr": "*bf16", "P": "i32", "N": 4096, "BLOCK_P": 32, "BLOCK_N": 64}
    cases.append(AotCase("rms_norm weight gradient N=4096", _sum_rows_kernel, arguments, 4))
    return cases
