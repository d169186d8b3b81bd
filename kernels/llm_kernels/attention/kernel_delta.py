"""Two numbers per query and head that attention's backward starts from: delta, and the log-sum-exp in base 2."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_kernels.attention.kernel import LOG2E, padded


@triton.jit
def _per_row_kernel(
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    delta_ptr,
    lse2_ptr,
    row_stride,
    S,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """delta = sum(dout out) - dlse, and the log-sum-exp in base 2, of BLOCK_S tokens of one head; [s, b h, d] → [b h,
    s].

    The log-sum-exp of a query that sees no key becomes +inf, so that its weights become 0 in backward.
    """
    head = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    cols = tl.arange(0, BLOCK_D)
    at = rows.to(tl.int64)[:, None] * row_stride + head * D + cols[None, :]
    mask = (rows < S)[:, None] & (cols < D)[None, :]
    out = tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + at, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + head * S + rows, mask=rows < S, other=0.0)
    tl.store(delta_ptr + head * S + rows, delta, mask=rows < S)
    lse = tl.load(lse_ptr + head * S + rows, mask=rows < S, other=0.0)
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    tl.store(lse2_ptr + head * S + rows, lse, mask=rows < S)


def per_row(out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor]:
    """out, dout: [sq, b, h, d] contiguous; lse, dlse: fp32 [b, h, sq] → (lse in base 2, sum(dout out) - dlse)."""
    sq, b, h, d = out.shape
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    if lse.numel():
        rows = 64 if d <= 128 else 32
        _per_row_kernel[(b * h, triton.cdiv(sq, rows))](
            out, dout, lse, dlse, delta, lse2, b * h * d, sq, d, padded(d), rows, dlse is not None, num_warps=4
        )
    return lse2, delta
