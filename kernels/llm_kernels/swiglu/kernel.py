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

BLOCK = 1024
NUM_WARPS = 4


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
    dup = dy * gate * sigmoid
    tl.store(dx_ptr + row * dx_row_stride + cols, dgate.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptr + row * dx_row_stride + F + cols, dup.to(dx_ptr.dtype.element_ty), mask=mask)


def forward(x: Tensor) -> Tensor:
    """x [M, 2F] with columns contiguous → [M, F]."""
    rows, width = x.shape[0], x.shape[1] // 2
    y = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if y.numel():
        grid = (rows, triton.cdiv(width, BLOCK))
        _swiglu_fwd_kernel[grid](x, y, x.stride(0), F=width, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return y


def backward(dy: Tensor, x: Tensor, out: Tensor) -> None:
    """Writes the gradient of x [M, 2F] into ``out``, which may be x; dy [M, F]; columns contiguous."""
    rows, width = dy.shape
    if dy.numel():
        grid = (rows, triton.cdiv(width, BLOCK))
        _swiglu_bwd_kernel[grid](
            dy, x, out, dy.stride(0), x.stride(0), out.stride(0), F=width, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
