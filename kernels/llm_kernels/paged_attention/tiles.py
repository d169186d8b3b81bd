"""Tiles of paged attention, and how many keys one program takes.

A tile has rows and keys. A row is one query of one query head of a group, so that all heads of a group share one load
of the group's keys and values. Small tiles serve requests with few rows (decoding), whose time is that of loading keys
and values; large tiles serve chunks of a prompt, whose time is that of the products. The tiles were found by compiling
ahead of time, by Triton 3.7.1. Three stages of loads mean that those of the next tile are on their way while one is
computed, since the addresses of keys are loaded too. None has been timed on a GPU yet.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

SHARE = 96
"""Keys of a split for each row, in 2-byte elements. A split writes and reads 8 bytes for each row and head dim, and
loads 4 for each key and head dim: at most 2.2 % more bytes."""
LEAST_SPLIT = 256
MOST_TILES = 8
"""Requests with more large tiles have programs enough without splits, and their splits would need much memory."""


class Tile(NamedTuple):
    """Rows and keys of a tile, warps of a program, and stages of the pipeline of loads."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


class Heads(NamedTuple):
    """What tiles depend on. members: query heads of a group; element_size: of the cache, in bytes."""

    members: int
    d: int
    element_size: int
    arch: int


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


@lru_cache(maxsize=64)
def small_tile(heads: Heads) -> Tile:
    """For as many rows as one query has, and at least the 16 of a tensor-core product. A query with more rows than the
    largest tile has several, each of which loads the keys."""
    most = large_tile(heads).rows
    rows = min(_padded(heads.members), most)
    if rows == most:
        return large_tile(heads)
    if heads.element_size == 4:
        return Tile(rows, 32, 4, 3)
    if heads.d <= 64:
        return Tile(rows, 128, 4, 3)
    return Tile(rows, 64 if heads.d <= 128 else 32, 4, 3)


@lru_cache(maxsize=64)
def large_tile(heads: Heads) -> Tile:
    """For chunks of a prompt. fp32 is computed as three products of tf32, whose operands fill the registers: at head
    dims above 128 the queries' spill some 100 bytes before the loop."""
    if heads.element_size == 4:
        return Tile(16, 16, 8, 1) if heads.d > 128 else Tile(32, 32, 8, 2)
    if heads.d > 128:
        return Tile(64, 32, 8, 3)
    return Tile(64, 64, 4 if heads.d <= 64 or heads.arch >= 90 else 8, 3)


def split_keys(rows: int, heads: Heads, tile: Tile) -> int:
    """Keys that one program takes of a request with so many rows in a tile. It depends on nothing else, so that the
    order of a request's sums depends neither on other requests nor on the number of multiprocessors."""
    keys = max(SHARE * rows * 2 // heads.element_size, LEAST_SPLIT)
    return -(-keys // tile.keys) * tile.keys
