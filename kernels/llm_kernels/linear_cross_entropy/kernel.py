"""Loops over chunks of logits: products by torch, losses and gradients by the kernels of cross_entropy, in place.

T tokens, h hidden, v columns, e bytes an element; a product is 2Thv FLOPs.

``losses``: chunks of c tokens; ecv bytes of logits. One product.
``gradients``: chunks of w columns (all tokens), whose logits are computed again: eTw bytes of them. A slice of dweight
is then one product, final and rounded once, straight into the result; only dhidden [T, h] adds up, in fp32. Over
chunks of tokens it would be dweight, which at 128,256 x 4,096 is 2.1 GB in fp32, read and written for each chunk.
Three products.
``losses_and_gradients``: chunks of c tokens; both gradients while a chunk's logits are there. Three products for all,
but dweight does add up over chunks: 4vh bytes held, 8vh moved for each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from llm_kernels.cross_entropy.op import forward, gradient_
from llm_kernels.cross_entropy.ref import Terms


class Plan(NamedTuple):
    """Loss terms, process group, tokens of a chunk, and fp32 [v, h] to which dweight is added instead of returned."""

    terms: Terms
    group: dist.ProcessGroup | None
    chunk_tokens: int
    weight_grad: Tensor | None


def losses(hidden: Tensor, weight: Tensor, labels: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, h], weight [v, h], labels [T] → (losses, lse, share), as cross_entropy's operator has them."""
    out = _per_token(hidden, plan)
    buffer = hidden.new_empty(plan.chunk_tokens * weight.shape[0])
    for start in range(0, hidden.shape[0], plan.chunk_tokens):
        rows = slice(start, start + plan.chunk_tokens)
        logits = _product(hidden[rows], weight.t(), buffer)
        for whole, part in zip(out, forward(logits, labels[rows], plan.terms, plan.group)):
            whole[rows] = part
    return out


def gradients(
    dlosses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    saved: tuple[Tensor, Tensor],
    plan: Plan,
    wants: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """(dhidden summed over the group, dweight), each None where not wanted; ``saved`` is (lse, share)."""
    tokens, columns = hidden.shape[0], weight.shape[0]
    width = slice_columns(tokens, columns, plan.chunk_tokens)
    dhidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if wants[0] else None
    dweight = torch.empty_like(weight) if wants[1] and plan.weight_grad is None else None
    buffer = hidden.new_empty(tokens * width)
    for start in range(0, columns, width):
        part = slice(start, min(start + width, columns))
        valid = min(max(plan.terms.num_valid - start, 0), part.stop - start)
        if not valid:  # padding alone
            if dweight is not None:
                dweight[part] = 0
            continue
        terms = plan.terms._replace(first=plan.terms.first + start, num_valid=valid)
        dlogits = gradient_(dlosses, None, _product(hidden, weight[part].t(), buffer), labels, saved, terms)
        if dhidden is not None:
            _add_product(dhidden, dlogits, weight[part])
        if dweight is not None:
            torch.mm(dlogits.t(), hidden, out=dweight[part])
        elif wants[1]:
            assert plan.weight_grad is not None
            _add_product(plan.weight_grad[part], dlogits.t(), hidden)
    if dhidden is None:
        return None, dweight
    narrow = dhidden.to(hidden.dtype)
    if plan.group is not None and plan.group.size() > 1:
        dist.all_reduce(narrow, group=plan.group)
    return narrow, dweight


def losses_and_gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, plan: Plan, wants: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(losses, dhidden in its dtype and summed over the group, dweight in fp32) for upstream gradients known before."""
    out = _per_token(hidden, plan)
    buffer = hidden.new_empty(plan.chunk_tokens * weight.shape[0])
    dhidden = torch.empty_like(hidden) if wants[0] else None
    dweight = weight.new_zeros(weight.shape, dtype=torch.float32) if wants[1] else None
    pending = []
    for start in range(0, hidden.shape[0], plan.chunk_tokens):
        rows = slice(start, start + plan.chunk_tokens)
        logits = _product(hidden[rows], weight.t(), buffer)
        found = forward(logits, labels[rows], plan.terms, plan.group)
        for whole, part in zip(out, found):
            whole[rows] = part
        if wants == (False, False):
            continue
        dlogits = gradient_(token_weights[rows], None, logits, labels[rows], found[1:], plan.terms)
        if dhidden is not None:
            torch.mm(dlogits, weight, out=dhidden[rows])
            if plan.group is not None and plan.group.size() > 1:  # sums while the next chunk computes
                pending.append(dist.all_reduce(dhidden[rows], group=plan.group, async_op=True))
        if dweight is not None:
            _add_product(dweight, dlogits.t(), hidden[rows])
    for work in pending:
        work.wait()
    return out[0], dhidden, dweight


def slice_columns(tokens: int, columns: int, chunk_tokens: int) -> int:
    """Columns of a slice over all tokens that is no larger than chunk_tokens whole rows; whole 128s, at least one."""
    return min(columns, max(128, chunk_tokens * columns // max(tokens, 1) // 128 * 128))


def _per_token(hidden: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = (torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device) for _ in range(2))
    return out, lse, torch.empty_like(lse if plan.terms.label_smoothing else lse[:0])


def _product(a: Tensor, b: Tensor, buffer: Tensor) -> Tensor:
    """a @ b at the beginning of the buffer, so that chunks take turns in one piece of memory."""
    shape = a.shape[0], b.shape[1]
    return torch.mm(a, b, out=buffer[: shape[0] * shape[1]].view(shape))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in fp32 without rounding the product."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cpu":  # which has no product of bf16 into fp32
        total.addmm_(a.float(), b.float())
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
