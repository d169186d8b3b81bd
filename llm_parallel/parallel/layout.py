"""How a run is divided: the mesh of its processes, the pipeline stages of its model, and the samples of a step.

Everything that must agree about a run (groups, data order, checkpoint shards, planner, launcher) asks this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llm_parallel.config.tree import RunConfig
from llm_parallel.parallel.mesh import AXES, Coordinates, Mesh
from llm_parallel.parallel.stages import Stages

__all__ = ["AXES", "Coordinates", "Layout"]


@dataclass(frozen=True)
class Layout(Mesh):
    """A mesh, the stages of the run's model on it, and the samples of a micro batch. ``stage_layers`` has one entry for
    each of the ``pp * vpp`` model chunks (see ``Stages``)."""

    vpp: int = 1
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
        return cls(
            dp=dp,
            tp=parallel.tp,
            pp=parallel.pp,
            vpp=parallel.vpp,
            cp=parallel.cp,
            sequence_parallel=parallel.divides_sequence,
            micro_batch_size=config.train.micro_batch_size,
            stage_layers=tuple(layers),
        )

    @property
    def mesh(self) -> Mesh:
        """The mesh alone."""
        return Mesh(self.dp, self.tp, self.pp, self.cp, self.sequence_parallel)

    @property
    def stages(self) -> Stages:
        """The stages of the run's model."""
        return Stages(self.pp, self.vpp, self.stage_layers)

    def layers(self, pp_rank: int, virtual_stage: int = 0) -> range:
        """Global numbers, from 0, of the layers of one chunk of the run's model."""
        return self.stages.layers(pp_rank, virtual_stage)

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
