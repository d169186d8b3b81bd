"""The work of one pass of paged attention as tables: which program computes which rows over which keys.

The host knows the requests and makes the tables once for all layers. All of them lie in one tensor, so that one copy
brings them to the device, and a captured CUDA graph reads them from one buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llm_kernels.paged_attention.tiles import MOST_TILES, Heads, Tile, large_tile, small_tile, split_keys

WORK, MERGE, PART = 5, 4, 3
"""Columns of the tables."""
ALIGNED = 4
"""Tables begin at multiples of 16 bytes, so that every plan runs the same compiled kernel."""
Pages = np.ndarray


@dataclass(frozen=True)
class Launch:
    """What programs with tiles of one kind do.

    work: int32 [n, 5] of (part, first row, first key, end of the keys, slot); a program that has all keys of its rows
    has slot -1 and writes the result, the others write sums into their slot; part -1 is padding. merges: int32 [r, 4]
    of (part, first row, first slot, number of slots), rows whose sums are merged. slots: of all; rows: the most rows of
    a tile that are used.
    """

    work: Tensor
    merges: Tensor
    slots: int
    rows: int


@dataclass(frozen=True)
class Plan:
    """Requests of a pass. parts: int32 [p, 3] of (first row of q, number of queries, number of keys); pages: int32
    [p, most pages], the pages of each request's keys in order; covers: every row of q belongs to a part."""

    parts: Tensor
    pages: Tensor
    page_tokens: int
    small: Launch
    large: Launch
    covers: bool

    @staticmethod
    def make(
        counts: Sequence[int],
        lengths: Sequence[int],
        pages: Sequence[Sequence[int] | Pages],
        page_tokens: int,
        heads: Heads,
        device: torch.device | str,
    ) -> Plan:
        """The plan of requests whose queries lie one after another. counts: their queries, which are the last of their
        tokens; lengths: all their keys; pages: those that hold these keys. Raises ValueError for a request without
        queries, with fewer keys than queries, or with too few pages."""
        return Tables.make(counts, lengths, pages, page_tokens, heads).to(device)


@dataclass(frozen=True)
class Tables:
    """A plan on the host: int32 arrays as in ``Plan`` and ``Launch``, and (slots, rows) of both launches."""

    arrays: tuple[np.ndarray, ...]
    sizes: tuple[tuple[int, int], tuple[int, int]]
    page_tokens: int
    covers: bool = True

    @staticmethod
    def make(
        counts: Sequence[int],
        lengths: Sequence[int],
        pages: Sequence[Sequence[int] | Pages],
        page_tokens: int,
        heads: Heads,
        rows: int | None = None,
    ) -> Tables:
        """See ``Plan.make``. rows: of q, if there are more than the requests have; the others get zeros."""
        _check(counts, lengths, pages, page_tokens)
        count, length = (np.asarray(x, dtype=np.int32) for x in (counts, lengths))
        parts = np.stack([np.cumsum(count, dtype=np.int32) - count, count, length], 1) if len(count) else _empty(PART)
        width = max(map(len, pages), default=0)
        table = np.zeros((len(count), width), dtype=np.int32)
        for row, of in zip(table, pages):
            row[: len(of)] = of
        tiles = small_tile(heads), large_tile(heads)
        small = count * heads.members <= tiles[0].rows
        arrays: list[np.ndarray] = [parts, table]
        sizes = []
        for tile, chosen in zip(tiles, (small, ~small)):
            work, merges, slots, rows = _launch(np.flatnonzero(chosen), parts, heads, tile)
            arrays += [work, merges]
            sizes.append((slots, rows))
        return Tables(tuple(arrays), (sizes[0], sizes[1]), page_tokens, rows in (None, int(count.sum())))

    def packed(self) -> np.ndarray:
        """All arrays one after another, each at a multiple of ``ALIGNED``."""
        out = np.zeros(sum(map(_room, self.arrays)), dtype=np.int32)
        start = 0
        for array in self.arrays:
            out[start : start + array.size] = array.ravel()
            start += _room(array)
        return out

    def to(self, device: torch.device | str) -> Plan:
        """The plan on a device. The host does not wait for the copy."""
        numbers, device = torch.from_numpy(self.packed()), torch.device(device)
        return self.on(numbers if device.type == "cpu" else numbers.pin_memory().to(device, non_blocking=True))

    def on(self, numbers: Tensor) -> Plan:
        """The plan whose tables are views of ``numbers``, which holds ``packed()``."""
        views, start = [], 0
        for array in self.arrays:
            views.append(numbers[start : start + array.size].view(array.shape))
            start += _room(array)
        parts, pages, *tables = views
        small, large = (Launch(tables[2 * i], tables[2 * i + 1], *self.sizes[i]) for i in range(2))
        return Plan(parts, pages, self.page_tokens, small, large, self.covers)


