"""Tiles of the attention kernels by architecture: the largest that ptxas fits without a spill, with Triton 3.6 and 3.7.

One exception: 128 x 128 forward on sm_90 spills 8 bytes with 3.6 (none with 3.7), outside the loop; half the tile would
cost a third more instructions for the same work. Backward at head dim 256 on sm_90 has only HMMA that fits.
Found by compiling ahead of time; ``llm-parallel bench kernels --aot --op attention`` shows registers and loops of all.
None has been timed on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Queries and keys of a tile, warps, and stages of the pipeline of loads."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Case(NamedTuple):
    """What a tile depends on. plain: no soft cap and no dropout, which want registers; causal: no key to the right."""

    arch: int
    d: int
    element_size: int
    plain: bool = True
    causal: bool = True


def forward_tile(case: Case) -> Tile:
    """Configuration of the forward kernel."""
    if case.element_size == 4:
        return Tile(32, 32, 4, 2) if case.d <= 64 else Tile(16, 32 if case.d <= 128 else 16, 4, 1)
    if case.d > 128:
        return Tile(128, 64, 8, 2) if case.arch >= 90 else Tile(64, 64, 8, 2)
    if case.arch >= 90:
        if case.plain and (case.d == 64 or (case.causal and case.d == 128)):
            return Tile(128, 128, 8, 2)
        return Tile(128, 64, 8, 3 if case.plain else 2)
    if case.plain and case.d <= 64:
        return Tile(128, 64, 8, 3)
    return Tile(128, 32, 8, 3 if case.plain else 2)


def dkdv_tile(case: Case) -> Tile:
    """Configuration of the kernel for dk and dv."""
    if case.element_size == 4:
        return Tile(32, 32, 8, 1) if case.d <= 64 else Tile(16, 16, 8 if case.d <= 128 else 4, 1)
    if case.d > 128:
        return Tile(64, 32, 8, 1) if case.arch >= 90 else Tile(32, 32, 8, 1)
    if case.arch >= 90:
        if not case.plain:
            return Tile(32, 64, 8, 2)
        return Tile(64, 128, 8, 2) if case.d <= 64 else Tile(32, 128, 8, 2)
    return Tile(64, 64, 8, 2)


def dq_tile(case: Case) -> Tile:
    """Configuration of the kernel for dq."""
    if case.element_size == 4:
        return Tile(32, 32, 4, 1) if case.d <= 64 else Tile(16, 32 if case.d <= 128 else 16, 8, 1)
    if case.d > 128:
        return Tile(32, 32, 8, 1) if case.arch >= 90 else Tile(64, 32, 8, 1)
    if case.arch >= 90:
        return Tile(128, 64, 8, 2) if case.plain else Tile(128, 32, 8, 2)
    return Tile(64, 64, 8, 2)
