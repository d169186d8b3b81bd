"""Operators of ``kernels.deterministic``, for training and generation alike: what a token gets depends neither on the
tokens beside it in the call, nor on their number, nor on how tensor parallelism divides the model.

Which of torch's operators on a CPU keep that promise was measured with torch 2.13 on an AMD EPYC, 1 to 16 threads
(benchmarks/results/generation_same_numbers_2026-11-30.md):
- rows of a product: oneDNN's from 2 rows on; those of the library behind ``F.linear`` in fp32 only from 16 rows on, and
  only if the threads get multiples of 4. So ``product`` takes oneDNN, and checks it for each shape on this machine;
- silu and sigmoid do not: the last numbers of a stretch of memory are rounded differently. exp, tanh, log do;
- sums over the last dim do.
A product that tensor parallelism cuts along its sum is cut into a fixed number of parts in every layout, one process
too, whose results are added in fp32 in one order.

Shapes: R rows (tokens), I and O inputs and outputs of a linear on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llm_kernels.cross_entropy import ref as cross_entropy
from llm_parallel.config.tree import ModelConfig
from llm_parallel.errors import UserError
from llm_parallel.parallel.scatter import all_gather

MOST_PARTS = 8
IDS = 16
"""Token ids whose exponentials are added first, in the sum over the vocabulary."""


def num_parts(model: ModelConfig, tp: int) -> int:
    """Parts into which the sum of a row-parallel product is cut: the same for all sizes of tensor parallelism that
    divide the largest power of 2, up to 8, that divides heads and feed-forward width (where both are odd, their largest
    common divisor up to 8). Other sizes have parts of their own, and so other roundings."""
    common = math.gcd(model.num_attention_heads, model.ffn_hidden_size)
    powers = [n for n in (8, 4, 2) if common % n == 0]
    found = powers[0] if powers else max(n for n in range(1, MOST_PARTS + 1) if common % n == 0)
    return found if found % tp == 0 else tp


_least: dict[tuple[Any, ...], int] = {}


def _onednn(x_RI: Tensor, weight_OI: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x_RI, weight_OI, None, "none", [], "")
    return out


def least_rows(weight_OI: Tensor) -> int:
    """Rows from which those of a product do not depend on their number on this machine, found by trying. Raises
    UserError if there is no such number."""
    key = (tuple(weight_OI.shape), weight_OI.dtype, torch.get_num_threads())
    if key not in _least:
        generator = torch.Generator().manual_seed(0)
        x_RI = torch.randn(67, weight_OI.shape[1], generator=generator).to(weight_OI.dtype)
        try:
            whole = _onednn(x_RI, weight_OI)
        except (AttributeError, RuntimeError) as error:
            raise UserError(
                f"kernels.deterministic needs oneDNN's product of {weight_OI.dtype} matrices, which torch "
                f"{torch.__version__} does not have on this machine ({error}); set it to false"
            ) from None
        for least in (2, 4, 8, 16):
            counts = sorted({least, least + 1, 2 * least + 1, 16, 33})
            if all(torch.equal(_onednn(x_RI[5 : 5 + n], weight_OI), whole[5 : 5 + n]) for n in counts if n >= least):
                _least[key] = least
                break
        else:
            raise UserError(
                f"kernels.deterministic is true, and a product with a matrix {tuple(weight_OI.shape)} in "
                f"{weight_OI.dtype} depends on the number of its rows on this machine; set it to false"
            )
    return _least[key]


def product(x_RI: Tensor, weight_OI: Tensor) -> Tensor:
    """x Wᵀ [R, O] of a contiguous weight, without a gradient."""
    rows, least = x_RI.shape[0], least_rows(weight_OI)
    computed = max(rows_computed(rows), least)
    if rows == computed:
        return _onednn(x_RI, weight_OI)
    return _onednn(F.pad(x_RI, (0, 0, 0, computed - rows)), weight_OI)[:rows]


def rows_computed(rows: int) -> int:
    """Rows that a product by oneDNN is computed with: the next multiple of 8, from 64 rows on of 32. oneDNN compiles a
    program for each number of rows and keeps it; for all numbers up to 512, these took 700 MB for a model of two
    layers in a server, whose passes have any number of tokens."""
    step = 1 if rows <= 8 else 8 if rows <= 64 else 32
    return -(-rows // step) * step


def cut(weight_OI: Tensor, parts: int) -> list[Tensor]:
    """A weight's columns in equal parts, each contiguous (oneDNN reads others as if they were)."""
    return [part.contiguous() for part in weight_OI.chunk(parts, dim=1)] if parts > 1 else [weight_OI.contiguous()]


