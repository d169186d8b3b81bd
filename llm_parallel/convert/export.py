"""Our checkpoint → Hugging Face folder, one layer at a time, so that a 70B model converts on a normal machine."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llm_parallel.checkpoint.folders import find_checkpoint
from llm_parallel.checkpoint.run_file import read_config
from llm_parallel.checkpoint.tensors import CheckpointTensors
from llm_parallel.config.tree import RunConfig
from llm_parallel.convert.settings import origin, write_settings
from llm_parallel.files import atomic_write, folder_in_whole
from llm_parallel.model.hf import file_tensors, hf_tensors
from llm_parallel.model.hf_config import family_of
from llm_parallel.model.hf_families import FAMILIES
from llm_parallel.model.hf_files import INDEX_NAME
from llm_parallel.model.tensors import all_names


class ShardWriter:
    """Writes tensors into numbered safetensors files of at most ``max_bytes`` each, and their index at the end."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._held: dict[str, Tensor] = {}
        self._files: list[list[str]] = []
        self._total = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Takes tensors; writes a file whenever the next tensor would make it too large."""
        for name, tensor in tensors.items():
            size = sum(map(_bytes, self._held.values())) + _bytes(tensor)
            if self._held and size > self.max_bytes:
                self._flush()
            self._held[name] = tensor
            self._total += _bytes(tensor)

    def _flush(self) -> None:
        try:
            save_file(self._held, self.folder / f"part-{len(self._files)}.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:  # of Rust, which has no number for a full disk
            if "os error 28" not in str(error) and "os error 122" not in str(error):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        self._files.append(list(self._held))
        self._held = {}

    def close(self) -> None:
        """Writes what is left, gives the files their final names, and writes the index if there are several."""
        self._flush()
        count, index = len(self._files), {}
        for number, names in enumerate(self._files):
            final = "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self.folder / f"part-{number}.safetensors").rename(self.folder / final)
            index.update(dict.fromkeys(names, final))
        if count > 1:
            with atomic_write(self.folder / INDEX_NAME) as handle:
                json.dump({"metadata": {"total_size": self._total}, "weight_map": index}, handle, indent=1)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def export_to_hf(
    checkpoint: str | Path,
    target: str | Path,
    max_shard_bytes: int = 5 * 10**9,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes the checkpoint's model as a Hugging Face folder, with tokenizer and generation settings; returns it.

    dtype: that of the files; the checkpoint's if not given. Raises UserError if there is no checkpoint or the target is
    not empty.
    """
    source = find_checkpoint(checkpoint)
    return write_hf_folder(CheckpointTensors(source), read_config(source), source, target, max_shard_bytes, dtype)


class Tensors(Protocol):
    """Whole tensors of a model."""

    def read(self, name: str) -> Tensor:
        """The tensor of a canonical name."""


def write_hf_folder(
    tensors: Tensors,
    config: RunConfig,
    source: Path,
    target: str | Path,
    max_shard_bytes: int,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes a model as a Hugging Face folder, with the tokenizer and the settings that lie in ``source`` as in one of
    our checkpoints; returns it.

    dtype: that of the files; that of ``tensors`` if not given. Holds at most one layer and one safetensors file in
    memory. The folder appears when it is complete. Raises UserError if the target is not empty.
    """
    target = Path(target)
    with folder_in_whole(target) as making:
        family = FAMILIES[family_of(config.model, origin(source, config.model).get("model_type"))]
        writer = ShardWriter(making, max_shard_bytes)
        for name in all_names(config.model):
            ours = tensors.read(name)
            dtype = dtype or ours.dtype
            writer.add(file_tensors(hf_tensors(name, ours.to(dtype), config.model), family))
        writer.close()
        write_settings(source, making, config, str(dtype).removeprefix("torch."))
    return target
