"""Which layers of a model each pipeline rank holds. Models of one run may have different stages on the same mesh."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Stages:
    """Layers of each of the ``pp * vpp`` model chunks, in the order of the layers; chunk ``c`` lives on pipeline rank
    ``c % pp`` as its virtual stage ``c // pp``."""

    pp: int
    vpp: int
    num_layers: tuple[int, ...]

    @classmethod
    def even(cls, num_layers: int, pp: int, vpp: int = 1) -> Stages:
        """Equally many layers in each chunk; ``num_layers`` must be a multiple of ``pp * vpp``."""
        chunks = pp * vpp
        assert num_layers % chunks == 0, f"{num_layers} layers cannot be divided evenly over {chunks} chunks"
        return cls(pp, vpp, (num_layers // chunks,) * chunks)

    def layers(self, pp_rank: int, virtual_stage: int = 0) -> range:
        """Global numbers, from 0, of the layers of one model chunk."""
        chunk = virtual_stage * self.pp + pp_rank
        ends = list(accumulate(self.num_layers))
        return range(ends[chunk] - self.num_layers[chunk], ends[chunk])

    @property
    def total_layers(self) -> int:
        """Layers of the whole model."""
        return sum(self.num_layers)
