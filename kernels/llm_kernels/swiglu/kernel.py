"""SwiGLU in Triton on the packed output of the first linear: gate and up are the halves of a row, never copied apart.

    y = silu(g) u;  dg = dy u s (1 + g (1 - s)), du = dy g s, with s = sigmoid(g)

Shapes: x [M, 2F], y [M, F], fp32, bf16 or fp16, computed in fp32. Backward reads x and dy and recomputes the sigmoid;
its output may be x itself, since every element is read and written by one program. Bytes, e being the element size:
forward 3eMF, backward 5eMF.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_kernels.rows import as_rows

BLOCK = 1024
NUM_WARPS = 4
# Registers of a thread with which an SM holds all its warps. In bf16 ptxas takes 34 if it may, and saves nothing by it.
FULL_OCCUPANCY = 32


@triton.jit
def _swiglu_fwd_kernel(x_ptr, y_ptr, x_row_stride, F: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    gate = tl.load(x_ptr + row * x_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_row_stride + F + cols, mask=mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * F + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_bwd_kernel(
    dy_ptr, x_ptr, dx_ptr, dy_row_stride, x_row_stride, dx_row_stride, F: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    gate = tl.load(x_ptr + row * x_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_row_stride + F + cols, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dup = dy * (gate * sigmoid)  # in this order dy times a large gate does not overflow
    tl.store(dx_ptr + row * dx_row_stride + cols, dgate.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptr + row * dx_row_stride + F + cols, dup.to(dx_ptr.dtype.element_ty), mask=mask)


def forward(x: Tensor) -> Tensor:
    """x [..., 2F] → [..., F]."""
    width = x.size(-1) // 2
    y = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    if elements := y.numel():
        x, x_stride = as_rows(x)
        grid = (elements // width, -(-width // BLOCK))
        _swiglu_fwd_kernel[grid](x, y, x_stride, F=width, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return y


def backward(dy: Tensor, x: Tensor, out: Tensor) -> None:
    """Writes the gradient of x [..., 2F] into ``out``, which may be x; dy [..., F]."""
    if elements := dy.numel():
        width = dy.size(-1)
        dy, dy_stride = as_rows(dy)
        rows, x_stride = as_rows(x)
        same = out is x
        target, target_stride = (rows, x_stride) if same else as_rows(out)
        grid = (elements // width, -(-width // BLOCK))
        _swiglu_bwd_kernel[grid](
            dy,
            rows,
            target,
            dy_stride,
            x_stride,
            target_stride,
            F=width,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            # What is not aligned is read element by element, and 32 registers do not hold that.
            maxnreg=None if (width | dy_stride | x_stride | dy.data_ptr() | rows.data_ptr()) % 16 else FULL_OCCUPANCY,
        )
        if same and rows.data_ptr() != x.data_ptr():  # x could not be seen as rows without a copy
            x.copy_(rows.view(x.shape))