def _room(array: np.ndarray) -> int:
    return -(-array.size // ALIGNED) * ALIGNED


def _empty(columns: int) -> np.ndarray:
    return np.zeros((0, columns), dtype=np.int32)


def _check(
    counts: Sequence[int], lengths: Sequence[int], pages: Sequence[Sequence[int] | Pages], page_tokens: int
) -> None:
    if not len(counts) == len(lengths) == len(pages):
        raise ValueError(f"counts, lengths and pages are of {len(counts)}, {len(lengths)} and {len(pages)} requests")
    if page_tokens < 1:
        raise ValueError(f"page_tokens = {page_tokens} must be at least 1")
    for number, (count, length, of) in enumerate(zip(counts, lengths, pages)):
        if not 1 <= count <= length:
            raise ValueError(f"request {number} has {count} queries and {length} keys, not 1 <= queries <= keys")
        if len(of) * page_tokens < length:
            raise ValueError(f"request {number} has {length} keys and {len(of)} pages of {page_tokens} tokens")


def _launch(chosen: np.ndarray, parts: np.ndarray, heads: Heads, tile: Tile) -> tuple[np.ndarray, np.ndarray, int, int]:
    """(work, merges, slots, rows) of the chosen parts."""
    if not len(chosen):
        return _empty(WORK), _empty(MERGE), 0, 0
    members = heads.members
    rows = parts[chosen, 1] * members
    tiles = -(-rows // tile.rows)
    # One line for each tile of rows.
    part, number = np.repeat(chosen, tiles), _counted(tiles)
    first = number * tile.rows
    used = np.minimum(np.repeat(rows, tiles) - first, tile.rows)
    last_query = (first + used - 1) // members
    ends = parts[part, 2] - parts[part, 1] + last_query + 1
    split = np.array([split_keys(int(r), heads, tile) for r in np.minimum(rows, tile.rows)])
    split = np.repeat(np.where(tiles > MOST_TILES, parts[chosen, 2], split), tiles)
    splits = -(-ends // split)
    # One line for each split of a tile.
    slots_before = np.cumsum(np.where(splits > 1, splits, 0)) - np.where(splits > 1, splits, 0)
    number = _counted(splits)
    at, size, end, slot, several = (np.repeat(x, splits) for x in (first, split, ends, slots_before, splits > 1))
    begin = number * size
    columns = np.repeat(part, splits), at, begin, np.minimum(begin + size, end), np.where(several, slot + number, -1)
    work = np.stack(columns, 1).astype(np.int32)
    merges = np.stack([part, first, slots_before, splits], 1)[splits > 1].astype(np.int32)
    return work, merges, int(splits[splits > 1].sum()), int(used.max())


def _counted(sizes: np.ndarray) -> np.ndarray:
    """0, 1, … up to each size, one after another."""
    starts = np.cumsum(sizes) - sizes
    return np.arange(int(sizes.sum())) - np.repeat(starts, sizes)