def tree_sum(parts: Sequence[Tensor]) -> Tensor:
    """Sum of fp32 parts: of the sums of both halves where their number is even, else one after the other. So the parts
    of a rank can be added before those of the others."""
    if len(parts) == 1:
        return parts[0]
    if len(parts) % 2 == 0:
        half = len(parts) // 2
        return tree_sum(parts[:half]) + tree_sum(parts[half:])
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def parted_product(x_RI: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """This rank's sum of x Wᵀ over the parts of its columns, fp32 [R, O], without a gradient."""
    columns = x_RI.chunk(len(weights), dim=1)
    return tree_sum([product(x, weight).float() for x, weight in zip(columns, weights)])


def sum_over_ranks(y: Tensor, group: Any, scatter: bool) -> Tensor:
    """The sum of fp32 [S, …] over a group in one order; with ``scatter`` this rank's part of the S rows."""
    size = group.size()
    if size == 1:
        return y
    if scatter:
        parts = torch.empty_like(y)
        dist.all_to_all_single(parts, y.contiguous(), group=group)
        return tree_sum(parts.view(size, -1, *y.shape[1:]).unbind(0))
    gathered = [torch.empty_like(y) for _ in range(size)]
    dist.all_gather(gathered, y.contiguous(), group=group)
    return tree_sum(gathered)


def _matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A linear's weight, or the numbers of one in few bits."""
    stored = getattr(weight, "stored", None)
    return weight if stored is None else stored.values(dtype)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    dx = dy @ (weight if ctx.stored is None else ctx.stored.values(dy.dtype)) if ctx.needs_input_grad[0] else None
    dweight = dy.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
    return dx, dweight


class ColumnProduct(torch.autograd.Function):
    """x [..., I], weight [O, I] → x Wᵀ [..., O]. The weight may be one in few bits (model/quant.py)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """See the class."""
        ctx.save_for_backward(x, weight)
        ctx.stored = getattr(weight, "stored", None)
        return product(x.flatten(0, -2), _matrix(weight, x.dtype)).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """Products in whatever order: gradients are not part of the promise."""
        return _gradients(ctx, dy)


class RowProduct(torch.autograd.Function):
    """x [S, B, I] and weight [O, I] of this rank's columns → the sum of x Wᵀ over the ranks [S, B, O], or with
    ``scatter`` this rank's tokens of it. parts: of this rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, parts: int, group: Any, scatter: bool) -> Tensor:
        """See the class."""
        ctx.save_for_backward(x, weight)
        ctx.stored, ctx.group, ctx.scatter = getattr(weight, "stored", None), group, scatter and group.size() > 1
        y_RO = parted_product(x.flatten(0, -2), cut(_matrix(weight, x.dtype), parts))
        return sum_over_ranks(y_RO.unflatten(0, x.shape[:-1]), group, scatter).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """As of megatron-core's row-parallel linear."""
        if ctx.scatter:
            whole = dy.new_empty(dy.shape[0] * ctx.group.size(), *dy.shape[1:])
            all_gather(whole, dy.contiguous(), group=ctx.group)
            dy = whole
        return *_gradients(ctx, dy), None, None, None


def gated(x: Tensor) -> Tensor:
    """silu(gate) · up of [..., 2F] in fp32, rounded once, without a gradient."""
    gate, up = x.float().chunk(2, dim=-1)
    return (gate / (1.0 + torch.exp(-gate)) * up).to(x.dtype)


class SwiGLU(torch.autograd.Function):
    """``gated`` with a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """See ``gated``."""
        ctx.save_for_backward(x)
        return gated(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        """Computes the sigmoid again."""
        (x,) = ctx.saved_tensors
        gate, up = x.float().chunk(2, dim=-1)
        share, dy = torch.sigmoid(gate), dy.float()
        grad_gate = dy * up * share * (1.0 + gate * (1.0 - share))
        return torch.cat((grad_gate, dy * gate * share), dim=-1).to(x.dtype)


def squares_of_heads(x_RND: Tensor, group: Any) -> Tensor:
    """Sum of squares over the heads of all ranks, fp32 [R, 1], without a gradient: by head, then over heads."""
    by_head = x_RND.float().square().sum(-1)
    if group.size() > 1:
        parts = [torch.empty_like(by_head) for _ in range(group.size())]
        dist.all_gather(parts, by_head.contiguous(), group=group)
        by_head = torch.cat(parts, dim=-1)
    return by_head.sum(-1, keepdim=True)


class SquaresOfHeads(torch.autograd.Function):
    """``squares_of_heads`` with a gradient, which is summed over the group since every rank's output depends on it."""

    @staticmethod
    def forward(ctx: Any, x_RND: Tensor, group: Any) -> Tensor:
        """x [R, N, D] of this rank's heads → [R, 1]."""
        ctx.save_for_backward(x_RND)
        ctx.group = group
        return squares_of_heads(x_RND, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """2 x times the gradient."""
        if ctx.group.size() > 1:
            grad = grad.contiguous().clone()
            dist.all_reduce(grad, group=ctx.group)
        (x_RND,) = ctx.saved_tensors
        return (2.0 * x_RND.float() * grad.unsqueeze(-1)).to(x_RND.dtype), None


def sum_of_exponentials(wide_RV: Tensor, top_R: Tensor, vocabulary: int, group: Any = None) -> Tensor:
    """Σ exp(x - top) over the vocabulary, fp32 [R], of capped fp32 logits: this rank's columns, those of padding left
    out or -inf. Every ``IDS`` token ids are added, and then their sums."""
    shifted = (wide_RV - top_R.unsqueeze(-1)).exp_()
    sums = F.pad(shifted, (0, -shifted.shape[-1] % IDS)).unflatten(-1, (-1, IDS)).sum(-1)
    if group is not None and group.size() > 1:
        parts = [torch.empty_like(sums) for _ in range(group.size())]
        dist.all_gather(parts, sums.contiguous(), group=group)
        sums = torch.cat(parts, dim=-1)
    return sums[..., : -(-vocabulary // IDS)].contiguous().sum(-1)


class TokenLosses(torch.autograd.Function):
    """-log p of labels: logits [..., V] of this rank's columns, labels int64 [...] → fp32 [...]. vocabulary: its size
    without padding. Labels that ``terms`` ignores have 0."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, terms: cross_entropy.Terms, vocabulary: int, group: Any
    ) -> Tensor:
        """See the class."""
        several = group is not None and group.size() > 1
        wide = logits[..., : terms.num_valid].float()
        if terms.softcap:
            wide = torch.tanh(wide / terms.softcap) * terms.softcap
        wide = F.pad(wide, (0, logits.shape[-1] - terms.num_valid), value=-torch.inf)
        local = labels - terms.first
        here = (local >= 0) & (local < terms.num_valid) & (labels != terms.ignore_index)
        target = wide.gather(-1, local.clamp(0, wide.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
        both = torch.stack((wide.amax(-1), target.masked_fill(~here, -torch.inf)))
        if several:
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
        top, target = both
        total = sum_of_exponentials(wide, top, vocabulary, group if several else None)
        ctx.save_for_backward(logits, labels, torch.stack((top, total)))
        ctx.terms = terms
        return (total.log() + (top - target)).masked_fill(labels == terms.ignore_index, 0.0)

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor) -> Any:
        """As of ``llm_kernels.cross_entropy``."""
        logits, labels, saved = ctx.saved_tensors
        return cross_entropy.gradient(dlosses, None, logits, labels, saved, ctx.terms), None, None, None, None


def token_losses(logits: Tensor, labels: Tensor, num_valid: int, vocabulary: int, softcap: float, group: Any) -> Tensor:
    """-log p of labels, fp32 [...]; see ``TokenLosses``. Rank r has the columns from r V on, ``num_valid`` of which are
    no padding; V is a multiple of ``IDS`` where there are several ranks."""
    terms = cross_entropy.Terms(cross_entropy.first_token_id(logits.shape[-1], group), num_valid, softcap=softcap)
    losses: Tensor = TokenLosses.apply(logits, labels, terms, vocabulary, group)
    return losses


def log_probs_of(logits_RV: Tensor, tokens_R: Tensor) -> Tensor:
    """log p of one token of each row, with the roundings of ``token_losses``: fp32 logits of the whole vocabulary."""
    top = logits_RV.amax(-1)
    total = sum_of_exponentials(logits_RV, top, logits_RV.shape[-1])
    chosen = logits_RV.gather(-1, tokens_R.unsqueeze(-1)).squeeze(-1)
    return -(total.log() + (top - chosen))
