"""A folder whose download broke off is refused before any process starts, by the beginning of its files alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from llm_parallel.config.load import load_config
from llm_parallel.errors import UserError
from llm_parallel.model.hf_files import check_weight_files
from llm_parallel.train.inherit import inherited

TENSORS = {"a": torch.arange(24.0).reshape(4, 6), "b": torch.ones(3, dtype=torch.bfloat16)}
CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}  # fmt: skip


def folder_with(tmp_path: Path, indexed: bool = False) -> Path:
    """The only file, or the second of two that an index lists."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    if not indexed:
        save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
        return tmp_path / "model.safetensors"
    for name in TENSORS:
        save_file({name: TENSORS[name]}, tmp_path / f"{name}.safetensors")
    places = {"weight_map": {name: f"{name}.safetensors" for name in TENSORS}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(places))
    return tmp_path / "b.safetensors"


@pytest.mark.parametrize("indexed", [False, True])
def test_whole_files_are_taken(tmp_path: Path, indexed: bool) -> None:
    folder_with(tmp_path, indexed)
    check_weight_files(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(kept=st.floats(0, 1, exclude_max=True), indexed=st.booleans())
def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path, kept: float, indexed: bool) -> None:
    path = folder_with(tmp_path, indexed)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(UserError) as refused:
        check_weight_files(tmp_path)
    assert str(path) in str(refused.value) and "fetch the Hugging Face folder again" in str(refused.value)
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no safetensors file"),
        (b"<html>not found</html>", "no safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "no safetensors file"),
        ((15).to_bytes(8, "little") + b'{"a":{"x":[1]}}', "no safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path: Path, data: bytes, says: str) -> None:
    path = folder_with(tmp_path)
    path.write_bytes(data)
    with pytest.raises(UserError, match=says):
        check_weight_files(tmp_path)


def test_a_run_is_refused_before_it_starts(tmp_path: Path) -> None:
    path = folder_with(tmp_path)
    path.write_bytes(b"")
    (tmp_path / "run.yaml").write_text(f"run_dir: {tmp_path}/run\ncheckpoint: {{load: {tmp_path}}}\n")
    config = load_config(str(tmp_path / "run.yaml"), notice=lambda _: None)
    with pytest.raises(UserError, match=r"model.safetensors \(0 bytes\) is no safetensors file"):
        inherited(config, lambda _: None)
