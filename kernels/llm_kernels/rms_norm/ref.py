"""Root mean square norm in plain torch (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_kernels import dispatch


class _RmsNorm(torch.autograd.Function):
    """Saves x and one number per row; backward computes the normalised row again."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_wide = _wide(x)
        # The one number per row is computed in fp64, because its square may overflow fp32.
        scale = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True).double()
        scale = scale.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_().to(x_wide.dtype)
        ctx.save_for_backward(x, weight, scale)
        return (x_wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @dispatch.first_derivative_only("rms_norm")
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        weight_wide = _wide(weight)
        normed = _wide(x) * scale
        grad_wide = _wide(grad)
        product = (grad_wide * normed).flatten(0, -2)
        grad_weight = product.sum(0)
        # Derivative of x * scale: subtracts the component of the gradient along x.
        along = torch.mv(product, weight_wide).view(scale.shape).mul_(1.0 / x.shape[-1])
        grad_x = (grad_wide * weight_wide).addcmul_(normed, along, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dim.

    x: [..., h] of any float dtype; weight: [h]. Computed in fp32 (fp64 for fp64), returned in x's dtype. Saved for
    backward are x and one number per row.
    """
    return _RmsNorm.apply(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm of ``x + residual`` in x's dtype, ``x + residual`` in the residual's dtype)."""
    total = (x + residual).to(residual.dtype)
    wide = total.to(torch.promote_types(x.dtype, total.dtype))
    return rms_norm(wide, weight, eps).to(x.dtype), total
