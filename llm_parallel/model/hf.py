"""Maps Hugging Face's Llama tensors to ours and back, and reads them straight into one process's shard.

Each of our tensors is a concatenation of pieces of Hugging Face's tensors along one dimension. Our QKV matrix holds,
for each key/value group, its query heads, its key and its value; the first MLP matrix holds gate, then up; vocabulary
rows are padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from llm_parallel.model.hf_config import family_in, hf_config_to_model, unused_fields
from llm_parallel.model.hf_families import Family
from llm_parallel.model.hf_files import (
    ADAPTER_NAME,
    LFS_POINTER,
    is_hf_folder,
    is_pointer,
    read_hf_config,
    weight_files,
)
from llm_parallel.model.tensors import EMBEDDING, OUTPUT, Role, all_names, kind_of, split_name, weights_of

__all__ = ["HfReader", "Piece", "hf_tensors", "is_hf_folder", "load_hf_weights", "pieces_of"]

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes of weights, by their name in safetensors."""
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Rows (columns where ranks divide columns) [start, stop) of one Hugging Face tensor."""

    name: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def pieces_of(name: str, model: ModelConfig) -> list[Piece]:
    """Hugging Face's pieces that make our whole tensor ``name``, in order, without vocabulary padding."""
    kind, layer = split_name(name)
    names = [hf_name if layer is None else f"model.layers.{layer}.{hf_name}" for hf_name in kind.hf_names]
    size = kind.shape(model)[kind.piece_dim]
    if len(names) == kind.interleaved:
        return [Piece(hf_name, 0, size // len(names)) for hf_name in names]
    head = model.kv_channels
    each = (head * model.num_attention_heads // model.num_query_groups, head, head)
    return [
        Piece(hf_name, group * rows, (group + 1) * rows)
        for group in range(model.num_query_groups)
        for hf_name, rows in zip(names, each)
    ]


def hf_tensors(name: str, ours: Tensor, model: ModelConfig) -> dict[str, Tensor]:
    """Hugging Face's tensors that our whole tensor ``name`` holds, without vocabulary padding."""
    dim, offset = kind_of(name).piece_dim, 0
    parts: dict[str, list[Tensor]] = {}
    for piece in pieces_of(name, model):
        parts.setdefault(piece.name, []).append(ours.narrow(dim, offset, len(piece)))
        offset += len(piece)
    return {hf_name: torch.cat(rows, dim=dim).contiguous() for hf_name, rows in parts.items()}


def in_file(name: str, family: Family) -> str:
    """The tensor of a family's files that is Hugging Face's tensor ``name``, or holds it among others."""
    return next((name.removesuffix(part) + whole for part, whole in family.fused.items() if name.endswith(part)), name)


def file_tensors(tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Hugging Face's tensors of one of ours, as a family's files hold them."""
    groups: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(in_file(name, family), []).append(tensor)
    return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in groups.items()}


def places_in_files(shapes: Mapping[str, Shape], family: Family) -> tuple[dict[str, tuple[str, int]], dict[str, Shape]]:
    """For every tensor of a model, the tensor of a family's files with it and its first row there; and the shapes of
    those in the files."""
    places: dict[str, tuple[str, int]] = {}
    found: dict[str, Shape] = {}
    for name, (rows, *rest) in shapes.items():
        stored = in_file(name, family)
        start = found[stored][0] if stored in found else 0
        places[name], found[stored] = (stored, start), (start + rows, *rest)
    return places, found


def expected_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Hugging Face's tensors of a model, each matrix apart, and the shape of each."""
    found: dict[str, Shape] = {}
    for name in all_names(model):
        kind = kind_of(name)
        rows: dict[str, int] = {}
        for piece in pieces_of(name, model):
            rows[piece.name] = max(rows.get(piece.name, 0), piece.stop)
        for hf_name, size in rows.items():
            shape = list(kind.shape(model))
            shape[kind.piece_dim] = size
            found[hf_name] = tuple(shape)
    return found


class HfReader:
    """Tensors of a Hugging Face folder, read by slices from one or several safetensors files. Use in ``with``."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = read_hf_config(folder)
        self.model = hf_config_to_model(self.config)
        self._places, self._shapes = places_in_files(expected_shapes(self.model), family_in(self.config))
        self._stack, self._files = ExitStack(), self._index()
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> HfReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _index(self) -> dict[str, Path]:
        files = weight_files(self.folder)
        if isinstance(files, dict):
            return files
        found: dict[str, Path] = {}
        for path in files:
            with self._opened(path) as handle:
                found.update(dict.fromkeys(handle.keys(), path))
        return found

    def _opened(self, path: Path) -> Any:
        if is_pointer(path):
            raise UserError(f"{path} is {LFS_POINTER}")
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}); fetch the Hugging Face folder again") from error

    def read(self, name: str, dim: int, rows: range) -> Tensor:
        """Rows of tensor ``name`` along ``dim``. Raises UserError if it is missing."""
        stored, first = self._places[name]
        part, whole = self._slice(stored), slice(None)
        if dim == 0:
            return part[first + rows.start : first + rows.stop]
        return part[whole, rows.start : rows.stop]

    def _slice(self, name: str) -> Any:
        path = self._files.get(name)
        if path is None:
            family = self.config.get("model_type")
            tied = OUTPUT.hf_names[0] == name
            hint = ", or its config.json must say that tie_word_embeddings is true" if tied else ""
            raise UserError(f"{self.folder} has no tensor {name}; it is not a complete {family} model{hint}")
        if path not in self._open:
            self._open[path] = self._stack.enter_context(self._opened(path))
        try:
            return self._open[path].get_slice(name)
        except SafetensorError as error:
            raise UserError(f"{path} does not hold {name}, as the index says; fetch the folder again") from error

    def dtype(self) -> torch.dtype:
        """The widest dtype of the tensors that the model uses: fp32 where some are fp32, or where bf16 and fp16 are
        mixed. Others do not count: old Llama folders keep rotary frequencies in fp32 beside weights in bf16."""
        kinds = set(self._kinds())
        return DTYPES[kinds.pop()] if len(kinds) == 1 else torch.float32

    def _kinds(self) -> dict[str, list[str]]:
        """The dtypes of the tensors that the model uses, by safetensors' names, and the tensors of each."""
        found: dict[str, list[str]] = {}
        for name in sorted(self._shapes.keys() & self._files.keys()):
            found.setdefault(self._slice(name).get_dtype(), []).append(name)
        return {kind: names for kind, names in found.items() if kind in DTYPES}

    def check(self) -> list[str]:
        """Compares all tensors with what a model needs. Returns a sentence for each thing in the folder that the model
        does not use or that is not kept as it is.

        Raises UserError for a tensor that is missing, has another shape or a dtype of quantized weights, and for an
        output projection that differs from the embedding although config.json says that they are one.
        """
        wanted = self._shapes
        for hf_name, expected in wanted.items():
            part = self._slice(hf_name)
            if tuple(part.get_shape()) != expected:
                found = list(part.get_shape())
                raise UserError(f"{hf_name} in {self.folder} has shape {found}, and config.json means {list(expected)}")
            if part.get_dtype() not in DTYPES:
                raise UserError(
                    f"{hf_name} in {self.folder} is {part.get_dtype()}; only weights in fp32, bf16 or fp16 can be read"
                )
        embedding, output = EMBEDDING.hf_names[0], OUTPUT.hf_names[0]
        if output in self._files and output not in wanted:
            same = torch.equal(self._slice(embedding)[:].float(), self._slice(output)[:].float())
            if not same:
                raise UserError(
                    f"{output} in {self.folder} differs from {embedding}, and tie_word_embeddings in config.json is "
                    "true; set it to false there"
                )
        known = {*wanted, output}
        rest = sorted(name for name in self._files if name not in known and not name.endswith("rotary_emb.inv_freq"))
        return self._notices(rest)

    def _notices(self, unused: list[str]) -> list[str]:
        found = [f"tensors of the folder that this model does not have are left out: {shortened(unused)}"]
        found = found if unused else []
        kinds = sorted(self._kinds().items(), key=lambda entry: len(entry[1]))
        if len(kinds) > 1:
            fewest, names = kinds[0]
            found.append(
                f"weights are in {' and '.join(kind for kind, _ in kinds)} ({fewest}: {shortened(names)}); all are "
                f"taken as {str(self.dtype()).removeprefix('torch.')}"
            )
        fields = unused_fields(self.config)
        if "auto_map" in fields:
            family = self.config["model_type"]
            found.append(f"config.json names code of the folder (auto_map), which is not run: the model is a {family}")
        fields = [name for name in fields if name != "auto_map"]
        if fields:
            found.append(f"fields of config.json that this program does not know have no effect: {shortened(fields)}")
        if (self.folder / ADAPTER_NAME).is_file():
            found.append(f"{ADAPTER_NAME} in the folder is left out: its adapters are not merged into the model")
        return found


def read_rows(reader: HfReader, name: str, model: ModelConfig, wanted: range) -> Iterator[Tensor]:
    """Parts of our whole tensor ``name`` that cover ``wanted`` along its ``piece_dim``, in order; zeros for padding."""
    dim, offset, last = kind_of(name).piece_dim, 0, None
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
def load_hf_weights(
    folder: str | Path, models: Sequence[Any], seen: Callable[[Any, str, Tensor], None] = lambda *_: None
) -> list[str]:
    """Reads a Hugging Face model into this process's model chunks, only the rows that they hold, cast to their dtype.
    Returns a sentence for each thing in the folder that the model does not use. ``seen`` is called with each chunk,
    canonical name and values as they were read.

    Raises UserError if the folder's architecture is not that of the models, or its tensors are not what its config.json
    means.
    """
    config, groups = models[0].model_config, models[0].groups
    tp, tp_rank = groups.mesh.tp, groups.at.tp
    with HfReader(folder) as reader:
        theirs = hf_config_to_model(reader.config)
        added = config.value_head and not theirs.value_head  # a language model's trunk under a head of our own
        check_same_architecture(folder, theirs, config, ("value_head",) if added else ())
        said = reader.check()
        for chunk in models:
            for name, weight in weights_of(chunk):
                kind = kind_of(name)
                if added and kind.role is Role.VALUE:
                    continue
                dim = kind.piece_dim
                ranges = kind.shard(weight.shape[dim] * (1 if kind.sharded_dim is None else tp), tp, tp_rank)
                parts = [part for wanted in ranges for part in read_rows(reader, name, config, wanted)]
                values = torch.cat(parts, dim=dim) if len(parts) > 1 else parts[0]
                seen(chunk, name, values)
                weight.copy_(values)
    return said


def shortened(names: Sequence[str]) -> str:
    """The first three of some names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
