"""RMSNorm, alone or with the addition to the residual stream fused (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_kernels import dispatch
from llm_kernels.rms_norm import ref
from llm_kernels.rows import fresh

MAX_COLUMNS = 65536  # wider rows do not fit into registers


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dim.

    x: [..., h] fp32, bf16 or fp16; weight: [h]. Computed in fp32, returned in x's dtype. Backward keeps x and one fp32
    number per row; the weight's gradient is summed in a fixed order. Raises ValueError if shapes do not match.
    """
    _check(x, weight)
    if dispatch.backend_for(x, backend, weight) == "torch" or x.size(-1) > MAX_COLUMNS:
        return ref.rms_norm(x, weight, eps)
    return _rms_norm(x, weight, eps)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(norm of ``x + residual``, ``x + residual``) in one pass, where a layer's output joins the residual stream.

    x, residual: [..., h], each fp32, bf16 or fp16; weight: [h]. The sum has the residual's dtype, so that a residual
    stream in fp32 stays so, and is rounded to it before it is normed; the norm has x's dtype. Backward reads the sum,
    adds both gradients in one pass and returns one tensor for x and residual (two where their dtypes differ). Raises
    ValueError if shapes do not match.
    """
    _check(x, weight)
    if residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, x has {tuple(x.shape)}: they must be equal")
    if dispatch.backend_for(x, backend, residual, weight) == "torch" or x.size(-1) > MAX_COLUMNS:
        return ref.add_rms_norm(x, residual, weight, eps)
    y, total, _ = _add_rms_norm(x, residual, weight, eps)
    return y, total


def _check(x: Tensor, weight: Tensor) -> None:
    if not x.ndim or weight.ndim != 1 or weight.size(0) != x.size(-1):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, x has {tuple(x.shape)}: their last dims must match")


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = dispatch.launchers("rms_norm").forward(x, None, weight, eps)
    return y, rstd


def _add_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, total, rstd = dispatch.launchers("rms_norm").forward(x, residual, weight, eps)
    assert total is not None
    return y, total, rstd


def _backward(dy, dsum, x, weight, rstd, *wants) -> list[Tensor]:
    return dispatch.launchers("rms_norm").backward(dy, dsum, x, weight, rstd, wants)


def _rstd(x: Tensor) -> Tensor:
    return torch.empty(x.shape[:-1].numel(), dtype=torch.float32, device=x.device)


def _backward_fake(dy, dsum, x, weight, rstd, wants_residual, wants_weight) -> list[Tensor]:
    out = [fresh(dy)]
    if wants_residual:
        out.append(fresh(x))
    if wants_weight:
        out.append(torch.empty(weight.shape, dtype=weight.dtype, device=weight.device))
    return out


dispatch.define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _forward,
    lambda x, weight, eps: (fresh(x), _rstd(x)),
)
dispatch.define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    _add_forward,
    lambda x, residual, weight, eps: (fresh(x), fresh(residual), _rstd(x)),
)
_rms_norm_backward = dispatch.define(
    "rms_norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, Tensor rstd, bool wants_residual, "
    "bool wants_weight) -> Tensor[]",
    _backward,
    _backward_fake,
)


def _setup(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, dy, _):
    x, weight, rstd = ctx.saved_tensors
    if not ctx.needs_input_grad[1]:  # a frozen weight: its gradient would be a pass over everything for nothing
        return *_rms_norm_backward(dy, None, x, weight, rstd, False, False), None, None
    return *_rms_norm_backward(dy, None, x, weight, rstd, False, True), None


def _add_setup(ctx, inputs, output) -> None:
    x, _, weight, _ = inputs
    _, total, rstd = output
    ctx.save_for_backward(total, weight, rstd)
    ctx.dtype = x.dtype
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _add_gradients(ctx, dy, dsum, _):
    total, weight, rstd = ctx.saved_tensors
    if dy is None:  # the normed value was not used
        return None if dsum is None else dsum.to(ctx.dtype), dsum, None, None
    mixed = ctx.dtype != total.dtype
    found = _rms_norm_backward(dy, dsum, total, weight, rstd, mixed, ctx.needs_input_grad[2])
    return found[0], found[1 if mixed else 0], found[-1] if ctx.needs_input_grad[2] else None, None


_rms_norm = dispatch.differentiable("rms_norm", _setup, _gradients)
_add_rms_norm = dispatch.differentiable("add_rms_norm", _add_setup, _add_gradients)
