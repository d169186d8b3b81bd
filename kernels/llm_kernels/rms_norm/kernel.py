"""RMSNorm in Triton: whole rows in registers, each tensor read once and written once.

Shapes: M rows, N columns; fp32, bf16 or fp16, all sums in fp32. Forward saves rstd (fp32 [M]) and, with the residual
fused, x is the sum that it returns anyway. Backward recomputes the normed row. The weight's gradient is summed in two
stages in a fixed order: every program sums its rows into one row of ``partial``, a second kernel sums those.
Bytes, e being the element size: forward e(2MN + N) + 4M, with the residual e(4MN + N) + 4M; backward e(3MN + N) + 4M
(the residual's gradient: e MN more), and 8PN + eN for P partial rows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_kernels.device import num_sms
from llm_kernels.rows import as_rows, fresh


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    sum_ptr,
    w_ptr,
    y_ptr,
    rstd_ptr,
    M,
    x_row_stride,
    residual_row_stride,
    eps,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_N)
    w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    # A program keeps the weight for many rows: read anew for every row it would be half of all traffic from L2.
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            at = residual_ptr + rows[:, None] * residual_row_stride + cols[None, :]
            # The norm is of the stream as later layers will read it: rounded.
            rounded = (x + tl.load(at, mask=mask, other=0.0).to(tl.float32)).to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + rows[:, None] * N + cols[None, :], rounded, mask=mask)
            x = rounded.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / N + eps)
        tl.store(rstd_ptr + rows, rstd, mask=rows < M)
        y = x * rstd[:, None] * w[None, :]
        tl.store(y_ptr + rows[:, None] * N + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr,
    dsum_ptr,
    x_ptr,
    w_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    partial_ptr,
    M,
    dy_row_stride,
    dsum_row_stride,
    x_row_stride,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_DSUM: tl.constexpr,
    RELOAD_W: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx = rstd (w dy - n mean(n w dy)) [+ dsum], partial = sum over this program's rows of n dy, n being x rstd.

    dresidual_ptr: where dx goes a second time, in the residual's dtype, or None. partial_ptr is None where the weight
    wants no gradient: it then costs no register.
    """
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    if partial_ptr is not None:
        dw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # Tiles are dealt out in turn, so that all programs read neighbouring rows at any moment.
    for tile in tl.range(program, tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows[:, None] * dy_row_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
        normed = x * rstd[:, None]
        if partial_ptr is not None:
            dw += dy * normed
        if RELOAD_W:
            w = tl.load(w_ptr + cols, mask=cols < N, other=0.0, eviction_policy="evict_last").to(tl.float32)
        wdy = w[None, :] * dy
        along = tl.sum(normed * wdy, 1) / N
        dx = (wdy - normed * along[:, None]) * rstd[:, None]
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + rows[:, None] * dsum_row_stride + cols[None, :], mask=mask, other=0.0).to(
                tl.float32
            )
        tl.store(dx_ptr + rows[:, None] * N + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dresidual_ptr is not None:
            at = dresidual_ptr + rows[:, None] * N + cols[None, :]
            tl.store(at, dx.to(dresidual_ptr.dtype.element_ty), mask=mask)
    if partial_ptr is not None:
        tl.store(partial_ptr + program * N + cols, tl.sum(dw, 0), mask=cols < N)


@triton.jit
def _sum_rows_kernel(partial_ptr, out_ptr, P, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """out = sum over the P rows of partial (fp32 [P, N]), in order."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for start in range(0, P, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        mask = (rows < P)[:, None] & (cols < N)[None, :]
        total += tl.load(partial_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + cols, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=cols < N)


def tile(columns: int) -> tuple[int, int, int]:
    """(rows of a tile, its columns rounded up to a power of two, warps): two to four 128-bit loads of bf16 a thread."""
    block_n = triton.next_power_of_2(columns)
    block_m = max(1, 2048 // block_n)
    return block_m, block_n, min(max(block_m * block_n // 512, 4), 32)


def reload_weight(block_n: int) -> bool:
    """Whether backward reads the weight for every row: from 16,384 columns on, registers can't hold it beside its
    gradient (ptxas spills 56 to 96 bytes a thread)."""
    return block_n >= 16384


class Plan(NamedTuple):
    """How many programs a launch has, and the parameters that the kernel is compiled for."""

    grid: tuple[int]
    constants: dict[str, Any]


# Launches of one shape share their plan: three of Triton's helpers cost as much as everything else in a launcher.
@lru_cache(maxsize=4096)
def plan(rows: int, columns: int, sms: int, warps_per_sm: int) -> Plan:
    """As many programs as are resident at once, never more than there are tiles."""
    block_m, block_n, warps = tile(columns)
    programs = max(1, min(triton.cdiv(rows, block_m), sms * max(1, warps_per_sm // warps)))
    return Plan((programs,), {"N": columns, "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps})


def forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """x, residual [..., N] → (y, sum in the residual's dtype or None, rstd [M])."""
    columns = x.size(-1)
    y, total = fresh(x), None if residual is None else fresh(residual)
    rows = y.numel() // columns if columns else 0
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        x, x_stride = as_rows(x)
        residual, residual_stride = (None, 0) if residual is None else as_rows(residual)
        grid, constants = plan(rows, columns, num_sms(x), 32)
        _rms_norm_fwd_kernel[grid](
            x,
            residual,
            total,
            weight.contiguous(),
            y,
            rstd,
            rows,
            x_stride,
            residual_stride,
            eps,
            HAS_RESIDUAL=residual is not None,
            **constants,
        )
    return y, total, rstd


def backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, wants: tuple[bool, bool]
) -> list[Tensor]:
    """dy, dsum, x [..., N] → [dx in dy's dtype, the same in x's dtype, the weight's gradient], the last two if wanted.

    x is what was normed: where a residual was added, their sum in the residual's dtype.
    """
    columns, rows = x.size(-1), rstd.size(0)
    dx = fresh(dy)
    dresidual = fresh(x) if wants[0] else None
    dweight = torch.empty(columns, dtype=weight.dtype, device=weight.device) if wants[1] else None
    outputs = [t for t in (dx, dresidual, dweight) if t is not None]
    if not rows:
        return outputs if dweight is None else [*outputs[:-1], dweight.zero_()]
    dy, dy_stride = as_rows(dy)
    dsum, dsum_stride = (None, 0) if dsum is None else as_rows(dsum)
    x, x_stride = as_rows(x)
    grid, constants = plan(rows, columns, num_sms(x), 16)
    partial = None if dweight is None else torch.empty((grid[0], columns), dtype=torch.float32, device=x.device)
    _rms_norm_bwd_kernel[grid](
        dy,
        dsum,
        x,
        weight.contiguous(),
        rstd,
        dx,
        dresidual,
        partial,
        rows,
        dy_stride,
        dsum_stride,
        x_stride,
        HAS_DSUM=dsum is not None,
        RELOAD_W=reload_weight(constants["BLOCK_N"]),
        STAGES=2,
        **constants,
    )
    if partial is not None:
        grid_of_sum = (-(-columns // 64),)
        _sum_rows_kernel[grid_of_sum](partial, dweight, grid[0], N=columns, BLOCK_P=32, BLOCK_N=64, num_warps=4)
    return outputs
