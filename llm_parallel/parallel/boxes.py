"""Where the numbers of this process's parameters lie in the tensors of the whole model, in terms that every layout
shares.

A parameter of the whole model is a box of numbers under megatron-core's checkpoint key; layers are stacked along a
first axis. A process holds sub-boxes of it (tensor and pipeline parallelism).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory


class Box(NamedTuple):
    """The part at ``offset`` with ``shape`` of the tensor ``key``, whose shape is ``whole``. It begins at number
    ``begin`` of the parameter and stands in it row by row. ``stacked``: leading axes that count layers."""

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    begin: int
    whole: tuple[int, ...]
    stacked: int


def boxes_of(models: Sequence[Any]) -> dict[int, list[Box]]:
    """For each parameter of this process's model chunks, by ``id``, the boxes that it is made of."""
    found: dict[int, list[Box]] = {}
    for model in models:
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
                stacked = part.prepend_axis_num
                shape = (1,) * stacked + tuple(part.local_shape)
                boxes.append(Box(part.key, tuple(part.global_offset), shape, begin, tuple(part.global_shape), stacked))
            found[id(parameter)] = boxes
    return found
