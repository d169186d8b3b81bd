"""Output projection fused with the loss, in chunks: [tokens, vocabulary] never exists.

The gradient of a token's logits is its loss's upstream gradient times what forward knows. Upstream gradients come only
with backward, so ``linear_cross_entropy`` computes the logits again there: 4 products of 2Thv FLOPs where the unfused
path has 3. A token's row of dhidden could be scaled afterwards, but dweight mixes tokens. The other way,
``weighted_linear_cross_entropy``, is told before what each token's loss counts for (its mask over the number of tokens,
say), computes both gradients in forward with 3 products, and returns the weighted sum, whose upstream gradient is one
number: scaling by it is exact.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm_kernels import dispatch
from llm_kernels.cross_entropy.op import TERMS, check_terms, group_name
from llm_kernels.cross_entropy.ref import Terms, first_token_id
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
    bias: Tensor | None = None,
    num_valid: int | None = None,
    group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    weight_grad: Tensor | None = None,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross entropy of ``hidden @ weight.T + bias`` (see cross_entropy) of every token, fp32 [...].

    hidden: [..., h]; weight: [v, h] and bias: [v] of the same dtype, under a ``group`` this process's rows of the
    vocabulary; labels: int64 [...]. hidden is the same on every process (with sequence parallelism the caller gathers
    it) and its gradient is summed over the group. ``weight_grad``, fp32 [v, h]: the weight's gradient is added there in
    backward, without rounding, and autograd gets none. ``chunk_tokens``: rows of logits that exist at once (default 256
    MiB of them); backward takes slices of the vocabulary of the same size.

    Saves hidden, weight and two numbers per token (three with smoothing). 2Thv FLOPs forward, 6Thv backward (unfused:
    4). One all-gather per chunk in forward, one all-reduce of dhidden in backward. Differentiable once. fp64 and the
    torch backend run unfused.
    """
    _check(hidden, weight, labels, bias, weight_grad)
    terms = _terms(weight, num_valid, group, (ignore_index, label_smoothing, z_loss, softcap))
    if dispatch.backend_for(hidden, backend) == "torch":
        return ref.linear_cross_entropy(hidden, _redirect(weight, weight_grad), bias, labels, terms, group)
    chunk = chunk_tokens or max(128, CHUNK_BYTES // (weight.shape[0] * weight.element_size()) // 128 * 128)
    chunk = min(chunk, max(labels.numel(), 1))
    return _recomputing(hidden, weight, bias, labels, weight_grad, *terms, group_name(group), chunk)[0]


def weighted_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    *,
    bias: Tensor | None = None,
    num_valid: int | None = None,
    group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    weight_grad: Tensor | None = None,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(sum of token_weights times losses, losses without gradient) of ``hidden @ weight.T + bias``: all gradients in
    forward.

    token_weights: fp32 [...], constants; all else as in linear_cross_entropy. 6Thv FLOPs, all in forward and only if a
    gradient is wanted; between forward and backward dhidden (in its dtype) and dweight (fp32) are held. Backward scales
    them. ``chunk_tokens`` is 4,096 or more by default, as dweight is read and written for each chunk.
    """
    _check(hidden, weight, labels, bias, weight_grad)
    terms = _terms(weight, num_valid, group, (ignore_index, label_smoothing, z_loss, softcap))
    if token_weights.shape != labels.shape or token_weights.requires_grad:
        raise ValueError(
            f"token_weights must be constants of shape {tuple(labels.shape)}: {tuple(token_weights.shape)}"
        )
    if dispatch.backend_for(hidden, backend) == "torch":
        losses = ref.linear_cross_entropy(hidden, _redirect(weight, weight_grad), bias, labels, terms, group)
        return (losses * token_weights).sum(), losses.detach()
    chunk = chunk_tokens or max(WEIGHTED_CHUNK_TOKENS, CHUNK_BYTES // (weight.shape[0] * weight.element_size()))
    tokens = labels.reshape(-1)
    chunk = min(chunk, max(tokens.shape[0], 1))
    wants = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    known = token_weights.reshape(-1).float()
    flat = hidden.reshape(-1, hidden.shape[-1])
    total, losses, *_ = _weighted(
        flat, weight, bias, tokens, known, weight_grad, *terms, group_name(group), chunk, *wants
    )
    return total, losses.view(labels.shape)


def _terms(
    weight: Tensor,
    num_valid: int | None,
    group: dist.ProcessGroup | None,
    rest: tuple[int, float, float, float],
) -> Terms:
    columns = weight.shape[0]
    terms = Terms(first_token_id(columns, group), columns if num_valid is None else num_valid, *rest)
    check_terms(terms, columns, "rows of the weight")
    return terms


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, weight_grad: Tensor | None) -> None:
    if weight.ndim != 2 or hidden.shape[-1:] != weight.shape[1:] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} {tuple(hidden.shape)}, weight {weight.dtype} {tuple(weight.shape)}: last dims "
            "and dtypes must match"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}, not {weight.dtype} {tuple(weight.shape[:1])}")
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}, not int64 {tuple(hidden.shape[:-1])}")
    if weight_grad is None:
        return
    if weight_grad.shape != weight.shape or weight_grad.dtype != torch.float32:
        raise ValueError(
            f"weight_grad is {weight_grad.dtype} {tuple(weight_grad.shape)}, not fp32 {tuple(weight.shape)}"
        )
    if weight_grad.requires_grad:
        raise ValueError("weight_grad is written in place in backward and must not require a gradient itself")


def _refuse_graph(name: str) -> None:
    """Raises RuntimeError where backward was asked for a graph of itself (create_graph=True)."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name} can be differentiated once only: its backward adds up or scales gradients that have no graph, "
            "so create_graph=True is refused; compute the loss with plain torch functions instead"
        )


