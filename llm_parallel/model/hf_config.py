"""Converts between Hugging Face's ``config.json`` of a Llama, Mistral, Qwen2 or Qwen3 and our ModelConfig."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llm_parallel.config.tree import ModelConfig
from llm_parallel.errors import UserError
from llm_parallel.model.hf_rope import hf_to_rope, rope_to_hf

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Options that our model does not have: key → the one value that means that the option is not used.
_MUST_BE = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "use_sliding_window": False,
}


def is_hf_folder(path: str | Path) -> bool:
    """Whether ``path`` is a folder with a Hugging Face model in safetensors files."""
    folder = Path(path)
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """The parsed ``config.json``. Raises UserError if it is missing or is no JSON object."""
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a Hugging Face model folder") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object; give a Hugging Face model folder")
    return values


def hf_config_to_model(values: dict[str, Any]) -> ModelConfig:
    """Our configuration of a Hugging Face model. Raises UserError that names what we cannot represent, and what is
    missing or no value of its field."""
    try:
        return _to_model(values)
    except KeyError as error:
        raise UserError(f"config.json has no {error.args[0]}; give a complete Hugging Face folder") from error
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UserError(f"config.json gives model.{name} = {first['input']!r}: {first['msg'].lower()}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"config.json holds a value of the wrong kind ({error})") from error


def _to_model(values: dict[str, Any]) -> ModelConfig:
    family = values.get("model_type")
    if family not in FAMILIES:
        known = "', '".join(FAMILIES)
        raise UserError(f"model_type is {family!r} in config.json; only '{known}' can be converted")
    for key, needed in _MUST_BE.items():
        if values.get(key, needed) not in (needed, None):
            raise UserError(f"{key} is {values[key]!r} in config.json; only {needed!r} can be converted")
    if values.get("quantization_config") is not None:
        raise UserError("quantization_config is given in config.json; only weights that are not quantized can be read")
    kinds = {kind for kind in values.get("layer_types") or () if kind not in ("full_attention", "sliding_attention")}
    if kinds or (family != "mistral" and "sliding_attention" in (values.get("layer_types") or ())):
        raise UserError(f"layer_types is {values['layer_types']} in config.json; only full attention can be converted")
    if values["vocab_size"] is None:
        raise UserError("vocab_size is null in config.json; give the number of the embedding's rows")
    heads = values["num_attention_heads"]
    longest = values.get("max_position_embeddings", 2048)
    base, scaling, longest = hf_to_rope(values, longest)
    window = values.get("sliding_window", 4096) if family == "mistral" else None
    attention_bias = bool(values.get("attention_bias", False)) and family in ("llama", "qwen3")
    return ModelConfig(
        num_layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        ffn_hidden_size=values["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or (128 if family == "qwen3" else None),
        vocab_size=values["vocab_size"],
        max_seq_length_tokens=longest,
        norm_epsilon=values.get("rms_norm_eps", 1e-6),
        rope_base=base,
        rope_scaling=scaling,
        window_tokens=window,
        qkv_bias=attention_bias or family == "qwen2",
        attention_output_bias=attention_bias,
        mlp_bias=bool(values.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
        tie_embeddings=values.get("tie_word_embeddings", False),
        init_std=values.get("initializer_range", 0.02),
    )


def family_of(model: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The Hugging Face family that has all options of a model, and its settings for them. Raises UserError if none
    has."""
    options = {
        "window_tokens": model.window_tokens is not None,
        "qkv_bias": model.qkv_bias,
        "attention_output_bias": model.attention_output_bias,
        "mlp_bias": model.mlp_bias,
        "qk_norm": model.qk_norm,
        "attention_softcap": model.attention_softcap > 0,
        "output_softcap": model.output_softcap > 0,
    }
    used = {name for name, on in options.items() if on}
    if used == {"window_tokens"}:
        return "mistral", {"sliding_window": model.window_tokens}
    if used == {"qkv_bias"}:
        return "qwen2", {"use_sliding_window": False}
    both = {"qkv_bias", "attention_output_bias"}
    if used - both == {"qk_norm"} and (used & both) in (set(), both):
        return "qwen3", {"attention_bias": model.qkv_bias, "use_sliding_window": False}
    if used <= {*both, "mlp_bias"} and (used & both) in (set(), both):
        return "llama", {"attention_bias": model.qkv_bias, "mlp_bias": model.mlp_bias}
    named = ", ".join(f"model.{name}" for name in sorted(used))
    raise UserError(f"no known Hugging Face family has {named} together; this model cannot be exported")


def model_to_hf_config(model: ModelConfig, dtype: str, special: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` that transformers before and after version 5 read alike. ``special``: ids of begin and end.

    Raises UserError if no family has the model's options."""
    family, settings = family_of(model)
    class_name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    scaling, longest = rope_to_hf(model)
    return {
        "architectures": [f"{class_name}ForCausalLM"],
        "model_type": family,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": longest,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_base,
        "rope_scaling": scaling if model.rope_scaling is not None else None,
        "rope_parameters": {**scaling, "rope_theta": model.rope_base},
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **settings,
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
        **special,
    }
