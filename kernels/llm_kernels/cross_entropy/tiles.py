"""How cross entropy's kernels divide a shape over programs and threads: a pure function of shape and architecture."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from torch import Tensor

from llm_kernels.device import arch, num_sms


class Tile(NamedTuple):
    """A tile of columns: bytes of logits that a program processes at once, its warps, and programs on one SM."""

    num_bytes: int
    num_warps: int
    per_sm: int


# Four 128-bit loads per thread in flight are 32 to 64 KiB per SM, above the 16 KiB (latency times bandwidth) that an
# H100 needs. sm_80, whose product of latency and bandwidth is smaller, uses the same.
TILES = {80: Tile(16384, 8, 4), 90: Tile(16384, 8, 4)}


def tile(columns: int, itemsize: int, aligned: bool, of_arch: int) -> tuple[int, int, int]:
    """(lanes, elements of a lane, warps) of a tile: up to four 128-bit loads a thread; fewer threads for few columns.

    Rows that do not begin at multiples of 16 bytes are loaded element by element, so that neighbouring threads load
    neighbouring elements.
    """
    table = TILES[90 if of_arch >= 90 else 80]
    vec = 16 // itemsize if aligned else 1
    limit = table.num_bytes // (itemsize if aligned else 8)
    block = min(limit, 1 << (max(columns, 32 * vec) - 1).bit_length())
    return block // vec, vec, max(1, table.num_warps * block // limit)


def is_aligned(rows: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes."""
    return rows.data_ptr() % 16 == 0 and rows.stride(0) * rows.element_size() % 16 == 0


def num_splits(tokens: int, columns: int, block: int, programs: int) -> int:
    """Programs for one token: enough to fill the GPU where there are few tokens, each with at least one block."""
    return max(1, min(programs // max(tokens, 1), columns // block))


class Plan(NamedTuple):
    """Configuration of the forward and backward launches on one shape."""

    lanes: int
    vec: int
    warps: int
    splits: int
    split_columns: int
    backward_grid_columns: int


@cache
def _plan(tokens: int, columns: int, itemsize: int, aligned: bool, of_arch: int, sms: int) -> Plan:
    table = TILES[90 if of_arch >= 90 else 80]
    lanes, vec, warps = tile(columns, itemsize, aligned, of_arch)
    block = lanes * vec
    splits = num_splits(tokens, columns, block, sms * table.per_sm)
    blocks = -(-columns // block)
    return Plan(lanes, vec, warps, splits, -(-blocks // splits) * block, blocks)


def plan_of(logits: Tensor) -> Plan:
    """The plan for logits [M, V]."""
    tokens, columns = logits.shape
    return _plan(tokens, columns, logits.element_size(), is_aligned(logits), arch(logits), num_sms(logits))
