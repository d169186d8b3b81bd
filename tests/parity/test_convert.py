"""Hugging Face → ours → Hugging Face is bit-exact, in any dtype, and what cannot be converted is refused with the
reason."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llm_parallel.config.presets import MODEL_PRESETS
from llm_parallel.config.tree import ModelConfig
from llm_parallel.convert.export import export_to_hf
from llm_parallel.convert.importing import import_from_hf
from llm_parallel.errors import UserError
from llm_parallel.generate.load import describe_folder
from llm_parallel.model.hf_config import hf_config_to_model, model_to_hf_config
from tests.support.harness import run_ranks
from tests.support.parity_models import RANDOM, load_hf, random_folder


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        found.update(load_file(path))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", RANDOM)
def test_round_trip_is_bit_exact(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = random_folder(kind, tmp_path / "hf", dtype)
    import_from_hf(folder, tmp_path / "run", describe_folder(folder))
    back = export_to_hf(tmp_path / "run", tmp_path / "back", max_shard_bytes=150_000)
    before, after = tensors_in(folder), tensors_in(back)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    assert (back / "model.safetensors.index.json").is_file()
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(before)
    old, new = (hf_config_to_model(json.loads((f / "config.json").read_text())) for f in (folder, back))
    assert old.model_copy(update={"head_dim": None}) == new.model_copy(update={"head_dim": None})
    assert old.kv_channels == new.kv_channels


def test_transformers_reads_the_export(tmp_path: Path) -> None:

    folder = random_folder("llama-3.1 tied", tmp_path / "hf")
    import_from_hf(folder, tmp_path / "run", describe_folder(folder))
    back = export_to_hf(tmp_path / "run", tmp_path / "back")
    tokens = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        before, after = (load_hf(f, torch.float32)(tokens).logits for f in (folder, back))
    assert torch.equal(before, after)


def trained_and_saved(rank: int, world_size: int, folder: str) -> None:
    from llm_parallel.checkpoint.state import TrainState
    from tests.support.ckpt_jobs import open_store
    from tests.support.job import base_config, changed, open_engine, train_steps

    norms = {"model.qk_norm_over_heads": True, "model.norm_outputs": True}  # the first of which tp divides
    config = changed(base_config(), {"parallel.tp": 2, "parallel.pp": 2, "model.vocab_size": 101} | norms)
    engine = open_engine(config, rank, world_size)
    train_steps(engine, config, 0, 2)
    open_store(engine, config, folder).save({"policy": engine}, TrainState(step=2), blocking=True)


def model_logits(rank: int, world_size: int, folder: str) -> np.ndarray:
    from llm_parallel.generate.forward import pipeline_logits
    from llm_parallel.generate.load import load_model

    with torch.no_grad():
        logits = pipeline_logits(load_model(folder, "cpu").models, torch.arange(30).unsqueeze(0))
    assert logits is not None
    return logits.numpy()


@pytest.mark.gloo
def test_a_checkpoint_of_any_layout_exports_without_padding(tmp_path: Path) -> None:

    run_ranks(trained_and_saved, 4, str(tmp_path / "checkpoints"))
    back = export_to_hf(tmp_path / "checkpoints", tmp_path / "hf")
    model = load_hf(back, torch.float32)
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == 101
    with torch.no_grad():
        theirs = model(torch.arange(30).unsqueeze(0)).logits.numpy()
    ours = run_ranks(model_logits, 1, str(tmp_path / "checkpoints"))[0]
    assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.parametrize("name", MODEL_PRESETS)
def test_every_preset_survives_config_json(name: str) -> None:
    model = ModelConfig.model_validate({"vocab_size": 32000, **MODEL_PRESETS[name]})
    assert hf_config_to_model(model_to_hf_config(model, "bfloat16", {})) == model.model_copy(
        update={"head_dim": model.kv_channels}
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "gemma2"),
        ("use_sliding_window", True),
        ("hidden_act", "gelu"),
        ("rope_scaling", {"rope_type": "proportional", "factor": 4.0}),
        ("partial_rotary_factor", 0.5),
    ],
)
def test_what_cannot_be_represented_is_named(key: str, value: object, tmp_path: Path) -> None:
    values = model_to_hf_config(ModelConfig(vocab_size=100), "float32", {})
    values.pop("rope_parameters")
    with pytest.raises(UserError, match="proportional" if key == "rope_scaling" else key):
        hf_config_to_model({**values, key: value})


@pytest.mark.parametrize("option", ["attention_softcap", "output_softcap"])
def test_what_no_family_has_is_not_exported(option: str) -> None:
    with pytest.raises(UserError, match=option):
        model_to_hf_config(ModelConfig(vocab_size=100, **{option: 30.0}), "float32", {})
    with pytest.raises(UserError, match=r"model\.mlp_bias, model\.qk_norm"):
        model_to_hf_config(ModelConfig(vocab_size=100, qk_norm=True, mlp_bias=True), "float32", {})


def test_targets_are_not_overwritten_and_damage_is_said(tmp_path: Path) -> None:
    folder = random_folder("llama-2", tmp_path / "hf")
    config = describe_folder(folder)
    import_from_hf(folder, tmp_path / "run", config)
    with pytest.raises(UserError, match="not empty"):
        import_from_hf(folder, tmp_path / "run", config)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="not empty"):
        export_to_hf(tmp_path / "run", tmp_path / "full")
    next(folder.glob("model-*.safetensors")).write_bytes(b"short")
    with pytest.raises(UserError, match="cannot be read"):
        import_from_hf(folder, tmp_path / "other", config)
    assert not any((tmp_path / "other" / "checkpoints").iterdir()), "nothing half-written stays"
