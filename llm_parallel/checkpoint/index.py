"""The index of a checkpoint, ``.metadata``, read without running what a stranger may have put into it.

torch pickles the index and unpickles it by plain ``pickle``, which runs whatever the file names. Here only the classes
that an index consists of are looked up, by an allowlist, and what comes out is checked: tensors alone, in files of the
folder itself. A checkpoint of ours holds nothing else.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader, filesystem
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from llm_parallel.files import refuse_outside

INDEX_NAME = ".metadata"
_CLASSES = (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
    _StorageInfo,
    torch.Size,
)
_ALLOWED = {(found.__module__, found.__qualname__) for found in _CLASSES} | {
    ("torch", "Size"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
}
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")


class _Unpickler(pickle.Unpickler):
    """Looks up nothing but what an index consists of."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or constant. Raises pickle.UnpicklingError for any other."""
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return PurePath  # where the checkpoint was written; nothing is opened there
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of a checkpoint holds")


def load_index(file: IO[bytes]) -> Metadata:
    """The index in an open file. Raises pickle.UnpicklingError if it is none, or names what it must not."""
    found = _Unpickler(file).load()
    if not isinstance(found, Metadata):
        raise pickle.UnpicklingError("it is no index of a checkpoint")
    for key, entry in found.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise pickle.UnpicklingError(f"it lists {key!r}, which is no tensor but an object to unpickle")
    for key, place in (found.storage_data or {}).items():
        name = place.relative_path
        plain = isinstance(name, str) and PurePath(name).name == name and name not in ("", "..")
        if not plain or getattr(place, "transform_descriptors", None):
            raise pickle.UnpicklingError(f"it has {key} in {name!r}, which is no file of the folder")
    return found


def read_index(folder: Path) -> Metadata:
    """The index of the checkpoint in ``folder``. Raises UserError if a file that it names, or itself, is a link that
    leads out of the folder; OSError if it cannot be read, and pickle.UnpicklingError."""
    refuse_outside(folder / INDEX_NAME, folder)
    with (folder / INDEX_NAME).open("rb") as file:
        found = load_index(file)
    for name in {*(place.relative_path for place in (found.storage_data or {}).values())}:
        refuse_outside(folder / name, folder)
    return found


class IndexReader(FileSystemReader):
    """torch's reader of a checkpoint's tensors, with an index that is read as above."""

    def read_metadata(self) -> Metadata:
        """The index."""
        return read_index(Path(self.path))


@contextlib.contextmanager
def safe_indices(folder: Path) -> Iterator[None]:
    """While this context lasts, torch's own readers unpickle an index as ``load_index`` does. megatron-core makes its
    reader itself, in another way in each version, and hands none in; so the name ``pickle`` of torch's module is what
    can be replaced. ``folder`` is refused first if its files lead out of it, as by ``read_index``."""
    read_index(folder)
    plain = filesystem.pickle
    filesystem.pickle = SimpleNamespace(load=load_index, dump=plain.dump)
    try:
        yield
    finally:
        filesystem.pickle = plain
