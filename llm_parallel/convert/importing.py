"""Hugging Face folder → our checkpoint, one tensor at a time, so that a 70B model converts on a normal machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from llm_parallel.checkpoint.content import write_weights_only_parts
from llm_parallel.checkpoint.folders import LATEST_NAME, folder_name
from llm_parallel.checkpoint.run_file import write_config
from llm_parallel.checkpoint.state import TrainState
from llm_parallel.config.tree import ModelConfig, RunConfig
from llm_parallel.convert.settings import carry
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write, folder_in_whole
from llm_parallel.model.hf import HfReader, read_rows
from llm_parallel.model.mcore_config import padded_vocab_size
from llm_parallel.model.tensors import LAYERS, all_names, split_name


@dataclass(frozen=True)
class Stored:
    """One tensor to write: our canonical name, its key and size in the checkpoint, and its place there."""

    name: str
    key: str
    size: tuple[int, ...]
    offset: tuple[int, ...]
    chunk: tuple[int, ...]


def stored_tensors(model: ModelConfig) -> Iterator[Stored]:
    """All tensors of a model as megatron-core stores them: layers stacked along a first axis."""
    assert model.vocab_size is not None
    rows = padded_vocab_size(model.vocab_size, 1)
    for name in all_names(model):
        kind, layer = split_name(name)
        size = kind.shape(model, rows)
        if layer is None:
            yield Stored(name, name, size, (0,) * len(size), size)
        else:
            stacked, offset = (model.num_layers, *size), (layer, *(0,) * len(size))
            yield Stored(name, LAYERS + kind.name, stacked, offset, (1, *size))


class _LazyPlanner(DefaultSavePlanner):
    """Reads each tensor when the writer comes to it, so that one at a time is in memory."""

    def __init__(
        self, reader: HfReader, model: ModelConfig, by_index: dict[MetadataIndex, Stored], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._reader, self._model, self._by_index, self._dtype = reader, model, by_index, dtype

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The tensor of one write item, read now."""
        stored = self._by_index[write_item.index]
        kind, layer = split_name(stored.name)
        dim = kind.piece_dim
        along = stored.chunk[dim if layer is None else dim + 1]
        parts = list(read_rows(self._reader, stored.name, self._model, range(along)))
        return torch.cat(parts, dim=dim).reshape(stored.chunk).to(self._dtype)


def import_from_hf(
    source: str | Path,
    target: str | Path,
    config: RunConfig,
    notice: Callable[[str], None] = print,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes ``target/checkpoints/iter_0000000`` from a Hugging Face folder; returns that folder.

    config: the run configuration to store, with the folder's model; dtype: of the weights, the folder's if not given.
    Tokenizer and generation settings are copied too. Holds one tensor in memory. Raises UserError if the target holds
    checkpoints already or the source is damaged.
    """
    source, checkpoints = Path(source), Path(target) / "checkpoints"
    if checkpoints.exists() and any(not path.name.startswith(".") for path in checkpoints.iterdir()):
        raise UserError(f"{checkpoints} is not empty; give a new folder")
    final = checkpoints / folder_name(0)
    with HfReader(source) as reader, folder_in_whole(final) as making:
        for said in reader.check():
            notice(said)
        _write_tensors(reader, config.model, making, dtype or reader.dtype())
        write_weights_only_parts(making)
        TrainState().write(making)
        carry(source, making)
        write_config(making, config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": None})}))
    with atomic_write(checkpoints / LATEST_NAME) as handle:
        handle.write("0")
    return final


def _write_tensors(reader: HfReader, model: ModelConfig, folder: Path, dtype: torch.dtype) -> None:
    properties = TensorProperties(dtype=dtype)
    items, by_index = [], {}
    sizes: dict[str, TensorStorageMetadata] = {}
    for stored in stored_tensors(model):
        chunk = ChunkStorageMetadata(torch.Size(stored.offset), torch.Size(stored.chunk))
        index = MetadataIndex(stored.key, torch.Size(stored.offset))
        data = TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(stored.size))
        items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        by_index[index] = stored
        kept = sizes.setdefault(stored.key, TensorStorageMetadata(properties, torch.Size(stored.size), []))
        kept.chunks.append(chunk)
    writer = FileSystemWriter(str(folder), thread_count=1)
    writer.set_up_storage_writer(True)
    [plan] = writer.prepare_global_plan([writer.prepare_local_plan(SavePlan(items))])
    results: Any = writer.write_data(plan, _LazyPlanner(reader, model, by_index, dtype)).wait()
    writer.finish(Metadata(state_dict_metadata=dict(sizes)), [results])
