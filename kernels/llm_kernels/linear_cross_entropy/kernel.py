"""Loops over chunks of logits: products by torch, losses and gradients by the kernels of cross_entropy, in place.

T tokens, h hidden, v columns, e bytes an element; a product is 2Thv FLOPs.

``losses``: chunks of c tokens; ecv bytes of logits. One product.
``gradients``: chunks of w columns (all tokens), whose logits are computed again: eTw bytes of them. A slice of dweight
is then one product, final and rounded once, straight into the result; only dhidden [T, h] adds up, in fp32. Over
chunks of tokens it would be dweight, which at 128,256 x 4,096 is 2.1 GB in fp32, read and written for each chunk.
Three products.
``losses_and_gradients``: chunks of c tokens; both gradients while a chunk's logits are there. Three products for all,
but dweight does add up over chunks: 4vh bytes held, 8vh moved for each.

A bias [v] is added by the product that makes logits; its gradient is the sum over tokens of the logits', in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from llm_kernels.cross_entropy.op import chunk_forward, gradient_
from llm_kernels.cross_entropy.ref import Terms


class Projection(NamedTuple):
    """What makes logits: hidden [T, h], weight [v, h], bias [v] or none, of one dtype."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class Plan(NamedTuple):
    """Loss terms, process group, tokens of a chunk, and fp32 [v, h] to which dweight is added instead of returned."""

    terms: Terms
    group: dist.ProcessGroup | None
    chunk_tokens: int
    weight_grad: Tensor | None = None


class Gradients(NamedTuple):
    """Each None where it is not wanted, or, of the weight, where it was added to ``weight_grad``."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def losses(of: Projection, labels: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """labels [T] → losses [T] and saved [2 or 3, T], as cross_entropy's operator has them."""
    if of.hidden.shape[0] <= plan.chunk_tokens:  # one chunk: its results are the whole's, without a copy
        out, _, saved = chunk_forward(_logits(*of), labels, plan.terms, plan.group)
        return out, saved
    out, saved = _per_token(of.hidden, plan)
    buffer = of.hidden.new_empty(plan.chunk_tokens * of.weight.shape[0])
    for start in range(0, of.hidden.shape[0], plan.chunk_tokens):
        rows = slice(start, start + plan.chunk_tokens)
        logits = _logits(of.hidden[rows], of.weight, of.bias, buffer)
        out[rows], _, saved[:, rows] = chunk_forward(logits, labels[rows], plan.terms, plan.group)
    return out, saved


def gradients(
    dlosses: Tensor, of: Projection, labels: Tensor, saved: Tensor, plan: Plan, wants: tuple[bool, bool, bool]
) -> Gradients:
    """Of hidden (summed over the group), weight and bias, as far as wanted."""
    tokens, columns = of.hidden.shape[0], of.weight.shape[0]
    width = slice_columns(tokens, columns, plan.chunk_tokens)
    if width == columns and plan.terms.num_valid:
        found = _gradients_of_one_slice(dlosses, of, labels, saved, plan, wants)
    else:
        found = _gradients_of_slices(dlosses, of, labels, saved, plan, wants, width)
    if found.hidden is None:
        return found
    narrow = found.hidden.to(of.hidden.dtype)
    if plan.group is not None and plan.group.size() > 1:
        dist.all_reduce(narrow, group=plan.group)
    return Gradients(narrow, found.weight, found.bias)


def _gradients_of_one_slice(
    dlosses: Tensor, of: Projection, labels: Tensor, saved: Tensor, plan: Plan, wants: tuple[bool, bool, bool]
) -> Gradients:
    """Gradients, hidden's in fp32, where one slice holds all columns: nothing is cut, filled or added up."""
    hidden, weight, bias = of
    dlogits = gradient_(dlosses, None, _logits(*of), labels, saved, plan.terms)
    dhidden = _wide_product(dlogits, weight) if wants[0] else None
    dweight, dbias = None, None
    if wants[1] and plan.weight_grad is None:
        dweight = torch.mm(dlogits.t(), hidden)
    elif wants[1]:
        assert plan.weight_grad is not None
        _add_product(plan.weight_grad, dlogits.t(), hidden)
    if wants[2] and bias is not None:
        dbias = dlogits.sum(0, dtype=torch.float32).to(bias.dtype)
    return Gradients(dhidden, dweight, dbias)


