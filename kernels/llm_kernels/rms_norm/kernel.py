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
def _load_row(x_ptr, rows, row_stride, live, N: tl.constexpr, COUNT: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tuple of the row's COUNT pieces."""
    pieces = ()
    for piece in tl.static_range(COUNT):
        cols = piece * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = live[:, None] & (cols < N)[None, :]
        pieces = pieces + (tl.load(x_ptr + rows[:, None] * row_stride + cols[None, :], mask=mask, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    return pieces


@triton.jit
def _load_weight(w_ptr, N: tl.constexpr, COUNT: tl.constexpr, BLOCK_N: tl.constexpr):
    pieces = ()
    for piece in tl.static_range(COUNT):
        cols = piece * BLOCK_N + tl.arange(0, BLOCK_N)
        pieces = pieces + (tl.load(w_ptr + cols, mask=cols < N, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    return pieces


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
    COUNT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """y = x rstd w of x or, with a residual, of x + residual, which is stored rounded.

    PREFETCH: the next tile's loads are on their way while the warps wait for each other to sum this one's squares.
    """
    # A program keeps the weight for many rows: read anew for every row it would be half of all traffic from L2.
    w = _load_weight(w_ptr, N, COUNT, BLOCK_N)
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    step = tl.num_programs(0) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    if PREFETCH:
        next_x = _load_row(x_ptr, rows, x_row_stride, rows < M, N, COUNT, BLOCK_N)
        if residual_ptr is not None:
            next_residual = _load_row(residual_ptr, rows, residual_row_stride, rows < M, N, COUNT, BLOCK_N)
    for _ in range(first, M, step):
        live = rows < M
        if PREFETCH:
            x = next_x
            following = rows + step
            next_x = _load_row(x_ptr, following, x_row_stride, following < M, N, COUNT, BLOCK_N)
            if residual_ptr is not None:
                residual = next_residual
                next_residual = _load_row(
                    residual_ptr, following, residual_row_stride, following < M, N, COUNT, BLOCK_N
                )
        else:
            x = _load_row(x_ptr, rows, x_row_stride, live, N, COUNT, BLOCK_N)
            if residual_ptr is not None:
                residual = _load_row(residual_ptr, rows, residual_row_stride, live, N, COUNT, BLOCK_N)
        wide = ()
        squares = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for piece in tl.static_range(COUNT):
            cols = piece * BLOCK_N + tl.arange(0, BLOCK_N)
            value = x[piece].to(tl.float32)
            if residual_ptr is not None:
                # The norm is of the stream as later layers will read it: rounded.
                rounded = (value + residual[piece].to(tl.float32)).to(sum_ptr.dtype.element_ty)
                mask = live[:, None] & (cols < N)[None, :]
                tl.store(sum_ptr + rows[:, None] * N + cols[None, :], rounded, mask=mask)
                value = rounded.to(tl.float32)
            squares += value * value
            wide = wide + (value,)  # type: ignore[assignment]  # noqa: RUF005
        rstd = tl.rsqrt(tl.sum(squares, 1) / N + eps)
        tl.store(rstd_ptr + rows, rstd, mask=live)
        for piece in tl.static_range(COUNT):
            cols = piece * BLOCK_N + tl.arange(0, BLOCK_N)
            y = wide[piece] * rstd[:, None] * w[piece].to(tl.float32)[None, :]
            mask = live[:, None] & (cols < N)[None, :]
            tl.store(y_ptr + rows[:, None] * N + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
        rows += step


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
    COUNT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RELOAD_W: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx = rstd (w dy - n mean(n w dy)) [+ dsum], partial = sum over this program's rows of n dy, n being x rstd.

    dresidual_ptr: where dx goes a second time, in the residual's dtype, or None. partial_ptr is None where the weight
    wants no gradient: it then costs no register. RELOAD_W: registers do not hold the weight beside its gradient.
    """
    program = tl.program_id(0).to(tl.int64)
    if not RELOAD_W:
        w = _load_weight(w_ptr, N, COUNT, BLOCK_N)
    dw = ()
    if partial_ptr is not None:
        for _ in tl.static_range(COUNT):
            dw = dw + (tl.zeros([BLOCK_M, BLOCK_N], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    # Tiles are dealt out in turn, so that all programs read neighbouring rows at any moment.
    for start in tl.range(program * BLOCK_M, M, tl.num_programs(0) * BLOCK_M, num_stages=STAGES):
        rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        live = rows < M
        rstd = tl.load(rstd_ptr + rows, mask=live, other=0.0)[:, None]
        normed, wdy, new_dw = (), (), ()
        along = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for piece in tl.static_range(COUNT):
            cols = piece * BLOCK_N + tl.arange(0, BLOCK_N)
            mask = live[:, None] & (cols < N)[None, :]
            x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + rows[:, None] * dy_row_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            n = x * rstd
            if partial_ptr is not None:
                new_dw = new_dw + (dw[piece] + dy * n,)  # type: ignore[assignment]  # noqa: RUF005
            if RELOAD_W:
                weight = tl.load(w_ptr + cols, mask=cols < N, other=0.0, eviction_policy="evict_last")
            else:
                weight = w[piece]
            product = weight.to(tl.float32)[None, :] * dy
            along += n * product
            normed = normed + (n,)  # type: ignore[assignment]  # noqa: RUF005
            wdy = wdy + (product,)  # type: ignore[assignment]  # noqa: RUF005
        dw = new_dw
        mean = (tl.sum(along, 1) / N)[:, None]
        for piece in tl.static_range(COUNT):
            cols = piece * BLOCK_N + tl.arange(0, BLOCK_N)
            mask = live[:, None] & (cols < N)[None, :]
            dx = (wdy[piece] - normed[piece] * mean) * rstd
            if dsum_ptr is not None:
                at = dsum_ptr + rows[:, None] * dsum_row_stride + cols[None, :]
                dx += tl.load(at, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + rows[:, None] * N + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if dresidual_ptr is not None:
                at = dresidual_ptr + rows[:, None] * N + cols[None, :]
                tl.store(at, dx.to(dresidual_ptr.dtype.element_ty), mask=mask)
    if partial_ptr is not None:
        for piece in tl.static_range(COUNT):
            cols = piece * BLOCK_N + tl.arange(0, BLOCK_N)
            tl.store(partial_ptr + program * N + cols, tl.sum(dw[piece], 0), mask=cols < N)


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


class Tile(NamedTuple):
    """How a kernel cuts rows: block_m rows, each in ``pieces`` of block_n columns; warps of a program and of an SM.

    A piece is as wide as one 128-bit load of bf16 by every thread; a row that is no power of two long wastes less than
    a piece. Pieces are summed in registers before threads and warps sum theirs, so their number costs no barrier.
    """

    block_m: int
    pieces: int
    block_n: int
    warps: int
    warps_per_sm: int


# Pieces that registers hold, by warps: a thread has 64 registers for 32 warps, 128 for 16.
_MOST_PIECES = {"forward": {4: 5, 8: 5, 16: 4, 32: 8}, "backward": {4: 4, 8: 4, 16: 3, 32: 8}}


def tile(columns: int, direction: str) -> Tile:
    """The tile for rows of so many columns: as little padding as may be, then two pieces forward; backward 8 warps, of
    which two programs fit on an SM even with four pieces."""
    if columns <= 1024:
        block_n = triton.next_power_of_2(columns)
        return Tile(max(1, 2048 // block_n), 1, block_n, 4, 32 if direction == "forward" else 24)
    found = []
    for warps, most in _MOST_PIECES[direction].items():
        block_n, count = 256 * warps, -(-columns // (256 * warps))
        # Four pieces of 8 warps leave no register for the mask of a row that does not fill them.
        spills = direction == "backward" and count == 4 and columns % block_n
        if (1 < count <= most and not spills) or warps == 32:
            taste = abs(count - 2) if direction == "forward" else abs(warps - 8)
            found.append((count * block_n, taste, Tile(1, count, block_n, warps, 32)))
    best = min(found)[2]
    # By the registers that ptxas takes for sm_90 (bench.aot_cases): more programs than fit would wait for their turn.
    few = {1: 32, 2: 32, 3: 24} if direction == "forward" else {1: 24, 2: 24}
    return best._replace(warps_per_sm=few.get(best.pieces, 16))


def prefetch(count: int, residual: bool) -> bool:
    """Whether registers hold the next row beside this one."""
    return count == 2 if residual else count <= 5


def backward_options(count: int, warps: int) -> dict[str, Any]:
    """What the backward kernel is compiled with. From four pieces on, and with 32 warps, registers do not hold the
    weight beside its gradient (ptxas spills 80 to 96 bytes a thread); 128 of them leave room for two programs of 8
    warps."""
    return {
        "RELOAD_W": count >= 4 or warps == 32,
        "STAGES": 2,
        "maxnreg": 128 if count >= 3 and warps <= 16 else None,
    }


class Plan(NamedTuple):
    """How many programs a launch has, and the parameters that the kernel is compiled for."""

    grid: tuple[int]
    constants: dict[str, Any]


# Launches of one shape share their plan: three of Triton's helpers cost as much as everything else in a launcher.
@lru_cache(maxsize=4096)
def plan(rows: int, columns: int, sms: int, direction: str, residual: bool) -> Plan:
    """As many programs as are resident at once, never more than there are tiles."""
    block_m, count, block_n, warps, warps_per_sm = tile(columns, direction)
    programs = max(1, min(-(-rows // block_m), sms * max(1, warps_per_sm // warps)))
    constants = {"N": columns, "BLOCK_M": block_m, "COUNT": count, "BLOCK_N": block_n, "num_warps": warps}
    if direction == "forward":
        return Plan((programs,), {**constants, "PREFETCH": prefetch(count, residual)})
    return Plan((programs,), {**constants, **backward_options(count, warps)})


def forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """x, residual [..., N] → (y, sum in the residual's dtype or None, rstd [M])."""
    columns = x.size(-1)
    y, total = fresh(x), None if residual is None else fresh(residual)
    rows = y.numel() // columns if columns else 0
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        x, x_stride = as_rows(x)
        residual, residual_stride = (None, 0) if residual is None else as_rows(residual)
        grid, constants = plan(rows, columns, num_sms(x), "forward", residual is not None)
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
    grid, constants = plan(rows, columns, num_sms(x), "backward", dsum is not None)
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
        **constants,
    )
    if partial is not None:
        grid_of_sum = (-(-columns // 64),)
        _sum_rows_kernel[grid_of_sum](partial, dweight, grid[0], N=columns, BLOCK_P=32, BLOCK_N=64, num_warps=4)
    return outputs
