"""Numbers in 8 bits with a scale for each block of 256: dynamic block-wise quantization (Dettmers et al. 2021, arXiv
2110.02861), with bitsandbytes' values and size of blocks.

Blocks are those of the whole tensor in row-major order, whatever part of it a process holds. A block that a layout cuts
has the scale of all its numbers, over which its holders agree; so every layout computes with the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from llm_parallel.parallel.boxes import Box

BLOCK = 256
STRIP = 1 << 20
"""Numbers that are worked on at once, which bounds what an update needs besides the state."""


@cache
def dynamic_map(signed: bool) -> Tensor:
    """fp32 [256], ascending: the values of the codes (section 2.2 of the paper). Seven decades below 1, each with twice
    as many values as the one below it, 0 and 1. The largest negative value is not -1."""
    values = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1)
        decade = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [decade, -decade] if signed else [decade]
    return torch.cat(values).sort().values


@cache
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The values; the border above each value; and the code of the lowest number that begins with given 16 bits."""
    values = dynamic_map(signed)
    borders = torch.cat(((values[1:] + values[:-1]) / 2, torch.tensor([torch.inf])))
    first = torch.arange(1 << 16, dtype=torch.int32)
    lowest = torch.where(first < 1 << 15, first << 16, first << 16 | 0xFFFF).view(torch.float32)
    begins = torch.bucketize(lowest.nan_to_num(), borders[:-1]).to(torch.uint8)
    return values.to(device), borders.to(device), begins.to(device)


def nearest_codes(x: Tensor, signed: bool) -> Tensor:
    """fp32 numbers in [-1, 1] → uint8 codes of the nearest values. Numbers that begin with the same 16 bits have at
    most one border between them, so one comparison finds the code."""
    _, borders, begins = _tables(signed, x.device)
    codes = begins.index_select(0, (x.contiguous().view(torch.int32).flatten() >> 16) & 0xFFFF).view(x.shape)
    return codes.add_(x > borders.index_select(0, codes.flatten().int()).view(x.shape))


def values_of(codes: Tensor, signed: bool) -> Tensor:
    """uint8 codes → fp32 values, before they are scaled."""
    return _tables(signed, codes.device)[0].index_select(0, codes.flatten().int()).view(codes.shape)


def scales_for(largest: Tensor, largest_negative: Tensor | None, fresh: bool) -> Tensor:
    """Scales of blocks from the largest numbers and the sizes of the largest negative ones (None: there are none).

    A block whose largest number is negative has no code for it, so its scale cannot be read from its values as it can
    elsewhere. The scale is chosen such that it can: values that were made from codes give the same codes and scales
    again. ``fresh``: the numbers were computed, else they may have been made from codes.
    """
    if largest_negative is None:
        return largest
    least = -dynamic_map(True)[0].to(largest.device)  # a tensor: CUDA multiplies by the reciprocal of a number
    negative = largest_negative
    for _ in range(2 if fresh else 0):
        negative = negative * least / least
    if fresh:
        return torch.where(largest_negative > largest, negative, largest)
    return torch.where(largest_negative >= largest, largest_negative / least, largest)


class Strip(NamedTuple):
    """``rows`` pieces of ``width`` numbers each, from number ``start`` of a shard on. Whole blocks: a row is a block,
    and ``at`` is the first one's place among the blocks of the shard. Else ``where`` [rows, n] has the places of the
    blocks that a row meets, and ``skipped`` [rows] the numbers of the first that lie before the row."""

    start: int
    rows: int
    width: int
    at: int
    where: Tensor | None
    skipped: Tensor | None

    @property
    def stop(self) -> int:
        """The first number behind the strip."""
        return self.start + self.rows * self.width

    def of(self, flat: Tensor) -> Tensor:
        """The strip's numbers of a flat shard, as a view [rows, width]."""
        return flat[self.start : self.stop].view(self.rows, self.width)

    def _which(self) -> Tensor:
        assert self.skipped is not None
        return (self.skipped[:, None] + torch.arange(self.width, device=self.skipped.device)) // BLOCK

    def spread(self, scales: Tensor) -> Tensor:
        """Numbers of blocks → of each number, as a tensor that broadcasts to [rows, width]."""
        if self.where is None:
            return scales[self.at : self.at + self.rows, None]
        return scales[self.where].gather(1, self._which())

    def largest_into(self, found: Tensor, x: Tensor) -> None:
        """Raises ``found``, a number for each block of the shard and at least 0, to the largest of x [rows, width]."""
        if self.where is None:
            here = found[self.at : self.at + self.rows]
            torch.maximum(here, x.amax(1), out=here)
            return
        part = torch.zeros(self.where.shape, device=x.device).scatter_reduce_(1, self._which(), x, "amax")
        found.scatter_reduce_(0, self.where.flatten(), part.flatten(), "amax")


