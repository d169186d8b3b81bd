"""Tiles of the attention kernels by architecture: the largest ones that compile without a spill in Triton 3.6 and 3.7.

On sm_90 the kernel for dk and dv loads three stages ahead: with two stages, ptxas can't tell its accumulators from
those of the step before and puts a wait after every HGMMA. At head dim 256 that kernel uses HMMA on sm_90, too: HGMMA
would need tiles of 64 keys, whose two accumulators fill the registers unless a tile has only 16 queries, and then a
pair of query and key costs 2.2 times as many instructions.
The tiles were found by compiling ahead of time; ``llm-parallel bench kernels --aot --op attention`` shows registers and
loops of every kernel. None has been timed on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Queries and keys of a tile, warps of a program, and stages of the pipeline of loads."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Case(NamedTuple):
    """What the choice of a tile depends on. Soft cap and dropout need registers. causal: no query sees a key to its
    right."""

    arch: int
    d: int
    element_size: int
    softcap: bool = False
    dropout: bool = False
    causal: bool = True

    @property
    def plain(self) -> bool:
        """Whether scores become weights by scale and mask alone."""
        return not (self.softcap or self.dropout)


def forward_tile(case: Case) -> Tile:
    """Tile of the forward kernel."""
    if case.element_size == 4:
        return Tile(32, 32, 4, 2) if case.d <= 64 else Tile(16, 32 if case.d <= 128 else 16, 4, 1)
    if case.arch >= 90:
        if case.d > 128:
            return Tile(128, 32 if case.dropout else 64, 8, 2)
        if not case.dropout and (case.d <= 64 or (case.plain and case.causal and case.d == 128)):
            return Tile(128, 128, 8, 2)
        return Tile(128, 64, 8, 3)
    if case.d > 128:
        return Tile(64, 64, 8, 2)
    if 64 < case.d < 128:  # the masks of padded columns need registers
        return Tile(128, 32, 8, 3 if case.plain else 2)
    return Tile(128, 64, 8, 3 if case.d <= 64 else 2)


def dkdv_tile(case: Case) -> Tile:
    """Tile of the kernel for dk and dv."""
    if case.element_size == 4:
        return Tile(32, 32, 8, 1) if case.d <= 64 else Tile(16, 16, 8 if case.d <= 128 else 4, 1)
    if case.d > 128:
        return Tile(64, 32, 8, 1) if case.arch >= 90 else Tile(32, 32, 8, 1)
    if case.arch >= 90:
        return Tile(64 if case.d <= 64 and case.plain else 32, 128, 8, 3)
    return Tile(64, 64, 8, 2)


def dq_tile(case: Case) -> Tile:
    """Tile of the kernel for dq."""
    if case.element_size == 4:
        if case.d <= 64:
            return Tile(32 if case.arch >= 90 else 16, 32, 4, 1)
        return Tile(16, 32 if case.d <= 128 else 16, 8, 1)
    if case.arch >= 90:
        if case.d > 128:
            return Tile(128, 32, 8, 2)
        return Tile(128, 128 if case.d <= 64 and case.plain else 64, 8, 2)
    return Tile(64, 32, 8, 1) if case.d > 128 else Tile(64, 64, 8, 2)
