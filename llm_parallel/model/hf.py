"""Hugging Face's Llama tensors ↔ ours, as data, and reading them straight into one process's shard.

Each of our tensors is a row of pieces of Hugging Face's along one dim. Our QKV matrix holds, for each key/value group,
its query heads, its key and its value; the first MLP matrix holds gate, then up; vocabulary rows are padded with zeros.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_parallel.config.tree import ModelConfig
from llm_parallel.errors import UserError
from llm_parallel.model.architecture import check_same_architecture
from llm_parallel.model.hf_config import hf_config_to_model, is_hf_folder, read_hf_config
from llm_parallel.model.init import canonical_parameters, shard_rows

__all__ = [
    "HfReader",
    "Piece",
    "all_names",
    "hf_tensors",
    "is_hf_folder",
    "layer_tensors",
    "load_hf_weights",
    "outer_tensors",
    "pieces_of",
]

INDEX_NAME = "model.safetensors.index.json"

_LAYER_NAMES = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_OUTER_NAMES = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}


@dataclass(frozen=True)
class Piece:
    """Rows (columns for row-parallel matrices) [start, stop) of one Hugging Face tensor."""

    name: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def layer_tensors(layer: int) -> tuple[str, ...]:
    """Our canonical names of one layer's tensors."""
    suffixes = (*_LAYER_NAMES, "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight")
    return tuple(f"decoder.layers.{layer}.{suffix}" for suffix in suffixes)


def outer_tensors(model: ModelConfig) -> tuple[str, ...]:
    """Our canonical names of the tensors outside the layers."""
    return tuple(name for name in _OUTER_NAMES if not (model.tie_embeddings and name == "output_layer.weight"))


def partition_dim(name: str) -> int:
    """Dim along which a tensor is made of pieces and divided over tensor-parallel ranks."""
    return 1 if "linear_proj" in name or "linear_fc2" in name else 0


def pieces_of(name: str, model: ModelConfig) -> list[Piece]:
    """Hugging Face's pieces that make our whole tensor ``name``, in order, without vocabulary padding."""
    if name in _OUTER_NAMES:
        rows = model.hidden_size if "layernorm" in name else model.vocab_size
        assert rows is not None
        return [Piece(_OUTER_NAMES[name], 0, rows)]
    _, _, layer, suffix = name.split(".", 3)
    prefix, head = f"model.layers.{layer}.", model.kv_channels
    if suffix == "self_attention.linear_qkv.weight":
        queries = head * model.num_attention_heads // model.num_query_groups
        return [
            Piece(f"{prefix}self_attn.{kind}_proj.weight", group * rows, (group + 1) * rows)
            for group in range(model.num_query_groups)
            for kind, rows in (("q", queries), ("k", head), ("v", head))
        ]
    if suffix == "mlp.linear_fc1.weight":
        return [Piece(f"{prefix}mlp.{kind}_proj.weight", 0, model.ffn_hidden_size) for kind in ("gate", "up")]
    columns = {
        "self_attention.linear_proj.weight": model.num_attention_heads * head,
        "mlp.linear_fc2.weight": model.ffn_hidden_size,
    }
    return [Piece(prefix + _LAYER_NAMES[suffix], 0, columns.get(suffix, model.hidden_size))]


def all_names(model: ModelConfig) -> Iterator[str]:
    """Canonical names of all tensors, layer by layer."""
    first, *rest = outer_tensors(model)
    yield first
    for layer in range(model.num_layers):
        yield from layer_tensors(layer)
    yield from rest


def hf_tensors(name: str, ours: Tensor, model: ModelConfig) -> dict[str, Tensor]:
    """Hugging Face's tensors that our whole tensor ``name`` holds, without vocabulary padding."""
    dim, offset = partition_dim(name), 0
    parts: dict[str, list[Tensor]] = {}
    for piece in pieces_of(name, model):
        parts.setdefault(piece.name, []).append(ours.narrow(dim, offset, len(piece)))
        offset += len(piece)
    return {hf_name: torch.cat(rows, dim=dim).contiguous() for hf_name, rows in parts.items()}


class HfReader:
    """Tensors of a Hugging Face folder, read by slices from one or several safetensors files. Use in ``with``."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = read_hf_config(folder)
        self._stack, self._files = ExitStack(), self._index()
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> HfReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _index(self) -> dict[str, Path]:
        index = self.folder / INDEX_NAME
        if index.is_file():
            return {name: self.folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        found = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            with self._opened(path) as handle:
                found.update(dict.fromkeys(handle.keys(), path))
        return found

    def _opened(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}); fetch the Hugging Face folder again") from error

    def read(self, name: str, dim: int, rows: range) -> Tensor:
        """Rows of tensor ``name`` along ``dim``. Raises UserError if it is missing or smaller."""
        path = self._files.get(name)
        if path is None:
            raise UserError(f"{self.folder} has no tensor {name}; it is no complete Llama")
        if path not in self._open:
            self._open[path] = self._stack.enter_context(self._opened(path))
        part = self._open[path].get_slice(name)
        if part.get_shape()[dim] < rows.stop:
            raise UserError(f"{name} in {path} has shape {part.get_shape()}, which config.json contradicts")
        whole = slice(None)
        return part[rows.start : rows.stop] if dim == 0 else part[whole, rows.start : rows.stop]

    def dtype(self) -> torch.dtype:
        """Dtype of the final norm, which stands for the model's."""
        return self.read("model.norm.weight", 0, range(1)).dtype


def read_rows(reader: HfReader, name: str, model: ModelConfig, wanted: range) -> Iterator[Tensor]:
    """Parts of our whole tensor ``name`` that cover ``wanted`` along its partition dim, in order; zeros for padding."""
    dim, offset, last = partition_dim(name), 0, None
    for piece in pieces_of(name, model):
        low, high = max(wanted.start - offset, 0), min(wanted.stop - offset, len(piece))
        if low < high:
            last = reader.read(piece.name, dim, range(piece.start + low, piece.start + high))
            yield last
        offset += len(piece)
    padding = wanted.stop - max(wanted.start, offset)
    if padding > 0:
        yield torch.zeros(padding, model.hidden_size, dtype=last.dtype if last is not None else reader.dtype())


@torch.no_grad()
def load_hf_weights(folder: str | Path, models: Sequence[Any]) -> None:
    """Reads a Hugging Face Llama into this process's model chunks, only the rows that they hold, cast to their dtype.

    Raises UserError if the folder's architecture is not that of the models.
    """
    config, groups = models[0].run_config.model, models[0].groups
    tp, tp_rank = groups.layout.tp, groups.at.tp
    with HfReader(folder) as reader:
        check_same_architecture(folder, hf_config_to_model(reader.config), config)
        for chunk in models:
            for name, parameter in canonical_parameters(chunk):
                dim = partition_dim(name)
                if parameter.dim() == 1:
                    ranges = [range(parameter.shape[0])]
                else:
                    ranges = shard_rows(name, parameter.shape[dim] * tp, tp, tp_rank)
                parts = [part for wanted in ranges for part in read_rows(reader, name, config, wanted)]
                parameter.copy_(torch.cat(parts, dim=dim) if len(parts) > 1 else parts[0])
