"""SwiGLU in plain torch (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_kernels import dispatch


class _SwiGlu(torch.autograd.Function):
    """Saves only its input; backward computes the activation of the gate again."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @dispatch.first_derivative_only("swiglu")
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return out


def swiglu(x: Tensor) -> Tensor:
    """``silu(gate) * up`` where x [..., 2f] holds gate then up along its last dim; returns [..., f] in x's dtype."""
    if torch.compiler.is_compiling():  # the compiler decides by itself what is saved and what is computed again
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _SwiGlu.apply(x)
