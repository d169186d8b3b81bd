"""Checkpoints and Hugging Face folders that a stranger made: nothing in them runs, and nothing outside them is read."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from llm_parallel.checkpoint.index import load_index, read_index, safe_indices
from llm_parallel.checkpoint.integrity import SMALL_FILES, expected
from llm_parallel.checkpoint.run_file import copy_tokenizer, read_config
from llm_parallel.checkpoint.sharded import read_common
from llm_parallel.checkpoint.tensors import CheckpointTensors
from llm_parallel.convert.settings import carry
from llm_parallel.data.template import own_template
from llm_parallel.errors import UserError
from llm_parallel.files import refuse_outside
from llm_parallel.model.hf_files import read_hf_config, weight_files


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of one tensor in torch's format."""
    import torch.distributed.checkpoint as dcp

    folder = tmp_path / "iter_0000001"
    dcp.save({"output_layer.weight": torch.arange(6.0).view(2, 3)}, checkpoint_id=folder, no_dist=True)
    return folder


def change(folder: Path, **changes: Any) -> None:
    """Replaces parts of the index."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for name, value in changes.items():
        setattr(metadata, name, value)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_an_index_is_read_as_torch_reads_it(checkpoint: Path) -> None:
    assert read_index(checkpoint) == pickle.loads((checkpoint / ".metadata").read_bytes())
    assert CheckpointTensors(checkpoint).read("output_layer.weight").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_an_index_that_runs_code_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """By every way that reads it, torch's own reader inside megatron-core's included."""
    import torch.distributed.checkpoint as dcp

    whole = (checkpoint / ".metadata").read_bytes()
    change(checkpoint, planner_data=Trap(tmp_path / "ran"))
    with pytest.raises(pickle.UnpicklingError, match=r"it names posix\.mkdir, which no index"):
        read_index(checkpoint)
    with pytest.raises(pickle.UnpicklingError):
        CheckpointTensors(checkpoint)
    (checkpoint / ".metadata").write_bytes(whole)
    with safe_indices(checkpoint), pytest.raises(pickle.UnpicklingError):
        change(checkpoint, planner_data=Trap(tmp_path / "ran"))  # changed after it was looked at
        dcp.FileSystemReader(checkpoint).read_metadata()
    assert not (tmp_path / "ran").exists()
    pickle.loads((checkpoint / ".metadata").read_bytes())
    assert (tmp_path / "ran").exists(), "plain pickle runs it, so this test would see it"


def test_an_index_lists_tensors_in_the_folder_alone(checkpoint: Path) -> None:
    """torch unpickles what is listed as an object, and opens whatever a place names."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    for name in ("../secret", "/etc/passwd", "", ".."):
        change(checkpoint, storage_data=dict.fromkeys(metadata.storage_data, _StorageInfo(name, 0, 10)))
        with pytest.raises(pickle.UnpicklingError, match="which is no file of the folder"):
            read_index(checkpoint)
    change(checkpoint, storage_data=metadata.storage_data)
    change(checkpoint, state_dict_metadata={"output_layer.weight": BytesStorageMetadata()})
    with pytest.raises(pickle.UnpicklingError):
        read_index(checkpoint)
    (checkpoint / ".metadata").write_bytes(pickle.dumps([1]))
    with (checkpoint / ".metadata").open("rb") as file, pytest.raises(pickle.UnpicklingError, match="no index"):
        load_index(file)


def test_tensors_behind_a_link_that_leaves_the_folder_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    (shard,) = checkpoint.glob("*.distcp")
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"__0_0\.distcp leads to .*elsewhere, outside"):
        CheckpointTensors(checkpoint)


def test_common_values_run_nothing(tmp_path: Path) -> None:
    torch.save({"content_metadata": Trap(tmp_path / "ran")}, tmp_path / "common.pt")
    with pytest.raises(pickle.UnpicklingError):
        read_common(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_checksums_of_other_files_are_not_looked_for(tmp_path: Path) -> None:
    """A list that names /dev/zero would be read for ever."""
    names = {"common.pt": [1, 2], "../x": [1, 2], "/dev/zero": [1, 2]}
    (tmp_path / SMALL_FILES).write_text(json.dumps(names))
    found = expected(tmp_path)
    assert set(found) == {tmp_path / "common.pt", tmp_path / SMALL_FILES} and found[tmp_path / SMALL_FILES] is None


SECRET = "of somebody else"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Hugging Face folder as far as these tests look, beside a secret."""
    (tmp_path / "secret").write_text(SECRET)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x")
    return folder


LINKS = {
    "tokenizer.json": lambda folder, out: copy_tokenizer(folder, out),
    "tokenizer_config.json": lambda folder, out: carry(folder, out),
    "additional_chat_templates": lambda folder, out: carry(folder, out),
    "config.json": lambda folder, out: read_hf_config(folder),
    "model.safetensors": lambda folder, out: weight_files(folder),
    "config.yaml": lambda folder, out: read_config(folder),
    "chat_template.jinja": lambda folder, out: own_template(folder),
    ".metadata": lambda folder, out: read_index(folder),
}


@pytest.mark.parametrize("name", LINKS)
def test_a_link_that_leaves_the_folder_is_neither_read_nor_copied(name: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (model / name).unlink(missing_ok=True)
    target = tmp_path / "folder" if name == "additional_chat_templates" else tmp_path / "secret"
    (tmp_path / "folder").mkdir()
    (model / name).symlink_to(target)
    with pytest.raises(UserError, match=rf"{name} leads to .*, outside .*model; put the file itself there"):
        LINKS[name](model, out)
    assert not [path for path in out.rglob("*") if path.is_file() and path.read_text() == SECRET]


@pytest.mark.parametrize("name", sorted(LINKS.keys() - {"additional_chat_templates", "tokenizer_config.json"}))
def test_a_pipe_in_place_of_a_file_is_not_waited_for(name: str, model: Path, tmp_path: Path) -> None:
    """A reader that opened it would wait for ever."""
    out = tmp_path / "out"
    out.mkdir()
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(UserError, match=f"{name} is no file but a pipe"):
        LINKS[name](model, out)


def test_lists_within_lists_are_no_configuration(model: Path) -> None:
    """More than Python's stack holds."""
    (model / "config.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        read_hf_config(model)


def test_links_of_hugging_faces_cache_are_followed(model: Path, tmp_path: Path) -> None:
    """From a revision to the blobs beside it, and to nothing else."""
    entry = tmp_path / "models--a--b"
    shutil.copytree(model, entry / "snapshots" / "rev")
    (entry / "blobs").mkdir()
    (entry / "blobs" / "1234").write_text('{"x": 1}')
    config = entry / "snapshots" / "rev" / "config.json"
    config.unlink()
    config.symlink_to("../../blobs/1234")
    assert read_hf_config(config.parent) == {"x": 1}
    config.unlink()
    config.symlink_to("../../../secret")
    with pytest.raises(UserError, match="outside"):
        read_hf_config(config.parent)


def test_a_link_within_the_folder_is_what_it_seems(model: Path) -> None:
    (model / "same.json").symlink_to("tokenizer.json")
    refuse_outside(model / "same.json", model)
