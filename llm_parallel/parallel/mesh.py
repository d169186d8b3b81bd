"""The mesh of processes: pure arithmetic from the sizes of its axes and a rank number, before any process exists.

Rank order is megatron-core's ``tp-cp-dp-pp``: neighbours in rank share a tensor-parallel group, the slowest axis is the
pipeline. All models of a run live on one mesh.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

AXES = ("tp", "cp", "dp", "pp")


@dataclass(frozen=True)
class Coordinates:
    """Position of one rank on every mesh axis, each counted from 0."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class Mesh:
    """Sizes of all mesh axes. ``sequence_parallel``: whether tensor-parallel ranks divide the tokens among them outside
    of the matrix products (Korthikanti et al. 2022, arXiv 2205.05198)."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.dp * self.tp * self.pp * self.cp

    def coordinates(self, rank: int) -> Coordinates:
        """Position of ``rank`` on every axis."""
        position = {}
        for axis in AXES:
            rank, position[axis] = divmod(rank, getattr(self, axis))
        return Coordinates(**position)

    def rank(self, at: Coordinates) -> int:
        """Inverse of ``coordinates``."""
        rank = 0
        for axis in reversed(AXES):
            rank = rank * getattr(self, axis) + getattr(at, axis)
        return rank

    def group(self, rank: int, *axes: str) -> tuple[int, ...]:
        """Ranks that differ from ``rank`` at most along ``axes``, ascending."""
        mine = self.coordinates(rank)
        places = product(*(range(getattr(self, axis)) for axis in axes))
        return tuple(sorted(self.rank(replace(mine, **dict(zip(axes, place)))) for place in places))

    def token_ranges(self, seq_length: int, cp_rank: int) -> tuple[range, ...]:
        """Tokens of a sample held by ``cp_rank``: the whole, or two chunks in zigzag order, so that causal attention
        costs every rank the same (Llama 3, arXiv 2407.21783 section 3.3.2)."""
        if self.cp == 1:
            return (range(seq_length),)
        chunk = seq_length // (2 * self.cp)
        mirror = 2 * self.cp - 1 - cp_rank
        return range(cp_rank * chunk, (cp_rank + 1) * chunk), range(mirror * chunk, (mirror + 1) * chunk)
