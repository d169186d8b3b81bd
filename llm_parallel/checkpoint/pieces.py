"""Which part of the whole model's optimizer state a process holds, in terms that every layout shares.

A parameter of the whole model is a box of numbers under megatron-core's checkpoint key; layers are stacked along a
first axis. A process holds sub-boxes of it (tensor and pipeline parallelism), and of each a range in row-major order
(the distributed optimizer). So any layout's pieces are found in any other's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from llm_parallel.parallel.boxes import boxes_of
from llm_parallel.parallel.engine import POLICY, Engine, Models
from llm_parallel.parallel.mcore_optimizer import (
    Shard,
    distributed_parts,
    main_to_model_parameters,
    moments_of,
    shards_of,
)

MODEL_END = "/"
"""Separates a model's name from a parameter's key; the policy's keys have no name before them."""


class Piece(NamedTuple):
    """Numbers ``start`` to ``stop``, in row-major order, of the box at ``offset`` with ``shape`` in parameter ``key``;
    they stand from ``at`` on in a plane of the file. The key begins with the model's name, if it is not the policy."""

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    stop: int
    at: int

    @classmethod
    def read(cls, values: Sequence[Any]) -> Piece:
        """A piece from its JSON list."""
        key, offset, shape, start, stop, at = values
        return cls(key, tuple(offset), tuple(shape), start, stop, at)

    @property
    def tensor(self) -> str:
        """The parameter's key within its model."""
        return self.key.rpartition(MODEL_END)[2]

    @property
    def box(self) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """The box that this is a range of."""
        return self.key, self.offset, self.shape


class Held(NamedTuple):
    """A piece and where its numbers live: numbers ``low`` to ``high`` of a shard."""

    piece: Piece
    shard: Shard
    low: int
    high: int

    @property
    def planes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Flat fp32 tensors of weights and both moments: the moments themselves, or what those in 8 bits stand for."""
        weights = self.shard.main.detach().view(-1)[self.low : self.high]
        return weights, *moments_of(self.shard, self.low, self.high)


def held_pieces(models: Models, divided: bool) -> list[Held]:
    """What this process holds of all models that have an optimizer, in the order of the file. Models without one do not
    change.

    The optimizers' moments must be allocated. Without the distributed optimizer all data-parallel replicas hold the
    same; ``divided`` gives each its part of it, else each has the whole.
    """
    found: list[Held] = []
    taken = 0
    for name, model in models.items():
        if isinstance(model, Engine):
            prefix = "" if name == POLICY else name + MODEL_END
            for held in _held_by(model, prefix, divided, taken):
                found.append(held)
                taken += held.piece.stop - held.piece.start
    return found


def _held_by(engine: Engine, prefix: str, divided: bool, at: int) -> Iterator[Held]:
    """What this process holds of one model, from ``at`` on in the file."""
    boxes = boxes_of(engine.models)
    mesh, here = engine.groups.mesh, engine.groups.at
    replica, replicas = here.dp * mesh.cp + here.cp, mesh.dp * mesh.cp
    sharded = bool(distributed_parts(engine.optimizer))
    for shard in shards_of(engine.optimizer):
        start, stop = shard.start, shard.stop
        if divided and shard.main.numel() == shard.parameter.numel() and not sharded:
            start, stop = (shard.parameter.numel() * part // replicas for part in (replica, replica + 1))
        for box in boxes[id(shard.parameter)]:
            low, high = max(start, box.begin), min(stop, box.begin + prod(box.shape))
            if low >= high:
                continue
            piece = Piece(prefix + box.key, box.offset, box.shape, low - box.begin, high - box.begin, at)
            yield Held(piece, shard, low - shard.start, high - shard.start)
            at += high - low


def weights_follow(engine: Engine) -> None:
    """Brings the model's weights up to date with the optimizer's fp32 ones, over all replicas."""
    main_to_model_parameters(engine.optimizer)
    for chunk in engine.chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            chunk.start_param_sync(force_sync=True)