class _Redirect(torch.autograd.Function):
    """Adds the gradient to ``into`` and passes none on."""

    @staticmethod
    def forward(ctx, weight, into):
        ctx.into = into
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        _refuse_graph("linear_cross_entropy with weight_grad")
        ctx.into.add_(grad)
        return None, None


def _redirect(weight: Tensor, weight_grad: Tensor | None) -> Tensor:
    return weight if weight_grad is None else _Redirect.apply(weight, weight_grad)


def _rows(hidden: Tensor) -> Tensor:
    return hidden if hidden.ndim == 2 else hidden.reshape(-1, hidden.shape[-1])


def _plan(numbers: Any, group: str, chunk: int, weight_grad: Tensor | None = None) -> Any:
    process_group = dist.distributed_c10d._resolve_process_group(group) if group else None
    return dispatch.launchers("linear_cross_entropy").Plan(Terms(*numbers), process_group, chunk, weight_grad)


def _or_empty(like: Tensor, *found: Tensor | None) -> tuple[Tensor, ...]:
    """What an operator returns where there is nothing: its schema has no optional results."""
    return tuple(like.new_empty(0) if x is None else x for x in found)


def _recomputing_forward(hidden, weight, bias, labels, weight_grad, *rest):
    *numbers, group, chunk = rest
    kernel = dispatch.launchers("linear_cross_entropy")
    losses, saved = kernel.losses(
        kernel.Projection(_rows(hidden), weight, bias), labels.reshape(-1), _plan(numbers, group, chunk)
    )
    return losses.view(labels.shape), saved


def _recomputing_fake(hidden, weight, bias, labels, weight_grad, first, num_valid, ignore_index, smoothing, *rest):
    saved = hidden.new_empty(3 if smoothing else 2, labels.numel(), dtype=torch.float32)
    return hidden.new_empty(labels.shape, dtype=torch.float32), saved


def _recomputing_backward(dlosses, hidden, *rest):
    return _or_empty(hidden, *_plain_backward(dlosses, hidden, *rest))


def _plain_backward(dlosses, hidden, weight, bias, labels, saved, weight_grad, *rest):
    """(dhidden, dweight, dbias), None where not wanted."""
    *numbers, group, chunk, wants_hidden, wants_weight, wants_bias = rest
    kernel = dispatch.launchers("linear_cross_entropy")
    dhidden, dweight, dbias = kernel.gradients(
        dlosses.reshape(-1),
        kernel.Projection(_rows(hidden), weight, bias),
        labels.reshape(-1),
        saved,
        _plan(numbers, group, chunk, weight_grad),
        (wants_hidden, wants_weight, wants_bias),
    )
    if dhidden is not None and hidden.ndim != 2:
        dhidden = dhidden.view(hidden.shape)
    if weight_grad is not None and wants_weight:
        torch.autograd.graph.increment_version(weight_grad)
    return dhidden, dweight, dbias


def _recomputing_backward_fake(dlosses, hidden, weight, bias, labels, saved, weight_grad, *rest):
    wants = rest[-3], rest[-2] and weight_grad is None, rest[-1]
    return _or_empty(hidden, *(torch.empty_like(x) if want else None for x, want in zip((hidden, weight, bias), wants)))


