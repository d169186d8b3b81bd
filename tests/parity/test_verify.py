"""``convert --verify`` compares with transformers what fits into memory, and refuses what is not the same model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_parallel.config.presets import MODEL_PRESETS
from llm_parallel.config.tree import ModelConfig
from llm_parallel.convert import verify as module
from llm_parallel.convert.export import export_to_hf
from llm_parallel.convert.importing import import_from_hf
from llm_parallel.convert.verify import layers_that_fit, verify
from llm_parallel.errors import UserError
from llm_parallel.generate.load import describe_folder
from tests.support.in_process import in_process
from tests.support.parity_models import random_folder


def imported(kind: str, folder: Path) -> tuple[Path, Path]:
    """A random Hugging Face folder with its tensors in one file, and the checkpoint made of it."""
    source = random_folder(kind, folder / "hf")
    change(source, lambda _: None)
    return source, import_from_hf(source, folder / "run", describe_folder(source))


def change(folder: Path, edit: object) -> None:
    """Writes a folder's tensors again, after ``edit``."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors.update(load_file(path))
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    edit(tensors)  # type: ignore[operator]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def leave_room_for(layers: float, model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the machine seem to have memory for so many layers."""
    from llm_parallel.model.flops import parameter_count

    count = parameter_count(model)
    needed = 4 * (count.total + (layers - count.num_layers) * count.per_layer) / module.USED_SHARE
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(available=int(needed)))


def test_both_directions_and_dtypes_are_verified(tmp_path: Path) -> None:
    source = random_folder("qwen3", tmp_path / "hf", torch.bfloat16)
    done = in_process("convert", source, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[-1]
    assert line.startswith("largest logit difference from transformers ")
    assert "64 random tokens through all 4 layers, weights as stored, fp32 compute" in line
    assert float(line.split(": ")[1].split()[0]) < 1e-4
    done = in_process("convert", tmp_path / "run", tmp_path / "back", "--dtype", "fp16")
    assert done.returncode == 0 and "with weights rounded to the dtype that was asked for" in done.stdout
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float16"
    assert {t.dtype for t in load_file(tmp_path / "back" / "model.safetensors").values()} == {torch.float16}
    done = in_process("convert", source, tmp_path / "other", "--dtype", "int8")
    assert done.returncode == 2 and "dtype is 'int8'; it must be fp32, bf16, fp16" in done.stderr


def test_another_model_is_refused(tmp_path: Path) -> None:
    source, checkpoint = imported("llama-2", tmp_path)
    change(source, lambda tensors: tensors["model.layers.3.mlp.up_proj.weight"].mul_(1.1))
    with pytest.raises(UserError, match="are not the same model: largest logit difference"):
        verify(source, checkpoint)
    change(source, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(UserError, match="not the same model"):
        verify(source, checkpoint)


def test_the_first_layers_are_compared_if_more_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, checkpoint = imported("smollm3", tmp_path)
    leave_room_for(2.5, describe_folder(source).model, monkeypatch)
    said = verify(source, checkpoint)
    assert "through the first 2 layers" in said and said.endswith("the tensors of all 4 are equal bit for bit")
    change(source, lambda tensors: tensors["model.layers.3.self_attn.k_proj.weight"][5, 7].add_(1e-3))
    with pytest.raises(UserError, match=r"decoder\.layers\.3\.self_attention\.linear_qkv\.weight in .* is not what"):
        verify(source, checkpoint)
    leave_room_for(0.5, describe_folder(source).model, monkeypatch)
    assert "not compared with transformers: one layer with the embeddings needs 0.0 GB" in verify(source, checkpoint)


def test_the_first_layers_of_fused_and_normed_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("phi3", "olmo2"):
        source, checkpoint = imported(kind, tmp_path / kind)
        leave_room_for(3.5, describe_folder(source).model, monkeypatch)
        assert "through the first 3 layers" in verify(source, checkpoint)
        back = export_to_hf(checkpoint, tmp_path / kind / "back")
        assert "through the first 3 layers" in verify(back, checkpoint)


def test_without_transformers_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    said = verify(tmp_path, tmp_path)
    assert said == "written as read, and not compared with transformers, which is not installed"


def test_what_transformers_cannot_load_is_said(tmp_path: Path) -> None:
    source, checkpoint = imported("llama-2", tmp_path)
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "model_type": "not-there"}))
    assert f"cannot load {source}" in verify(source, checkpoint)


def test_how_many_layers_fit() -> None:
    model = ModelConfig.model_validate(MODEL_PRESETS["llama3-8b"])
    assert layers_that_fit(model, 40 * 10**9) == 32, "8.03 billion parameters in fp32 are 32.1 GB"
    assert layers_that_fit(model, 32 * 10**9) == 31
    assert layers_that_fit(model, 16 * 10**9) == 13, "the two embeddings are 4.2 GB, a layer 0.87 GB"
    assert layers_that_fit(model, 4 * 10**9) == 0
