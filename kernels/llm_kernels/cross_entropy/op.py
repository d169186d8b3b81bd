"""Cross entropy of a language model, over the whole vocabulary or one divided over tensor-parallel processes."""

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
    inplace_backward: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``lse - (1 - s) x[label] - s mean(x) + z_loss lse^2`` of every token, s being label_smoothing, lse log-sum-exp.

    logits: [..., v] fp32, bf16 or fp16; labels: int64 [...]. Over a ``group``, logits are this process's columns: rank
    r has words r v to r v + v - 1, of which the first ``num_valid`` (default all, may be 0) are words and the rest
    padding, which takes no part and gets gradient 0. Labels count from 0 over the whole vocabulary; a label outside it
    gives an infinite loss. Mean and smoothing are over the words of all processes, as in torch's cross_entropy.

    Returns fp32 losses [...], equal on every process; 0 where the label is ignore_index. With return_lse also the
    log-sum-exp (0 for ignored tokens); both are differentiable. One all-gather of 3 (5 with smoothing) numbers per
    token where the group has more than one process, none otherwise.

    Backward keeps the logits and one number per token (two with smoothing). inplace_backward writes the gradient over
    the logits, which then must be contiguous, no leaf, and read by nothing else later; backward works only once.
    fp64 runs the reference. Raises ValueError for inputs that do not fit.
    """
    columns = logits.shape[-1] if logits.ndim else 0
    words = columns if num_valid is None else num_valid
    _check(logits, labels, words)
    if inplace_backward and ((logits.is_leaf and logits.requires_grad) or not logits.is_contiguous()):
        raise ValueError("inplace_backward needs contiguous logits that are the result of a computation")
    terms = Terms(ref.first_word(columns, group), words, ignore_index, label_smoothing, z_loss)
    if dispatch.backend_for(logits, backend) == "torch" or logits.dtype == torch.float64:
        losses, lse = ref.cross_entropy(logits, labels, terms, group)
    else:
        losses, lse, _ = forward(logits, labels, terms, group, inplace_backward)
    return (losses, lse) if return_lse else losses


def forward(
    logits: Tensor, labels: Tensor, terms: Terms, group: dist.ProcessGroup | None, inplace: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered operator: (losses, lse, share), differentiable."""
    name = "" if group is None or group.size() == 1 else group.group_name
    return torch.ops.llm_kernels.cross_entropy(logits, labels, *terms, name, inplace)


def gradient_(
    dlosses: Tensor | None,
    dlse: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    saved: tuple[Tensor, Tensor],
    terms: Terms,
) -> Tensor:
    """The gradient of contiguous logits, written over them."""
    torch.ops.llm_kernels.cross_entropy_backward_(dlosses, dlse, logits, labels, *saved, *terms)
    return logits


def _check(logits: Tensor, labels: Tensor, num_valid: int) -> None:
    if logits.ndim == 0 or labels.shape != logits.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels are {labels.dtype} {tuple(labels.shape)}; logits {tuple(logits.shape)} want int64 of all dims but "
            "the last"
        )
    if not 0 <= num_valid <= logits.shape[-1]:
        raise ValueError(f"num_valid = {num_valid} is not between 0 and the {logits.shape[-1]} columns of the logits")


def _rows(x: Tensor) -> Tensor:
    """[M, V] with contiguous columns, a view wherever the layout allows one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1).contiguous()


def _forward(logits, labels, first, num_valid, ignore_index, label_smoothing, z_loss, group, inplace):
    from llm_kernels.cross_entropy import kernel

    terms = Terms(first, num_valid, ignore_index, label_smoothing, z_loss)
    flat = labels.reshape(-1).contiguous()
    outputs: Any = kernel.forward(_rows(logits), flat, terms, whole=not group)
    if group:
        process_group = dist.distributed_c10d._resolve_process_group(group)
        parts = process_group.size()
        stats = outputs.new_empty(parts * outputs.shape[0], *outputs.shape[1:])
        dist.all_gather_into_tensor(stats.view(-1), outputs.view(-1), group=process_group)
        outputs = kernel.join(stats, flat, terms)
    losses, lse, share = outputs
    return losses.view(labels.shape), lse.view(labels.shape), share


def _forward_fake(logits, labels, first, num_valid, ignore_index, label_smoothing, z_loss, group, inplace):
    losses, lse = (torch.empty(labels.shape, dtype=torch.float32, device=logits.device) for _ in range(2))
    return losses, lse, lse.new_empty(labels.numel() if label_smoothing else 0)


def _launch_backward(dlosses, dlse, logits, labels, lse, share, terms, out) -> None:
    from llm_kernels.cross_entropy import kernel

    saved = (lse.reshape(-1), share)
    kernel.backward(
        _flat(dlosses),
        _flat(dlse),
        _rows(logits),
        labels.reshape(-1).contiguous(),
        saved,
        terms,
        out.view(-1, out.shape[-1]),
    )


def _backward(dlosses, dlse, logits, labels, lse, share, *terms) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _launch_backward(dlosses, dlse, logits, labels, lse, share, Terms(*terms), out)
    return out


def _backward_(dlosses, dlse, logits, labels, lse, share, *terms) -> None:
    assert logits.is_contiguous()
    _launch_backward(dlosses, dlse, logits, labels, lse, share, Terms(*terms), logits)


_TERMS = "int first, int num_valid, int ignore_index, float label_smoothing, float z_loss"
_SAVED = "Tensor labels, Tensor lse, Tensor share"
dispatch.define(
    f"cross_entropy(Tensor logits, Tensor labels, {_TERMS}, str group, bool inplace) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
dispatch.define(
    f"cross_entropy_backward(Tensor? dlosses, Tensor? dlse, Tensor logits, {_SAVED}, {_TERMS}) -> Tensor",
    _backward,
    lambda dlosses, dlse, logits, *rest: torch.empty(logits.shape, dtype=logits.dtype, device=logits.device),
)
dispatch.define(
    f"cross_entropy_backward_(Tensor? dlosses, Tensor? dlse, Tensor(a!) logits, {_SAVED}, {_TERMS}) -> ()",
    _backward_,
    lambda *arguments: None,
)


def _setup(ctx, inputs, output) -> None:
    logits, labels, *terms, _, inplace = inputs
    _, lse, share = output
    ctx.save_for_backward(logits, labels, lse, share)
    ctx.terms, ctx.inplace = Terms(*terms), inplace
    ctx.mark_non_differentiable(share)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dlosses, dlse, _):
    rest = (None,) * 8
    if dlosses is None and dlse is None:
        return None, *rest
    logits, labels, lse, share = ctx.saved_tensors
    if not ctx.inplace:
        return torch.ops.llm_kernels.cross_entropy_backward(
            dlosses, dlse, logits, labels, lse, share, *ctx.terms
        ), *rest
    gradient_(dlosses, dlse, logits, labels, (lse, share), ctx.terms)
    # A second backward would take the gradient for the logits: autograd refuses once the version has changed.
    torch.autograd.graph.increment_version(logits)
    return logits.detach(), *rest


torch.library.register_autograd("llm_kernels::cross_entropy", _gradients, setup_context=_setup, lib=dispatch.LIBRARY)
