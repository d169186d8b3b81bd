"""SwiGLU (Shazeer 2020, arXiv 2002.05202) on the packed output of the MLP's first linear."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_kernels import dispatch
from llm_kernels.swiglu import ref


def swiglu(x: Tensor, *, inplace_backward: bool = False, backend: str = "auto") -> Tensor:
    """``silu(gate) * up`` where x [..., 2f] holds gate then up along its last dim; returns [..., f] in x's dtype.

    fp32, bf16 or fp16; computed in fp32. Backward keeps x alone and computes the sigmoid again. inplace_backward writes
    the gradient over x, for callers that know that nothing else needs x: backward then allocates nothing, and running
    it a second time raises RuntimeError. Raises ValueError if the last dim is odd, or an expanded x would be
    overwritten.
    """
    if x.ndim == 0 or x.shape[-1] % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dim holds gate and up and must be even")
    if dispatch.backend_for(x, backend) == "torch":
        return ref.swiglu(x)
    if inplace_backward:
        if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape)):
            raise ValueError("inplace_backward=True, but elements of x share memory (it is expanded)")
        return _InPlace.apply(x)
    return torch.ops.llm_kernels.swiglu(x)


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.done = False
        return torch.ops.llm_kernels.swiglu(x)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        if ctx.done:
            raise RuntimeError(
                "swiglu(inplace_backward=True) has written its gradient over its input; backward runs once"
            )
        ctx.done = True
        (x,) = ctx.saved_tensors
        torch.ops.llm_kernels.swiglu_backward_(dy, x)
        return x


def _rows(x: Tensor) -> Tensor:
    """[M, N] with contiguous columns, a view wherever the layout allows one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _forward(x: Tensor) -> Tensor:
    from llm_kernels.swiglu import kernel

    return kernel.forward(_rows(x)).view(*x.shape[:-1], x.shape[-1] // 2)


def _backward(dy: Tensor, x: Tensor) -> Tensor:
    from llm_kernels.swiglu import kernel

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kernel.backward(_rows(dy), _rows(x), out.view(-1, x.shape[-1]))
    return out


def _backward_(dy: Tensor, x: Tensor) -> None:
    from llm_kernels.swiglu import kernel

    rows = _rows(x)
    kernel.backward(_rows(dy), rows, rows)
    if rows.data_ptr() != x.data_ptr():  # x could not be seen as rows without a copy
        x.copy_(rows.view(x.shape))


dispatch.define(
    "swiglu(Tensor x) -> Tensor",
    _forward,
    lambda x: torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype, device=x.device),
)
dispatch.define(
    "swiglu_backward(Tensor dy, Tensor x) -> Tensor",
    _backward,
    lambda dy, x: torch.empty(x.shape, dtype=x.dtype, device=x.device),
)
dispatch.define("swiglu_backward_(Tensor dy, Tensor(a!) x) -> ()", _backward_, lambda dy, x: None)


torch.library.register_autograd(
    "llm_kernels::swiglu",
    lambda ctx, dy: torch.ops.llm_kernels.swiglu_backward(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lib=dispatch.LIBRARY,
)
