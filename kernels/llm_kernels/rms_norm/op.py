"""RMSNorm, alone or with the addition to the residual stream fused (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_kernels import dispatch
from llm_kernels.rms_norm import ref


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dim.

    x: [..., h] fp32, bf16 or fp16; weight: [h]. Computed in fp32, returned in x's dtype. Backward keeps x and one fp32
    number per row; the weight's gradient is summed in a fixed order. Raises ValueError if shapes do not match.
    """
    _check(x, weight)
    if dispatch.backend_for(x, backend, weight) == "torch" or x.shape[-1] > 65536:
        return ref.rms_norm(x, weight, eps)
    return _rms_norm(x, weight, eps)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(norm of ``x + residual``, ``x + residual``) in one pass, where a layer's output joins the residual stream.

    x, residual: [..., h] of one dtype; weight: [h]. The sum is rounded to x's dtype before it is normed. Backward reads
    the sum, adds both gradients in one pass and returns one tensor for x and residual. Raises ValueError if shapes do
    not match.
    """
    _check(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"residual is {residual.dtype} {tuple(residual.shape)}, x is {x.dtype} {tuple(x.shape)}")
    if dispatch.backend_for(x, backend, residual, weight) == "torch" or x.shape[-1] > 65536:
        return ref.add_rms_norm(x, residual, weight, eps)
    return _add_rms_norm(x, residual, weight, eps)[:2]


def _check(x: Tensor, weight: Tensor) -> None:
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, x has {tuple(x.shape)}: their last dims must match")


def _rows(x: Tensor) -> Tensor:
    """[M, N] with contiguous columns, a view wherever the layout allows one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from llm_kernels.rms_norm import kernel

    y, _, rstd = kernel.forward(_rows(x), None, weight.contiguous(), eps)
    return y.view(x.shape), rstd


def _add_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from llm_kernels.rms_norm import kernel

    y, total, rstd = kernel.forward(_rows(x), _rows(residual), weight.contiguous(), eps)
    assert total is not None
    return y.view(x.shape), total.view(x.shape), rstd


def _backward(dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    from llm_kernels.rms_norm import kernel

    rows_dsum = None if dsum is None else _rows(dsum)
    dx, dweight = kernel.backward(_rows(dy), rows_dsum, _rows(x), weight.contiguous(), rstd)
    return dx.view(x.shape), dweight


def _fresh(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _rstd(x: Tensor) -> Tensor:
    return torch.empty(x.shape[:-1].numel(), dtype=torch.float32, device=x.device)


dispatch.define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _forward,
    lambda x, weight, eps: (_fresh(x), _rstd(x)),
)
dispatch.define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    _add_forward,
    lambda x, residual, weight, eps: (_fresh(x), _fresh(x), _rstd(x)),
)
_rms_norm_backward = dispatch.define(
    "rms_norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    _backward,
    lambda dy, dsum, x, weight, rstd: (_fresh(x), torch.empty_like(weight)),
)


def _setup(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, dy, _):
    x, weight, rstd = ctx.saved_tensors
    return *_rms_norm_backward(dy, None, x, weight, rstd), None


def _add_setup(ctx, inputs, output) -> None:
    _, total, rstd = output
    ctx.save_for_backward(total, inputs[2], rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _add_gradients(ctx, dy, dsum, _):
    total, weight, rstd = ctx.saved_tensors
    if dy is None:  # the normed value was not used
        return dsum, dsum, None, None
    dx, dweight = _rms_norm_backward(dy, dsum, total, weight, rstd)
    return dx, dx, dweight, None


_rms_norm = dispatch.differentiable("rms_norm", _setup, _gradients)
_add_rms_norm = dispatch.differentiable("add_rms_norm", _add_setup, _add_gradients)
