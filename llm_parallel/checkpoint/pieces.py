"""Which part of the whole model's optimizer state a process holds, in terms that every layout shares.

A parameter of the whole model is a box of numbers under megatron-core's checkpoint key; layers are stacked along a
first axis. A process holds sub-boxes of it (tensor and pipeline parallelism), and of each a range in row-major order
(the distributed optimizer). So any layout's pieces are found in any other's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

from llm_parallel.parallel.wrap import Engine


class Piece(NamedTuple):
    """Numbers ``start`` to ``stop``, in row-major order, of the box at ``offset`` with ``shape`` in parameter ``key``;
    they stand from ``at`` on in a plane of the file."""

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
    def box(self) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """The box that this is a range of."""
        return self.key, self.offset, self.shape


class Held(NamedTuple):
    """A piece and where its numbers live: flat fp32 tensors of weights and both moments."""

    piece: Piece
    planes: tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class _Shard:
    """Numbers ``start`` to ``stop`` of a process's own parameter, held in ``main``, whose optimizer is ``inner``."""

    parameter: Tensor
    main: Tensor
    start: int
    stop: int
    inner: Any


def optimizer_steps(engine: Engine) -> int:
    """Optimizer steps that were applied; skipped ones do not count."""
    for part in engine.optimizer.chained_optimizers:
        for values in part.optimizer.state.values():
            if "step" in values:
                return int(values["step"])
    return 0


def set_optimizer_steps(engine: Engine, steps: int) -> None:
    """Inverse of ``optimizer_steps``."""
    for part in engine.optimizer.chained_optimizers:
        for values in part.optimizer.state.values():
            if "step" in values:
                values["step"] = torch.full_like(values["step"], steps)
        for group in part.optimizer.param_groups:
            if "step" in group:  # apex counts once for all
                group["step"] = steps


def held_pieces(engine: Engine, divided: bool) -> list[Held]:
    """What this process holds, in the order of the file.

    The optimizer's moments must be allocated. Without the distributed optimizer all data-parallel replicas hold the
    same; ``divided`` gives each its part of it, else each has the whole.
    """
    boxes = _boxes(engine)
    layout, at = engine.groups.layout, engine.groups.at
    replica, replicas = at.dp * layout.cp + at.cp, layout.dp * layout.cp
    found: list[Held] = []
    taken = 0
    for shard in _shards(engine):
        start, stop = shard.start, shard.stop
        if divided and shard.main.numel() == shard.parameter.numel() and not _is_sharded(engine):
            start, stop = (shard.parameter.numel() * part // replicas for part in (replica, replica + 1))
        state = shard.inner.state[shard.main]
        planes = [tensor.detach().view(-1) for tensor in (shard.main, state["exp_avg"], state["exp_avg_sq"])]
        for key, offset, shape, begin in boxes[id(shard.parameter)]:
            low, high = max(start, begin), min(stop, begin + prod(shape))
            if low >= high:
                continue
            piece = Piece(key, offset, shape, low - begin, high - begin, taken)
            cut = [plane[low - shard.start : high - shard.start] for plane in planes]
            found.append(Held(piece, (cut[0], cut[1], cut[2])))
            taken += high - low
    return found


def _is_sharded(engine: Engine) -> bool:
    return any(isinstance(part, DistributedOptimizer) for part in engine.optimizer.chained_optimizers)


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


def _shards(engine: Engine) -> Iterator[_Shard]:
    for part in engine.optimizer.chained_optimizers:
        inner = part.optimizer
        if isinstance(part, DistributedOptimizer):
            pairs = zip(
                [*part.model_fp32_groups, *part.model_float16_groups],
                [*part.shard_fp32_groups, *part.shard_fp32_from_float16_groups],
            )
            for models, mains in pairs:
                for model, main in zip(models, mains):
                    where = part._get_model_param_range_map(model)["param"]
                    yield _Shard(model, main, where.start, where.end, inner)
        elif isinstance(part, Float16OptimizerWithFloat16Params):
            pairs = zip(
                [*part.float16_groups, *part.fp32_from_fp32_groups],
                [*part.fp32_from_float16_groups, *part.fp32_from_fp32_groups],
            )
            for models, mains in pairs:
                for model, main in zip(models, mains):
                    yield _Shard(model, main, 0, model.numel(), inner)
        else:
            for group in inner.param_groups:
                for parameter in group["params"]:
                    yield _Shard(parameter, parameter, 0, parameter.numel(), inner)


def weights_follow(engine: Engine) -> None:
    """Brings the model's weights up to date with the optimizer's fp32 ones, over all replicas."""
    for part in engine.optimizer.chained_optimizers:
        if hasattr(part, "_copy_main_params_to_model_params"):
            part._copy_main_params_to_model_params()
    for chunk in engine.chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            chunk.start_param_sync(force_sync=True)
