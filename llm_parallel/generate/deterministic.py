"""What ``kernels.deterministic`` changes in generation: the operators of ``model/deterministic.py`` on plain tensors.

Shapes: T tokens of a pass, N query heads and G key/value groups of this process, M = N/G, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llm_parallel.config.tree import ModelConfig
from llm_parallel.errors import UserError
from llm_parallel.generate.paged import AttentionOptions, Keys, LayerCache, Pass
from llm_parallel.model.deterministic import cut, parted_product, product, squares_of_heads, sum_over_ranks
from llm_parallel.model.deterministic_attention import Scores, attend_in_chunks, whole_blocks
from llm_parallel.model.deterministic_attention import attend as attend_blocks

Function = Callable[[Tensor], Tensor]
Added = Callable[[Tensor, Tensor], Tensor]
PRICE = "generation takes 1.3 to 2 times the processor time, a training step up to 1.3 times"
"""As benchmarks/deterministic.py measured it, see benchmarks/results/generation_same_numbers_2026-11-30.md."""


def deterministic_notice(model: ModelConfig, device: str) -> str:
    """What the mode means for generation with a model. Raises UserError on a GPU."""
    if device != "cpu":
        raise UserError(
            "deterministic is given, and the device is cuda, whose matrix products depend on the number of rows; use "
            "--device cpu"
        )
    scaling = model.rope_scaling
    same = ", and are those of training with kernels.deterministic=true"
    if scaling is not None and scaling.kind in ("dynamic", "longrope"):
        same = f"; those of training differ, because {scaling.kind} turns keys by angles that follow a text's length"
    return f"deterministic: log-probabilities depend on neither batch nor layout{same}; {PRICE}"


def linear(weight: Tensor) -> Function:
    """x [T, in] → x Wᵀ [T, out]."""
    stored = getattr(weight, "stored", None)  # in few bits, under adapters
    if stored is not None:
        return lambda x: product(x, stored.values(x.dtype))
    held = weight.contiguous()
    return lambda x: product(x, held)


def _without_magnitudes(adapter: Any) -> Any:
    """The adapter, or None. Raises UserError if it has DoRA's magnitudes."""
    if adapter is not None and adapter.m is not None:
        raise UserError(
            "kernels.deterministic = true has no products with the magnitudes of adapters (adapter.dora); "
            "leave it out, or merge the adapters with `llm-parallel convert --merge`"
        )
    return adapter


def column(module: Any, added: Added | None, weight: Tensor) -> Function:
    """A linear whose rows ranks divide, with its adapter, or what is ``added`` for those that requests name."""
    multiply, bias, adapter = linear(weight), module.bias, _without_magnitudes(module.adapter)
    wide_b = None if adapter is None else adapter.wide_b().contiguous()

    def forward(x: Tensor) -> Tensor:
        y = multiply(x)
        if bias is not None:
            y = y + bias
        if wide_b is not None and adapter.on:
            y = y + adapter.scale * product(product(x, adapter.a), wide_b)
        return y if added is None else added(y, x)

    return forward


def row(module: Any, group: Any, added: Added | None) -> Function:
    """A linear whose columns ranks divide, with its adapter, or what is ``added`` for those that requests name. It
    holds a copy of the weight where its sum is cut."""
    bias, adapter, count = module.bias, _without_magnitudes(module.adapter), module.config.row_parts
    stored = getattr(module.weight, "stored", None)
    held = [] if stored is not None else cut(module.weight, count)
    held_a = [] if adapter is None else cut(adapter.a, count)

    def forward(x: Tensor) -> Tensor:
        weights = held if stored is None else cut(stored.values(x.dtype), count)
        y = sum_over_ranks(parted_product(x, weights), group, False).to(x.dtype)
        if adapter is not None and adapter.on:
            low = sum_over_ranks(parted_product(x, held_a), group, False).to(x.dtype)
            y = y + adapter.scale * product(low, adapter.b)
        if added is not None:
            y = added(y, x)
        return y if bias is None else y + bias

    return forward


def over_heads(module: Any) -> Function:
    """The norm of the queries or keys [T, heads, D] of all ranks together."""
    weight, eps, channels, group = module.heads_weight.float(), module.eps, module.channels, module.group

    def forward(x_TND: Tensor) -> Tensor:
        squares = squares_of_heads(x_TND.contiguous(), group)
        normed = x_TND.flatten(1).float() * torch.rsqrt(squares / channels + eps) * weight
        return normed.to(x_TND.dtype).view(x_TND.shape)

    return forward


def attend(q_TGMD: Tensor, cache: LayerCache, info: Pass, options: AttentionOptions) -> Tensor:
    """Attention of all parts over the cache → [T, N·D]. Single tokens whose keys fill as many blocks share a call."""
    how = Scores(options.scale, options.left, options.softcap)
    out = torch.empty(len(q_TGMD), q_TGMD[0].numel(), dtype=q_TGMD.dtype, device=q_TGMD.device)
    for rows, index, lengths in _batches(info):
        k, v = (_side_by_side(x.index_select(0, index), len(rows)) for x in (cache.k, cache.v))
        q = q_TGMD.index_select(0, rows).flatten(0, 1).unsqueeze(0)
        found = attend_blocks(q, k, v, lengths.repeat_interleave(q_TGMD.shape[1]), how)
        out.index_copy_(0, rows, found.reshape(len(rows), -1))
    row = info.num_singles
    for keys, count in zip(info.keys[row:], info.counts[row:]):
        found = attend_in_chunks(q_TGMD[row : row + count], keys.of(cache.k), keys.of(cache.v), how)
        out[row : row + count] = found.flatten(1)
        row += count
    return out


def _side_by_side(x: Tensor, sequences: int) -> Tensor:
    """Keys or values [sequences · L, G, D] → fp32 [sequences · G, L, D]."""
    return x.unflatten(0, (sequences, -1)).transpose(1, 2).flatten(0, 1).float()


Batch = tuple[Tensor, Tensor, Tensor]


def _batches(info: Pass) -> list[Batch]:
    """Of the single tokens of a pass, those whose keys fill as many blocks: their rows, the slots of their keys one
    after the other, and the numbers of their keys."""
    if "_batches" not in info.__dict__:  # kept, because every layer asks for the same
        by_size: dict[int, list[int]] = {}
        for row in range(info.num_singles):
            by_size.setdefault(whole_blocks(info.keys[row].length), []).append(row)
        device = info.tokens.device
        info.__dict__["_batches"] = [
            (
                torch.tensor(rows, device=device),
                torch.cat([_slots(info.keys[row], size, device) for row in rows]),
                torch.tensor([info.keys[row].length for row in rows], device=device),
            )
            for size, rows in sorted(by_size.items())
        ]
    found: list[Batch] = info.__dict__["_batches"]
    return found


def _slots(keys: Keys, size: int, device: torch.device) -> Tensor:
    """Slots of the keys, and the last one's again behind them, whose weight is zero."""
    places = torch.arange(size, device=device).clamp_(max=keys.length - 1)
    return keys.start + places if keys.index is None else keys.index.index_select(0, places)
