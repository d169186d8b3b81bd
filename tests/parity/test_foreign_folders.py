"""Hugging Face folders as they are found: what is not what its config.json says is refused or named, never read on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_parallel.convert.importing import import_from_hf
from llm_parallel.errors import UserError
from llm_parallel.generate.load import describe_folder
from llm_parallel.model.hf_config import hf_config_to_model, model_to_hf_config
from tests.support.parity_models import random_folder

PLAIN: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ({"vocab_size": None}, "vocab_size is null"),
    ({"rms_norm_eps": None}, "norm_epsilon"),
    ({"num_hidden_layers": 0}, "num_layers = 0"),
    ({"num_hidden_layers": 2.5}, "num_layers = 2.5"),
    ({"model_type": "mistral", "sliding_window": 0}, "window_tokens = 0"),
    ({"model_type": "mistral", "sliding_window": -1}, "window_tokens = -1"),
    ({"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"rope_scaling": "linear"}, "rotary scaling"),
    ({"rope_scaling": ["linear", 2]}, "rotary scaling"),
    ({"rope_scaling": {"type": "linear"}}, "has no factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "has no low_freq_factor"),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": 1.0, "long_factor": 2.0}}, "wrong kind"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one for all layers"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": "x"}}, "wrong kind"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_config_json_that_means_nothing_is_refused_in_one_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as found:
        hf_config_to_model({**PLAIN, **changes})
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"])
def test_what_is_missing_is_named(key: str) -> None:
    with pytest.raises(UserError, match=f"config.json has no {key}"):
        hf_config_to_model({name: value for name, value in PLAIN.items() if name != key})


def test_where_two_places_say_a_thing_transformers_order_holds() -> None:
    newer = {"rope_type": "default", "rope_theta": 5e5}
    model = hf_config_to_model({**PLAIN, "rope_parameters": newer, "rope_scaling": {"type": "linear", "factor": 4.0}})
    assert model.rope_scaling is not None
    assert (model.rope_scaling.kind, model.rope_scaling.factor, model.rope_base) == ("linear", 4.0, 5e5)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    model = hf_config_to_model({**PLAIN, "rope_scaling": yarn, "original_max_position_embeddings": 32})
    assert model.rope_scaling is not None and model.rope_scaling.original_max_position == 32


def test_a_window_as_long_as_the_context_stays() -> None:
    model = hf_config_to_model({**PLAIN, "model_type": "mistral", "sliding_window": 128})
    assert model.window_tokens == 128
    assert model_to_hf_config(model, "float32", {})["sliding_window"] == 128


def test_qwen2_has_no_bias_of_the_output_whatever_its_file_says() -> None:
    model = hf_config_to_model({**PLAIN, "model_type": "qwen2", "attention_bias": True})
    assert model.qkv_bias and not model.attention_output_bias


def rewritten(folder: Path, change: Any) -> Path:
    """The folder with its tensors in one file, changed."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors.update(load_file(path))
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def described(folder: Path, **changes: Any) -> Path:
    """The folder with its config.json changed."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def converted(folder: Path, target: Path) -> list[str]:
    """What a conversion says."""
    said: list[str] = []
    import_from_hf(folder, target, describe_folder(folder), said.append)
    return said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"intermediate_size": 128}, "has shape"),
        ({"num_key_value_heads": 2}, "has shape"),
        ({"vocab_size": 200}, "has shape"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
    ],
    ids=str,
)
def test_tensors_of_another_size_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = described(random_folder("llama-2", tmp_path / "hf"), **changes)
    with pytest.raises(UserError, match=said):
        converted(folder, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints" / "iter_0000000").exists()


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def to_int8(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = (tensors[name] * 100).to(torch.int8)

    with pytest.raises(UserError, match=f"{name} .* is I8; only weights in fp32, bf16 or fp16"):
        converted(rewritten(random_folder("llama-2", tmp_path / "hf"), to_int8), tmp_path / "run")


def test_tensors_that_are_not_used_are_named(tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    (said,) = converted(rewritten(random_folder("llama-2", tmp_path / "hf"), add), tmp_path / "run")
    assert said.endswith("are left out: model.layers.0.self_attn.q_proj.bias")


def test_an_output_projection_that_is_not_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = described(random_folder("llama-2", tmp_path / "hf"), tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"differs from model\.embed_tokens\.weight"):
        converted(folder, tmp_path / "run")


def test_a_tensor_that_is_not_used_does_not_decide_the_dtype(tmp_path: Path) -> None:
    """As in old Llama folders: weights in bf16, and rotary frequencies in fp32."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    folder = rewritten(random_folder("llama-2", tmp_path / "hf", torch.bfloat16), add)
    assert describe_folder(folder).train.precision == "bf16"
    assert converted(folder, tmp_path / "run") == []


def test_the_widest_dtype_is_kept(tmp_path: Path) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()

    folder = rewritten(random_folder("llama-2", tmp_path / "hf"), narrow)
    assert describe_folder(folder).train.precision == "fp32"
    (said,) = converted(folder, tmp_path / "run")
    assert said == "weights are in BF16 and F32 (BF16: model.norm.weight); all are taken as float32"
    assert describe_folder(tmp_path / "run").train.precision == "fp32"
