"""Output projection fused with the loss, in chunks: [tokens, vocabulary] never exists.

The gradient of a token's logits is its loss's upstream gradient times what forward knows. Upstream gradients come only
with backward, so ``linear_cross_entropy`` computes the logits again there: 4 products of 2Thv FLOPs where the unfused
path has 3. A token's row of dhidden could be scaled afterwards, but dweight mixes tokens. The other way,
``weighted_linear_cross_entropy``, is told before what each token's loss counts for (its mask over the number of tokens,
say), computes both gradients in forward with 3 products, and returns the weighted sum, whose upstream gradient is one
number: scaling by it is exact.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from llm_kernels import dispatch
from llm_kernels.cross_entropy.ref import Terms, first_word
from llm_kernels.linear_cross_entropy import ref

# Bytes of logits that exist at once, where chunk_tokens is not given: a product of 1,046 x 128,256 fills a GPU.
CHUNK_BYTES = 256 << 20
# dweight is read and written in fp32 for each chunk of c tokens: 8vh bytes beside 6chv FLOPs. At 3 TB/s and 650 TFLOP/s
# that is 289/c of the products' time, 7 % at 4,096 if nothing overlaps.
WEIGHTED_CHUNK_TOKENS = 4096


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    num_valid: int | None = None,
    group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    weight_grad: Tensor | None = None,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross entropy of ``hidden @ weight.T`` (see cross_entropy) of every token, fp32 [...].

    hidden: [..., h]; weight: [v, h] of the same dtype, under a ``group`` this process's rows of the vocabulary; labels:
    int64 [...]. hidden is the same on every process (with sequence parallelism the caller gathers it) and its gradient
    is summed over the group. ``weight_grad``, fp32 [v, h]: the weight's gradient is added there in backward, without
    rounding, and autograd gets none. ``chunk_tokens``: rows of logits that exist at once (default 256 MiB of them);
    backward takes slices of the vocabulary of the same size.

    Saves hidden, weight and one number per token (two with smoothing). 2Thv FLOPs forward, 6Thv backward (unfused: 4).
    One all-gather per chunk in forward, one all-reduce of dhidden in backward. fp64 and the torch backend run unfused.
    """
    _check(hidden, weight, labels, weight_grad)
    terms = _terms(weight, num_valid, group, (ignore_index, label_smoothing, z_loss))
    if dispatch.backend_for(hidden, backend) == "torch" or hidden.dtype == torch.float64:
        return ref.linear_cross_entropy(hidden, _redirect(weight, weight_grad), labels, terms, group)
    chunk = chunk_tokens or max(128, CHUNK_BYTES // (weight.shape[0] * weight.element_size()) // 128 * 128)
    tokens = labels.reshape(-1)
    options = (terms, group, min(chunk, max(len(tokens), 1)), weight_grad)
    return _Recompute.apply(hidden.reshape(-1, hidden.shape[-1]), weight, tokens, options).view(labels.shape)


def weighted_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    *,
    num_valid: int | None = None,
    group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    weight_grad: Tensor | None = None,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(sum of token_weights times losses, losses without gradient) of ``hidden @ weight.T``: both gradients in forward.

    token_weights: fp32 [...], constants; all else as in linear_cross_entropy. 6Thv FLOPs, all in forward and only if a
    gradient is wanted; between forward and backward dhidden (in its dtype) and dweight (fp32) are held. Backward scales
    them. ``chunk_tokens`` is 4,096 or more by default, as dweight is read and written for each chunk.
    """
    _check(hidden, weight, labels, weight_grad)
    if token_weights.shape != labels.shape or token_weights.requires_grad:
        raise ValueError(
            f"token_weights must be constants of shape {tuple(labels.shape)}: {tuple(token_weights.shape)}"
        )
    terms = _terms(weight, num_valid, group, (ignore_index, label_smoothing, z_loss))
    if dispatch.backend_for(hidden, backend) == "torch" or hidden.dtype == torch.float64:
        losses = ref.linear_cross_entropy(hidden, _redirect(weight, weight_grad), labels, terms, group)
        return (losses * token_weights).sum(), losses.detach()
    chunk = chunk_tokens or max(WEIGHTED_CHUNK_TOKENS, CHUNK_BYTES // (weight.shape[0] * weight.element_size()))
    tokens = labels.reshape(-1)
    options = (terms, group, min(chunk, max(len(tokens), 1)), weight_grad)
    wants = tuple(torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    known = token_weights.reshape(-1).float()
    flat = hidden.reshape(-1, hidden.shape[-1])
    total, losses = _Weighted.apply(flat, weight, tokens, known, options, wants)
    return total, losses.view(labels.shape)


def _terms(
    weight: Tensor, num_valid: int | None, group: dist.ProcessGroup | None, rest: tuple[int, float, float]
) -> Terms:
    columns = weight.shape[0]
    words = columns if num_valid is None else num_valid
    if not 0 <= words <= columns:
        raise ValueError(f"num_valid = {words} is not between 0 and the {columns} rows of the weight")
    return Terms(first_word(columns, group), words, *rest)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, weight_grad: Tensor | None) -> None:
    if weight.ndim != 2 or hidden.shape[-1:] != weight.shape[1:] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} {tuple(hidden.shape)}, weight {weight.dtype} {tuple(weight.shape)}: last dims "
            "and dtypes must match"
        )
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}, not int64 {tuple(hidden.shape[:-1])}")
    if weight_grad is not None and (weight_grad.shape != weight.shape or weight_grad.dtype != torch.float32):
        raise ValueError(
            f"weight_grad is {weight_grad.dtype} {tuple(weight_grad.shape)}, not fp32 {tuple(weight.shape)}"
        )


class _Redirect(torch.autograd.Function):
    """Adds the gradient to ``into`` and passes none on."""

    @staticmethod
    def forward(ctx, weight, into):
        ctx.into = into
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        ctx.into.add_(grad)
        return None, None


def _redirect(weight: Tensor, weight_grad: Tensor | None) -> Tensor:
    return weight if weight_grad is None else _Redirect.apply(weight, weight_grad)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, options):
        from llm_kernels.linear_cross_entropy import kernel

        ctx.plan = kernel.Plan(*options)
        losses, lse, share = kernel.losses(hidden, weight, labels, ctx.plan)
        ctx.save_for_backward(hidden, weight, labels, lse, share)
        return losses

    @staticmethod
    def backward(ctx, dlosses):
        from llm_kernels.linear_cross_entropy import kernel

        hidden, weight, labels, *saved = ctx.saved_tensors
        found = kernel.gradients(dlosses, hidden, weight, labels, tuple(saved), ctx.plan, ctx.needs_input_grad[:2])
        return *found, None, None


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, token_weights, options, wants):
        from llm_kernels.linear_cross_entropy import kernel

        plan = kernel.Plan(*options)
        losses, dhidden, dweight = kernel.losses_and_gradients(hidden, weight, labels, token_weights, plan, wants)
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_grad, ctx.weight_dtype = plan.weight_grad, weight.dtype
        ctx.mark_non_differentiable(losses)
        ctx.set_materialize_grads(False)
        return torch.dot(losses, token_weights), losses

    @staticmethod
    def backward(ctx, dtotal, _):
        rest = (None,) * 4
        if dtotal is None:
            return None, None, *rest
        dhidden, dweight = ctx.saved_tensors
        if dhidden is not None:
            dhidden = torch.mul(dhidden, dtotal, out=torch.empty_like(dhidden))
        if dweight is None:
            return dhidden, None, *rest
        if ctx.weight_grad is not None:
            ctx.weight_grad.addcmul_(dweight, dtotal)
            return dhidden, None, *rest
        # Scaled and rounded in one pass, without an fp32 copy.
        return dhidden, torch.mul(dweight, dtotal, out=torch.empty_like(dweight, dtype=ctx.weight_dtype)), *rest
