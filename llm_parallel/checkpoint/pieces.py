"""Which part of the whole model's optimizer state a process holds, in terms that every layout shares.

A parameter of the whole model is a box of numbers under megatron-core's checkpoint key; layers are stacked along a
first axis. A process holds sub-boxes of it (tensor and pipeline parallelism), and of each a range in row-major order
(the distributed optimizer). So any layout's pieces are found in any other's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from llm_parallel.parallel.engine import POLICY, Engine, Models
from llm_parallel.parallel.mcore_optimizer import distributed_parts, main_to_model_parameters, shards_of

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
    """A piece and where its numbers live: flat fp32 tensors of weights and both moments."""

    piece: Piece
    planes: tuple[Tensor, Tensor, Tensor]


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
    boxes = _boxes(engine)
    mesh, here = engine.groups.mesh, engine.groups.at
    replica, replicas = here.dp * mesh.cp + here.cp, mesh.dp * mesh.cp
    sharded = bool(distributed_parts(engine.optimizer))
    for shard in shards_of(engine.optimizer):
        start, stop = shard.start, shard.stop
        if divided and shard.main.numel() == shard.parameter.numel() and not sharded:
            start, stop = (shard.parameter.numel() * part // replicas for part in (replica, replica + 1))
        state = shard.inner.state[shard.main]
        planes = [tensor.detach().view(-1) for tensor in (shard.main, state["exp_avg"], state["exp_avg_sq"])]
        for key, offset, shape, begin in boxes[id(shard.parameter)]:
            low, high = max(start, begin), min(stop, begin + prod(shape))
            if low >= high:
                continue
            piece = Piece(prefix + key, offset, shape, low - begin, high - begin, at)
            cut = [plane[low - shard.start : high - shard.start] for plane in planes]
            yield Held(piece, (cut[0], cut[1], cut[2]))
            at += high - low


def _boxes(engine: Engine) -> dict[int, list[tuple[str, tuple[int, ...], tuple[int, ...], int]]]:
    """For each of this process's parameters: key, offset, shape and first number of the boxes that it is made of."""
    found: dict[int, list[tuple[str, tuple[int, ...], tuple[int, ...], int]]] = {}
    for model in engine.models:
        parameters = dict(model.named_parameters())
        by_address = {parameter.data_ptr(): parameter for parameter in parameters.values()}
        for entry in model.sharded_state_dict(metadata={}).values():
            if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
                continue
            parameter = by_address.get(entry.data.data_ptr())
            if parameter is None:
                continue
            parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
            boxes = []
            for part in parts:
                # A part is some whole rows of the parameter, so that its numbers follow each other there.
                assert part.data.is_contiguous()
                begin = part.data.storage_offset() - entry.data.storage_offset()
                shape = (1,) * part.prepend_axis_num + tuple(part.local_shape)
                boxes.append((part.key, tuple(part.global_offset), shape, begin))
            found[id(parameter)] = boxes
    return found


def weights_follow(engine: Engine) -> None:
    """Brings the model's weights up to date with the optimizer's fp32 ones, over all replicas."""
    main_to_model_parameters(engine.optimizer)
    for chunk in engine.chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            chunk.start_param_sync(force_sync=True)
