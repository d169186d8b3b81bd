"""Cross entropy of a language model, over a whole vocabulary or one that is divided over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm_kernels import dispatch
from llm_kernels.cross_entropy import ref
from llm_kernels.cross_entropy.ref import Terms


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    num_valid: int | None = None,
    group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    inplace_backward: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``lse - (1 - s) x[label] - s mean(x) + z_loss lse^2`` of every token; s is label_smoothing, lse the log-sum-exp.

    logits: [..., v] fp32, bf16 or fp16; labels: int64 [...]. With a ``group``, logits are the columns of this rank:
    rank r has the columns r v to r v + v - 1 of the vocabulary. The first ``num_valid`` of them (default all, may be 0)
    belong to the vocabulary; the rest are padding, which does not enter the loss and gets gradient 0. Labels count from
    0 over the whole vocabulary; a label outside of it gives an infinite loss. Mean and smoothing are over the whole
    vocabulary, as in torch's cross_entropy. With ``softcap`` (0: none) x is ``softcap tanh(logits / softcap)``, as in
    Gemma 2; the gradient is that of the logits.

    Returns fp32 losses [...], equal on every rank, 0 where the label is ignore_index. With return_lse also the
    log-sum-exp (0 for ignored tokens). Both are differentiable, once. A group of more than one rank costs one
    all-gather of 3 (with smoothing 5) numbers per token.

    Saved for backward are the logits and two numbers per token (three with smoothing). inplace_backward allows backward
    to overwrite the logits by the gradient; they must then be contiguous, not a leaf, and not be read afterwards, and
    backward works only once. The torch back end does not make use of that. fp64 runs the reference. Raises ValueError
    for inputs that do not match.
    """
    columns = logits.shape[-1] if logits.ndim else 0
    terms = Terms(
        ref.first_token_id(columns, group), columns if num_valid is None else num_valid, ignore_index, label_smoothing,
        z_loss, softcap,
    )  # fmt: skip
    _check(logits, labels, terms)
    if inplace_backward:
        _check_inplace(logits)
    if dispatch.backend_for(logits, backend) == "torch":
        losses, lse = ref.cross_entropy(logits, labels, terms, group)
    else:
        losses, lse, _ = forward(logits, labels, terms, group, inplace_backward)
    return (losses, lse) if return_lse else losses


def forward(
    logits: Tensor, labels: Tensor, terms: Terms, group: dist.ProcessGroup | None, inplace: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The differentiable operator by the kernels: (losses, lse, saved [2 or 3, tokens])."""
    return _cross_entropy(logits, labels, *terms, group_name(group), inplace)


def chunk_forward(
    logits: Tensor, labels: Tensor, terms: Terms, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same without a derivative, for an operator that has its own."""
    return _without_gradient(logits, labels, *terms, group_name(group), False)


def gradient_(
    dlosses: Tensor | None, dlse: Tensor | None, logits: Tensor, labels: Tensor, saved: Tensor, terms: Terms
) -> Tensor:
    """Overwrites contiguous logits by their gradient, and returns them."""
    _cross_entropy_backward_(dlosses, dlse, logits, labels, saved, *terms)
    return logits


def group_name(group: dist.ProcessGroup | None) -> str:
    """The group's name, which an operator's schema can hold; empty if there is no other rank."""
    return "" if group is None or group.size() == 1 else group.group_name


def check_terms(terms: Terms, columns: int, what: str) -> None:
    """Raises ValueError for options that are out of range. ``what`` the columns are, for the message."""
    if not 0 <= terms.num_valid <= columns:
        raise ValueError(f"num_valid = {terms.num_valid} is not between 0 and the {columns} {what}")
    if not 0.0 <= terms.label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing = {terms.label_smoothing} is not between 0 and 1")
    if not 0.0 <= terms.softcap < float("inf"):
        raise ValueError(f"softcap = {terms.softcap} is not a positive number, or 0 for no cap")


def _check(logits: Tensor, labels: Tensor, terms: Terms) -> None:
    if logits.ndim == 0 or labels.shape != logits.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels are {labels.dtype} {tuple(labels.shape)}; for logits {tuple(logits.shape)} they must be int64 "
            f"{tuple(logits.shape[:-1])}"
        )
    check_terms(terms, logits.shape[-1], "columns of the logits")


