"""The key/value cache of a process, what one pass through the model needs to know, and attention over it.

Shapes: T tokens of a pass, N query heads and G key/value groups of this process, M = N/G, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_kernels.attention.ref import Segment
from llm_kernels.attention.ref import attention as attention_by_segment
from llm_kernels.paged_attention.op import paged_attention
from llm_kernels.paged_attention.plan import Plan
from llm_parallel.config.tree import ModelConfig
from llm_parallel.generate.extension import MOST_ROWS
from llm_parallel.generate.paging import Paging, backend_of
from llm_parallel.generate.scheduler import Part
from llm_parallel.generate.seen import PageArrays, Seen
from llm_parallel.model.gpt import LlamaModel
from llm_parallel.model.rotary import frequencies


class LayerCache:
    """Keys (rotated) and values of one layer, [slots, G, D]; page ``p`` has the slots from ``p * page_tokens`` on."""

    def __init__(
        self, slots: int, groups: int, head_dim: int, dtype: torch.dtype, device: torch.device, page_tokens: int
    ) -> None:
        self.page_tokens = page_tokens
        self.k, self.v = (torch.empty(slots, groups, head_dim, dtype=dtype, device=device) for _ in range(2))

    @staticmethod
    def of_chunk(model: LlamaModel, num_pages: int, page_tokens: int) -> list[LayerCache]:
        """Caches of a model chunk's layers."""
        config, mesh = model.model_config, model.groups.mesh
        groups = max(config.num_query_groups // mesh.tp, 1)
        device, dtype = model.groups.platform.device, model.numerics.dtype
        slots, layers = num_pages * page_tokens, model.decoder.layers
        return [LayerCache(slots, groups, config.kv_channels, dtype, device, page_tokens) for _ in layers]

    @staticmethod
    def bytes_per_token(models: Sequence[LlamaModel]) -> int:
        """Memory that one token takes in this process's layers."""
        config, mesh = models[0].model_config, models[0].groups.mesh
        groups = max(config.num_query_groups // mesh.tp, 1)
        layers = sum(len(model.decoder.layers) for model in models)
        return 2 * layers * groups * config.kv_channels * models[0].numerics.dtype.itemsize


@dataclass(frozen=True)
class Keys:
    """Where the keys of one part lie, oldest first: slots ``start`` to ``start + length``, or those in ``index``."""

    length: int
    start: int = 0
    index: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """Keys or values [length, G, D] of one layer; a view where they lie in one piece."""
        if self.index is None:
            return x[self.start : self.start + self.length]
        return x.index_select(0, self.index)


@dataclass(frozen=True)
class Pass:
    """One pass: single tokens first, then chunks.

    tokens: int64 [T]; slots: where the keys of each go; cos, sin: fp32 [T, 1, 1, D], the sines with the sign of the
    rotation; keys: those that each part attends to; counts: tokens of each part; last_rows: the rows from which tokens
    are chosen; plan: the tables of the paged attention kernel instead of ``keys``, on devices that run it; seen: those
    of the C++ extension, for all tokens if there are few of them, else for the single tokens, whose ``keys`` are empty.
    """

    tokens: Tensor
    slots: Tensor
    cos: Tensor
    sin: Tensor
    keys: tuple[Keys, ...]
    counts: tuple[int, ...]
    last_rows: Tensor
    plan: Plan | None
    seen: Seen | None = None

    @property
    def is_small(self) -> bool:
        """Whether the extension can compute all of the pass."""
        return self.seen is not None and len(self.tokens) <= MOST_ROWS

    @property
    def num_singles(self) -> int:
        """Parts of one token; they are the first ones."""
        return sum(count == 1 for count in self.counts)


class Rotation:
    """Cosines and sines of tokens. Where frequencies depend on the length of the sample (``dynamic`` and ``longrope``),
    a token of the prompt takes that of the prompt, and a written one that of the text up to itself, as in transformers;
    these keys depend on the prompt's length, which ``salt`` tells apart."""

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        self._model, self._device = model, device
        scaling = model.rope_scaling
        self._depends = scaling is not None and scaling.kind in ("dynamic", "longrope")
        self._frequencies: dict[int, Tensor] = {}
        self._table: tuple[Tensor, Tensor] | None = None

    def salt(self, prompt_length: int) -> bytes:
        """Bytes that differ where the keys of equal tokens do."""
        return self._regime(prompt_length).to_bytes(8, "little") if self._depends else b""

    def of(self, parts: Sequence[Part], positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines, fp32 [T, 1, 1, D], of the tokens of these parts."""
        if not self._depends:
            cos, sin = self._reaching(max(part.start + part.count for part in parts))
            return cos.index_select(0, positions), sin.index_select(0, positions)
        rows = [
            self._of_regime(self._regime(max(len(part.sequence.request.prompt), position + 1)))
            for part in parts
            for position in range(part.start, part.start + part.count)
        ]
        return _cos_sin(positions.float().unsqueeze(1) * torch.stack(rows))

    def _regime(self, length: int) -> int:
        """Lengths with the same frequencies have the same number."""
        scaling = self._model.rope_scaling
        assert scaling is not None
        if length <= scaling.original_max_position:
            return 0
        return length if scaling.kind == "dynamic" else scaling.original_max_position + 1

    def _of_regime(self, regime: int) -> Tensor:
        if regime not in self._frequencies:
            if len(self._frequencies) > 4096:
                self._frequencies.clear()
            self._frequencies[regime] = frequencies(self._model, regime, self._device)
        return self._frequencies[regime]

    def _reaching(self, length: int) -> tuple[Tensor, Tensor]:
        if self._table is None or self._table[0].shape[0] < length:
            size = 1 << max(length - 1, 255).bit_length()
            positions = torch.arange(size, device=self._device, dtype=torch.float32).unsqueeze(1)
            self._table = _cos_sin(positions * frequencies(self._model, 1, self._device))
        return self._table


def _cos_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1)[:, None, None], torch.cat((-sin, sin), -1)[:, None, None]


def make_pass(
    parts: Sequence[Part],
    page_tokens: int,
    rotation: Rotation,
    device: torch.device,
    paging: Paging | PageArrays | None,
) -> Pass:
    """The pass of a plan. ``paging``: where attention is the paged kernel or the C++ extension's."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for part in parts:
        end = part.start + part.count
        tokens += part.sequence.tokens[part.start : end]
        positions += range(part.start, end)
        pages = part.sequence.pages
        slots += [pages[at // page_tokens] * page_tokens + at % page_tokens for at in range(part.start, end)]
    numbers = torch.tensor([tokens, positions, slots]).to(device)
    counts = tuple(part.count for part in parts)
    ends = np.cumsum(counts)
    last = torch.tensor([int(end) - 1 for end, part in zip(ends, parts) if part.chooses], dtype=torch.int64)
    cos, sin = rotation.of(parts, numbers[1])
    plan, seen, keys = None, None, list[Keys]()
    if isinstance(paging, Paging):
        plan = paging.plan(parts, page_tokens)
    elif paging is not None and len(tokens) <= MOST_ROWS:
        seen = Seen.of(parts, paging)
    else:
        if paging is not None and counts[0] == 1:
            singles = [part for part in parts if part.count == 1]
            seen, keys = Seen.of(singles, paging), [Keys(0)] * len(singles)
        keys += [_keys(part, page_tokens, device) for part in parts[len(keys) :]]
    return Pass(numbers[0], numbers[2], cos, sin, tuple(keys), counts, last.to(device), plan, seen)


def _keys(part: Part, page_tokens: int, device: torch.device) -> Keys:
    length, pages = part.start + part.count, part.sequence.pages
    if pages == list(range(pages[0], pages[0] + len(pages))):
        return Keys(length, pages[0] * page_tokens)
    slots = np.asarray(pages)[:, None] * page_tokens + np.arange(page_tokens)
    return Keys(length, index=torch.from_numpy(slots.ravel()[:length].copy()).to(device))


@dataclass(frozen=True)
class AttentionOptions:
    """scale of the scores; left: keys before its own that a query sees, -1 for all; softcap: of the scores, 0 for none;
    backend: of the operator."""

    scale: float
    left: int
    softcap: float
    backend: str


def attend(q_TGMD: Tensor, cache: LayerCache, info: Pass, options: AttentionOptions, after: int = 0) -> Tensor:
    """Attention of all parts over the cache, in which their own keys are stored already → [T, N·D]; of those after the
    first ``after`` single tokens alone if there are such."""
    if info.plan is not None:
        return paged_attention(
            q_TGMD.flatten(1, 2), cache.k, cache.v, info.plan, scale=options.scale, left=options.left,
            softcap=options.softcap, backend=backend_of(options.backend),
        ).flatten(1)  # fmt: skip
    found, row = [], after
    for keys, count in zip(info.keys[after:], info.counts[after:]):
        k_LGD, v_LGD = keys.of(cache.k), keys.of(cache.v)
        q = q_TGMD[row : row + count]
        if count == 1 and not options.softcap:
            found.append(_single(q, k_LGD, v_LGD, options))
        else:
            found.append(_chunk(q, k_LGD, v_LGD, options))
        row += count
    return found[0] if len(found) == 1 else torch.cat(found)


def _single(q_1GMD: Tensor, k_LGD: Tensor, v_LGD: Tensor, options: AttentionOptions) -> Tensor:
    """One query of each head. The heads of a group are queries that see the same keys, so none is repeated."""
    if 0 <= options.left < k_LGD.shape[0] - 1:
        k_LGD, v_LGD = k_LGD[-options.left - 1 :], v_LGD[-options.left - 1 :]
    k, v = k_LGD.transpose(0, 1).unsqueeze(0), v_LGD.transpose(0, 1).unsqueeze(0)
    return F.scaled_dot_product_attention(q_1GMD, k, v, scale=options.scale).reshape(1, -1)


def _chunk(q_nGMD: Tensor, k_LGD: Tensor, v_LGD: Tensor, options: AttentionOptions) -> Tensor:
    count, length = q_nGMD.shape[0], k_LGD.shape[0]
    q, k, v = q_nGMD.flatten(1, 2).unsqueeze(1), k_LGD.unsqueeze(1), v_LGD.unsqueeze(1)
    whole = ((Segment(0, count, 0, length),),)
    return attention_by_segment(q, k, v, whole, options.scale, options.left, options.softcap).flatten(1)
