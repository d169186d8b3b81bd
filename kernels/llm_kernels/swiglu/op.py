"""SwiGLU (Shazeer 2020, arXiv 2002.05202) on the packed output of the MLP's first linear."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_kernels import dispatch
from llm_kernels.rows import fresh
from llm_kernels.swiglu import ref


def swiglu(x: Tensor, *, inplace_backward: bool = False, backend: str = "auto") -> Tensor:
    """``silu(gate) * up`` where x [..., 2f] holds gate then up along its last dim; returns [..., f] in x's dtype.

    fp32, bf16 or fp16; computed in fp32. Backward keeps x alone and computes the sigmoid again. inplace_backward writes
    the gradient over x, for callers that know that nothing else needs x: backward then allocates nothing, and running
    it a second time raises RuntimeError. Raises ValueError if the last dim is odd, or if x is to be overwritten and is
    a leaf that requires a gradient or an expanded tensor.
    """
    if x.ndim == 0 or x.size(-1) % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dim holds gate and up and must be even")
    if inplace_backward:
        dispatch.check_writable(x, "x", "inplace_backward=True")
    if dispatch.backend_for(x, backend) == "torch":
        return ref.swiglu(x)
    return _swiglu(x, inplace_backward)


def _forward(x: Tensor, inplace: bool) -> Tensor:
    return dispatch.launchers("swiglu").forward(x)


def _backward(dy: Tensor, x: Tensor) -> Tensor:
    out = fresh(x)
    dispatch.launchers("swiglu").backward(dy, x, out)
    return out


def _backward_(dy: Tensor, x: Tensor) -> None:
    dispatch.launchers("swiglu").backward(dy, x, x)


dispatch.define(
    "swiglu(Tensor x, bool inplace) -> Tensor",
    _forward,
    lambda x, inplace: torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype, device=x.device),
)
_swiglu_backward = dispatch.define(
    "swiglu_backward(Tensor dy, Tensor x) -> Tensor",
    _backward,
    lambda dy, x: fresh(x),
)
_swiglu_backward_ = dispatch.define("swiglu_backward_(Tensor dy, Tensor(a!) x) -> ()", _backward_, lambda dy, x: None)


def _setup(ctx, inputs, output) -> None:
    x, ctx.inplace = inputs
    ctx.save_for_backward(x)


def _gradients(ctx, dy):
    (x,) = ctx.saved_tensors
    if not ctx.inplace:
        return _swiglu_backward(dy, x), None
    _swiglu_backward_(dy, x)
    # A second backward would take the gradient for the input: autograd refuses once the version has changed.
    torch.autograd.graph.increment_version(x)
    return x.detach(), None


_swiglu = dispatch.differentiable("swiglu", _setup, _gradients)