def _check_inplace(logits: Tensor) -> None:
    dispatch.check_writable(logits, "logits", "inplace_backward=True")
    if not logits.is_contiguous():
        raise ValueError("inplace_backward=True writes over logits, which must be contiguous")
    base = logits._base
    if base is not None and base.is_leaf and base.requires_grad:
        raise ValueError(
            "inplace_backward=True writes over logits, which are a view of a leaf that requires a gradient"
        )


def _rows(x: Tensor) -> Tensor:
    """``x`` as [M, V] with contiguous columns; a copy only where the strides allow no such view."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _flat(x: Tensor) -> Tensor:
    """``x`` as [M], contiguous."""
    return x if x.ndim == 1 and x.is_contiguous() else x.reshape(-1).contiguous()


def _forward(logits, labels, *rest) -> Any:
    kernel = dispatch.launchers("cross_entropy")
    *numbers, group, _ = rest
    terms = Terms(*numbers)
    flat = _flat(labels)
    outputs: Any = kernel.forward(_rows(logits), flat, terms, whole=not group)
    if group:
        process_group = dist.distributed_c10d._resolve_process_group(group)
        parts = process_group.size()
        stats = outputs.new_empty(parts * outputs.shape[0], *outputs.shape[1:])
        dist.all_gather_into_tensor(stats.view(-1), outputs.view(-1), group=process_group)
        outputs = kernel.join(stats, flat, terms)
    if labels.ndim == 1:
        return outputs
    losses, lse, saved = outputs
    return losses.view(labels.shape), lse.view(labels.shape), saved


def _forward_fake(logits, labels, first, num_valid, ignore_index, label_smoothing, *rest):
    losses, lse = (torch.empty(labels.shape, dtype=torch.float32, device=logits.device) for _ in range(2))
    return losses, lse, lse.new_empty(3 if label_smoothing else 2, labels.numel())


def _launch_backward(dlosses, dlse, logits, labels, saved, terms, out) -> None:
    dlosses = None if dlosses is None else _flat(dlosses)
    dlse = None if dlse is None else _flat(dlse)
    rows = _rows(logits)
    target = rows if out is logits else out.view(-1, out.shape[-1])
    dispatch.launchers("cross_entropy").backward(dlosses, dlse, rows, _flat(labels), saved, Terms(*terms), target)


def _backward(dlosses, dlse, logits, labels, saved, *terms) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _launch_backward(dlosses, dlse, logits, labels, saved, terms, out)
    return out


def _backward_(dlosses, dlse, logits, labels, saved, *terms) -> None:
    assert logits.is_contiguous()
    _launch_backward(dlosses, dlse, logits, labels, saved, terms, logits)
    # A second backward would read the gradient as if it were the logits; the new version makes autograd raise instead.
    torch.autograd.graph.increment_version(logits)


TERMS = "int first, int num_valid, int ignore_index, float label_smoothing, float z_loss, float softcap"
_without_gradient = dispatch.define(
    f"cross_entropy(Tensor logits, Tensor labels, {TERMS}, str group, bool inplace) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_cross_entropy_backward = dispatch.define(
    "cross_entropy_backward(Tensor? dlosses, Tensor? dlse, Tensor logits, Tensor labels, Tensor saved, "
    f"{TERMS}) -> Tensor",
    _backward,
    lambda dlosses, dlse, logits, *rest: torch.empty(logits.shape, dtype=logits.dtype, device=logits.device),
)
_cross_entropy_backward_ = dispatch.define(
    "cross_entropy_backward_(Tensor? dlosses, Tensor? dlse, Tensor(a!) logits, Tensor labels, Tensor saved, "
    f"{TERMS}) -> ()",
    _backward_,
    lambda *arguments: None,
)


def _setup(ctx, inputs, output) -> None:
    logits, labels, *terms, _, inplace = inputs
    ctx.save_for_backward(logits, labels, output[2])
    ctx.terms, ctx.inplace = terms, inplace
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _gradients(ctx, dlosses, dlse, _):
    rest = (None,) * 9
    if dlosses is None and dlse is None:
        return None, *rest
    logits, labels, saved = ctx.saved_tensors
    if not ctx.inplace:
        return _cross_entropy_backward(dlosses, dlse, logits, labels, saved, *ctx.terms), *rest
    _cross_entropy_backward_(dlosses, dlse, logits, labels, saved, *ctx.terms)
    return logits.detach(), *rest


_cross_entropy = dispatch.differentiable("cross_entropy", _setup, _gradients)
