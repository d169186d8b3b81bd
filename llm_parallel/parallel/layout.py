"""Where everything lives: pure arithmetic from a layout and a rank number, before any process exists.

Rank order is megatron-core's ``tp-cp-dp-pp``: neighbours in rank share a tensor-parallel group, the slowest axis is the
pipeline. Everything that must agree (groups, data order, checkpoint shards, planner) asks this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, product

from llm_parallel.config.tree import RunConfig

AXES = ("tp", "cp", "dp", "pp")


@dataclass(frozen=True)
class Coordinates:
    """Position of one rank on every mesh axis, each counted from 0."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class Layout:
    """Sizes of all mesh axes and how layers, samples and tokens are divided over them.

    ``stage_layers`` has one entry for each of the ``pp * vpp`` model chunks, in the order of the layers; chunk ``c``
    lives on pipeline rank ``c % pp`` as its virtual stage ``c // pp``.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    micro_batch_size: int = 1
    stage_layers: tuple[int, ...] = (1,)

    @classmethod
    def from_config(cls, config: RunConfig, world_size: int | None = None) -> Layout:
        """Layout of a checked configuration; ``world_size`` decides ``dp`` where the configuration leaves it open."""
        parallel = config.parallel
        model_size = parallel.tp * parallel.pp * parallel.cp
        dp = parallel.dp or (world_size // model_size if world_size else 1)
        chunks = parallel.pp * parallel.vpp
        layers = parallel.stage_layers or (config.model.num_layers // chunks,) * chunks
        sequence_parallel = parallel.divides_sequence
        return cls(
            dp=dp,
            tp=parallel.tp,
            pp=parallel.pp,
            vpp=parallel.vpp,
            cp=parallel.cp,
            sequence_parallel=sequence_parallel,
            micro_batch_size=config.train.micro_batch_size,
            stage_layers=tuple(layers),
        )

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

    def layers(self, pp_rank: int, virtual_stage: int = 0) -> range:
        """Global numbers, from 0, of the layers of one model chunk."""
        chunk = virtual_stage * self.pp + pp_rank
        ends = list(accumulate(self.stage_layers))
        return range(ends[chunk] - self.stage_layers[chunk], ends[chunk])

    def num_micro_batches(self, global_batch_size: int, dp_rank: int = 0) -> int:
        """Micro batches of replica ``dp_rank`` in one optimizer step. Where they do not divide evenly, as after the
        loss of a replica, the first replicas take one more each."""
        total = global_batch_size // self.micro_batch_size
        return total // self.dp + (dp_rank < total % self.dp)

    def micro_batches(self, first_sample: int, global_batch_size: int, dp_rank: int) -> Iterator[range]:
        """Global sample numbers of each micro batch of replica ``dp_rank`` in the step that begins at
        ``first_sample``. The step's samples are ``first_sample … first_sample + global_batch_size - 1`` in any layout.
        """
        for micro_batch in range(self.num_micro_batches(global_batch_size, dp_rank)):
            start = first_sample + (micro_batch * self.dp + dp_rank) * self.micro_batch_size
            yield range(start, start + self.micro_batch_size)

    def token_ranges(self, seq_length: int, cp_rank: int) -> tuple[range, ...]:
        """Tokens of a sample held by ``cp_rank``: the whole, or two chunks in zigzag order, so that causal attention
        costs every rank the same (Llama 3, arXiv 2407.21783 section 3.3.2)."""
        if self.cp == 1:
            return (range(seq_length),)
        chunk = seq_length // (2 * self.cp)
        mirror = 2 * self.cp - 1 - cp_rank
        return range(cp_rank * chunk, (cp_rank + 1) * chunk), range(mirror * chunk, (mirror + 1) * chunk)

    def describe(self) -> str:
        """One line for people: ``TP 2 x PP 2 (1F1B, layers 2+2) x DP 1``."""
        parts = [f"TP {self.tp}" + (" + SP" if self.sequence_parallel else "")]
        if self.cp > 1:
            parts.append(f"CP {self.cp}")
        schedule = f"interleaved x{self.vpp}" if self.vpp > 1 else "1F1B"
        layers = "+".join(map(str, self.stage_layers))
        parts.append(f"PP {self.pp}" + (f" ({schedule}, layers {layers})" if self.pp > 1 else ""))
        parts.append(f"DP {self.dp}")
        return " x ".join(parts)
