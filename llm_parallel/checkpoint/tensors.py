"""Single tensors of a checkpoint, read without the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from llm_parallel.checkpoint.index import IndexReader
from llm_parallel.model.tensors import LAYERS, split_name


class _Into(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of the tensor that one read fills."""
        part = self._target
        for axis, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths)):
            part = part.narrow(axis, offset, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: the part is a view."""


class CheckpointTensors:
    """Tensors of one of our checkpoints by canonical name, each whole or in part. Of the tensors of a layer only that
    layer's part of the stored stack is read. ``of``: what the keys of one of its models begin with; the policy's begin
    with nothing."""

    def __init__(self, folder: Path, of: str = "") -> None:
        self._of = of
        self._reader = IndexReader(str(folder))
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def read(self, name: str) -> Tensor:
        """The whole tensor ``name``. Raises KeyError if the checkpoint does not hold it."""
        return self._load(name, None, 0)

    def rows(self, name: str, wanted: range) -> Tensor:
        """Rows (columns where ranks divide columns) of tensor ``name``; zeros beyond its end, where the vocabulary is
        rounded up."""
        return self._load(name, wanted, split_name(name)[0].piece_dim)

    def _load(self, name: str, wanted: range | None, dim: int) -> Tensor:
        kind, layer = split_name(name)
        key, at = (name, []) if layer is None else (LAYERS + kind.name, [layer])
        key = self._of + key
        stored: Any = self._metadata.state_dict_metadata[key]
        offsets, sizes = [0] * (len(stored.size) - len(at)), list(stored.size[len(at) :])
        if wanted is not None:
            offsets[dim] = min(wanted.start, sizes[dim])
            sizes[dim] = min(wanted.stop, sizes[dim]) - offsets[dim]
        chunk = ChunkStorageMetadata(torch.Size([*at, *offsets]), torch.Size([*(1 for _ in at), *sizes]))
        target = torch.zeros(chunk.sizes, dtype=stored.properties.dtype)
        if target.numel():
            plan = LoadPlan(create_read_items_for_chunk_list(key, stored, [chunk]))
            self._reader.read_data(self._reader.prepare_local_plan(plan), _Into(target)).wait()
        found = target.view(sizes)
        if wanted is not None and sizes[dim] < len(wanted):
            rest = list(sizes)
            rest[dim] = len(wanted) - sizes[dim]
            found = torch.cat((found, found.new_zeros(rest)), dim=dim)
        return found