class Blocks:
    """The blocks that a shard of a parameter meets.

    ``numbers`` [n]: which blocks of the whole tensor they are, ascending; ``complete`` [n]: whether the shard has all
    of one; ``strips``: the shard's numbers in order."""

    def __init__(self, boxes: Sequence[Box], start: int, stop: int, device: torch.device) -> None:
        pieces = [piece for box in boxes for piece in _pieces(box, start, stop)]
        firsts = [first + stride * torch.arange(rows) for _, rows, _, first, stride in pieces]
        met = [_blocks_met(first, width) for first, (_, _, width, _, _) in zip(firsts, pieces)]
        self.numbers = torch.cat([blocks.flatten() for blocks in met]).unique()
        counted = torch.zeros(len(self.numbers), dtype=torch.int64)
        self.strips: list[Strip] = []
        for (at, rows, width, begin, stride), first, blocks in zip(pieces, firsts, met):
            where, skipped = torch.searchsorted(self.numbers, blocks), first % BLOCK
            for number in range(where.shape[1]):
                low, high = number * BLOCK, (number + 1) * BLOCK
                inside = (skipped + width).clamp(max=high) - skipped.clamp(min=low)
                counted.scatter_add_(0, where[:, number], inside.clamp(min=0))
            if begin % BLOCK == 0 and width == stride == BLOCK:
                self.strips.append(Strip(at, rows, width, int(where[0, 0]), None, None))
            else:
                self.strips.append(Strip(at, rows, width, 0, where.to(device), skipped.to(device)))
        self.strips.sort(key=lambda strip: strip.start)
        whole = prod(boxes[0].whole[boxes[0].stacked :])
        self.complete = counted == (whole - self.numbers * BLOCK).clamp(max=BLOCK)
        assert int(counted.sum()) == stop - start


def _blocks_met(first: Tensor, width: int) -> Tensor:
    """int64 [rows, n]: blocks that rows of ``width`` numbers meet, which begin at the numbers ``first``. Rows that meet
    fewer than others repeat their last."""
    begins, ends = first // BLOCK, (first + width - 1) // BLOCK
    found = begins[:, None] + torch.arange(int((ends - begins).max()) + 1)
    return torch.minimum(found, ends[:, None])


def _pieces(box: Box, start: int, stop: int) -> Iterator[tuple[int, int, int, int, int]]:
    """What a shard of numbers ``start`` to ``stop`` of a parameter has of a box: (place in the shard, rows, numbers of
    a row, number of the first in the whole tensor, numbers from one row's begin to the next's). Whole blocks are rows
    of their own where numbers follow each other in the whole tensor."""
    offset, shape, whole = (part[box.stacked :] for part in (box.offset, box.shape, box.whole))
    columns = prod(shape[1:]) if len(shape) > 1 else 1
    stride = prod(whole[1:]) if len(shape) > 1 else 1
    begin = offset[0] * stride + (offset[1] if len(shape) > 1 else 0)
    low, high = max(start, box.begin) - box.begin, min(stop, box.begin + prod(shape)) - box.begin
    if low >= high:
        return
    shift = box.begin - start
    if columns == stride:
        yield from _cut_at_blocks(low + shift, begin + low, high - low)
        return
    assert len(shape) == 2
    while low < high:
        row, column = divmod(low, columns)
        rows = min((high - low) // columns, max(1, STRIP // columns)) if column == 0 else 0
        width = columns if rows else min(columns - column, high - low)
        yield low + shift, max(rows, 1), width, begin + row * stride + column, stride
        low += max(rows, 1) * width


def _cut_at_blocks(place: int, first: int, count: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Consecutive numbers: what comes before the first whole block, whole blocks, and what comes behind them."""
    head = min(-first % BLOCK, count)
    if head:
        yield place, 1, head, first, head
    place, first, count = place + head, first + head, count - head
    while count >= BLOCK:
        rows = min(count, STRIP) // BLOCK
        yield place, rows, BLOCK, first, BLOCK
        place, first, count = place + rows * BLOCK, first + rows * BLOCK, count - rows * BLOCK
    if count:
        yield place, 1, count, first, count
