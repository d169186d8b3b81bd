"""RMSNorm's benchmark: shapes of real models, peers, least bytes, and the configurations to compile ahead of time."""

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
    """Least bytes. The partial sums of the weight's gradient are not counted, as they stay in the L2 cache."""
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
        # Under sequence parallelism a rank has a part of the tokens, but all columns of them.
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
    from llm_kernels.rms_norm.kernel import _rms_norm_bwd_kernel, _rms_norm_fwd_kernel, _sum_rows_kernel, plan

    cases = []
    # Hidden sizes of published models, three that are no power of two among them, and an odd one.
    for columns in (128, 1024, 3072, 4096, 5120, 7168, 8192, 16384, 4095):
        wants = frozenset({"wide"}) if columns % 16 == 0 else frozenset()
        for residual in (False, True):
            pointer = "*bf16" if residual else None
            tail = f"N={columns}{' +residual' if residual else ''}"
            stride = columns if residual else 0
            forward = {
                "x_ptr": "*bf16", "residual_ptr": pointer, "sum_ptr": pointer, "w_ptr": "*bf16", "y_ptr": "*bf16",
                "rstd_ptr": "*fp32", "M": "i32", "x_row_stride": columns, "residual_row_stride": stride, "eps": "fp32",
            }  # fmt: skip
            backward = {
                "dy_ptr": "*bf16", "dsum_ptr": pointer, "x_ptr": "*bf16", "w_ptr": "*bf16", "rstd_ptr": "*fp32",
                "dx_ptr": "*bf16", "dresidual_ptr": None, "partial_ptr": "*fp32", "M": "i32",
                "dy_row_stride": columns, "dsum_row_stride": stride, "x_row_stride": columns,
            }  # fmt: skip
            for direction, kernel, arguments in (
                ("forward", _rms_norm_fwd_kernel, forward),
                ("backward", _rms_norm_bwd_kernel, backward),
            ):
                constants = dict(plan(8192, columns, 132, direction, residual).constants)
                warps, maxnreg = constants.pop("num_warps"), constants.pop("maxnreg", None)
                name = f"rms_norm {direction} {tail}"
                cases.append(AotCase(name, kernel, {**arguments, **constants}, warps, wants=wants, maxnreg=maxnreg))
    arguments = {"partial_ptr": "*fp32", "out_ptr": "*bf16", "P": "i32", "N": 4096, "BLOCK_P": 32, "BLOCK_N": 64}
    cases.append(AotCase("rms_norm weight gradient N=4096", _sum_rows_kernel, arguments, 4))
    return cases