def _weighted_forward(hidden, weight, bias, labels, token_weights, weight_grad, *rest):
    *numbers, group, chunk, wants_hidden, wants_weight, wants_bias = rest
    kernel, wants = dispatch.launchers("linear_cross_entropy"), (wants_hidden, wants_weight, wants_bias)
    losses, found = kernel.losses_and_gradients(
        kernel.Projection(hidden, weight, bias), labels, token_weights, _plan(numbers, group, chunk), wants
    )
    return torch.dot(losses, token_weights), losses, *_or_empty(hidden, *found)


def _weighted_fake(hidden, weight, bias, labels, token_weights, weight_grad, *rest):
    wide = [None if x is None else torch.empty_like(x, dtype=torch.float32) for x in (weight, bias)]
    found = [x if want else None for x, want in zip((torch.empty_like(hidden), *wide), rest[-3:])]
    losses = torch.empty_like(token_weights)
    return losses.new_empty(()), losses, *_or_empty(hidden, *found)


dispatch.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? weight_grad, "
    f"{TERMS}, str group, int chunk_tokens) -> (Tensor, Tensor)",
    _recomputing_forward,
    _recomputing_fake,
)
_gradients_of = dispatch.define(
    "linear_cross_entropy_backward(Tensor dlosses, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
    f"Tensor saved, Tensor(a!)? weight_grad, {TERMS}, str group, int chunk_tokens, bool wants_hidden, "
    "bool wants_weight, bool wants_bias) -> (Tensor, Tensor, Tensor)",
    _recomputing_backward,
    _recomputing_backward_fake,
    _plain_backward,
)
dispatch.define(
    "weighted_linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor token_weights, "
    f"Tensor? weight_grad, {TERMS}, str group, int chunk_tokens, bool wants_hidden, bool wants_weight, "
    "bool wants_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _weighted_forward,
    _weighted_fake,
)


def _setup(ctx, inputs, output) -> None:
    hidden, weight, bias, labels, weight_grad, *rest = inputs
    ctx.save_for_backward(hidden, weight, bias, labels, output[1])
    # Not as a saved tensor: it is written by every backward, and autograd would refuse the next one.
    ctx.weight_grad, ctx.rest = weight_grad, rest
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _recomputing_gradients(ctx, dlosses, _):
    none = (None,) * (2 + len(ctx.rest))
    if dlosses is None:
        return None, None, None, *none
    hidden, weight, bias, labels, saved = ctx.saved_tensors
    wants = ctx.needs_input_grad[:3]
    if ctx.weight_grad is not None:
        _refuse_graph("linear_cross_entropy with weight_grad")
    arguments = dlosses, hidden, weight, bias, labels, saved, ctx.weight_grad, *ctx.rest, *wants
    dhidden, dweight, dbias = _gradients_of(*arguments)
    wants_weight = wants[1] and ctx.weight_grad is None
    return dhidden if wants[0] else None, dweight if wants_weight else None, dbias if wants[2] else None, *none


def _weighted_setup(ctx, inputs, output) -> None:
    _, weight, _, _, _, ctx.weight_grad, *rest = inputs
    ctx.wants, ctx.weight_dtype = rest[-3:], weight.dtype
    ctx.num_inputs = len(inputs)
    _, losses, *found = output
    ctx.save_for_backward(*found)
    ctx.mark_non_differentiable(losses, *found)
    ctx.set_materialize_grads(False)


def _weighted_gradients(ctx, dtotal, *_):
    out: list[Tensor | None] = [None] * ctx.num_inputs
    if dtotal is None:
        return tuple(out)
    _refuse_graph("weighted_linear_cross_entropy")
    dhidden, dweight, dbias = ctx.saved_tensors
    if ctx.wants[0]:
        out[0] = torch.mul(dhidden, dtotal, out=torch.empty_like(dhidden))
    for index, (wide, wanted) in enumerate(zip((dweight, dbias), ctx.wants[1:]), start=1):
        if not wanted:
            continue
        if index == 1 and ctx.weight_grad is not None:
            ctx.weight_grad.addcmul_(dweight, dtotal)
        else:  # scaled and rounded in one pass, without an fp32 copy
            out[index] = torch.mul(wide, dtotal, out=torch.empty_like(wide, dtype=ctx.weight_dtype))
    return tuple(out)


_recomputing = dispatch.differentiable("linear_cross_entropy", _setup, _recomputing_gradients)
# "linear": its backward refuses a graph of itself, as what that would hang on, hidden, is not kept.
_weighted = dispatch.differentiable("weighted_linear_cross_entropy", _weighted_setup, _weighted_gradients, linear=True)