def _gradients_of_slices(
    dlosses: Tensor,
    of: Projection,
    labels: Tensor,
    saved: Tensor,
    plan: Plan,
    wants: tuple[bool, bool, bool],
    width: int,
) -> Gradients:
    """The same over slices of ``width`` columns."""
    hidden, weight, bias = of
    tokens, columns = hidden.shape[0], weight.shape[0]
    dhidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if wants[0] else None
    dweight = torch.empty_like(weight) if wants[1] and plan.weight_grad is None else None
    dbias = torch.empty_like(bias) if wants[2] and bias is not None else None
    buffer = hidden.new_empty(tokens * width)
    for start in range(0, columns, width):
        part = slice(start, min(start + width, columns))
        valid = min(max(plan.terms.num_valid - start, 0), part.stop - start)
        if not valid:  # padding alone
            for out in (dweight, dbias):
                if out is not None:
                    out[part] = 0
            continue
        terms = plan.terms._replace(first=plan.terms.first + start, num_valid=valid)
        logits = _logits(hidden, weight[part], None if bias is None else bias[part], buffer)
        dlogits = gradient_(dlosses, None, logits, labels, saved, terms)
        if dhidden is not None:
            _add_product(dhidden, dlogits, weight[part])
        if dweight is not None:
            torch.mm(dlogits.t(), hidden, out=dweight[part])
        elif wants[1]:
            assert plan.weight_grad is not None
            _add_product(plan.weight_grad[part], dlogits.t(), hidden)
        if dbias is not None:
            dbias[part] = dlogits.sum(0, dtype=torch.float32)
    return Gradients(dhidden, dweight, dbias)


def losses_and_gradients(
    of: Projection, labels: Tensor, token_weights: Tensor, plan: Plan, wants: tuple[bool, bool, bool]
) -> tuple[Tensor, Gradients]:
    """Losses [T], and for upstream gradients known before: dhidden in its dtype and summed over the group, dweight and
    dbias in fp32."""
    hidden, weight, bias = of
    out, _ = _per_token(hidden, plan)
    buffer = hidden.new_empty(plan.chunk_tokens * weight.shape[0])
    dhidden = torch.empty_like(hidden) if wants[0] else None
    dweight = weight.new_zeros(weight.shape, dtype=torch.float32) if wants[1] else None
    dbias = bias.new_zeros(bias.shape, dtype=torch.float32) if wants[2] and bias is not None else None
    pending = []
    for start in range(0, hidden.shape[0], plan.chunk_tokens):
        rows = slice(start, start + plan.chunk_tokens)
        logits = _logits(hidden[rows], weight, bias, buffer)
        out[rows], _, known = chunk_forward(logits, labels[rows], plan.terms, plan.group)
        if not any(wants):
            continue
        dlogits = gradient_(token_weights[rows], None, logits, labels[rows], known, plan.terms)
        if dhidden is not None:
            torch.mm(dlogits, weight, out=dhidden[rows])
            if plan.group is not None and plan.group.size() > 1:  # sums while the next chunk computes
                pending.append(dist.all_reduce(dhidden[rows], group=plan.group, async_op=True))
        if dweight is not None:
            _add_product(dweight, dlogits.t(), hidden[rows])
        if dbias is not None:
            dbias += dlogits.sum(0, dtype=torch.float32)
    for work in pending:
        work.wait()
    return out, Gradients(dhidden, dweight, dbias)


def slice_columns(tokens: int, columns: int, chunk_tokens: int) -> int:
    """Columns of a slice over all tokens that is no larger than chunk_tokens whole rows; whole 128s, at least one."""
    return min(columns, max(128, chunk_tokens * columns // max(tokens, 1) // 128 * 128))


def _per_token(hidden: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    tokens, numbers = hidden.shape[0], 3 if plan.terms.label_smoothing else 2
    out = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    return out, torch.empty(numbers, tokens, dtype=torch.float32, device=hidden.device)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor | None = None) -> Tensor:
    """hidden @ weight.T + bias, at the beginning of the buffer if there is one: chunks take turns in one piece of
    memory."""
    out = None
    if buffer is not None:
        shape = hidden.shape[0], weight.shape[0]
        out = buffer[: shape[0] * shape[1]].view(shape)
    return torch.mm(hidden, weight.t(), out=out) if bias is None else torch.addmm(bias, hidden, weight.t(), out=out)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.device.type == "cpu":  # which has no product of bf16 into fp32
        return torch.mm(a.float(), b.float())
    return torch.mm(a, b, out_dtype=torch.float32)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in fp32 without rounding the product."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cpu":  # which has no product of bf16 into fp32
        total.addmm_(a.float(), b.float())
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
