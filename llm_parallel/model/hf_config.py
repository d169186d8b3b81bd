"""Hugging Face's ``config.json`` of a Llama or a Mistral (a Llama with a window) ↔ our ModelConfig."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm_parallel.config.tree import ModelConfig, RopeScaling
from llm_parallel.errors import UserError

# What our model has no room for: key → the one value that means it is not used.
_MUST_BE = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
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
    """Our configuration of a Hugging Face Llama or Mistral. Raises UserError that names what we cannot represent."""
    if values.get("model_type") not in ("llama", "mistral"):
        raise UserError(
            f"model_type is {values.get('model_type')!r} in config.json; only 'llama' and 'mistral' can be converted"
        )
    for key, needed in _MUST_BE.items():
        if values.get(key, needed) not in (needed, None):
            raise UserError(f"{key} is {values[key]!r} in config.json; only {needed!r} can be converted")
    heads = values["num_attention_heads"]
    base, scaling = _rope(values)
    longest = values.get("max_position_embeddings", 2048)
    window = values.get("sliding_window") if values["model_type"] == "mistral" else None
    return ModelConfig(
        num_layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        ffn_hidden_size=values["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim"),
        vocab_size=values["vocab_size"],
        max_seq_length_tokens=longest,
        norm_epsilon=values.get("rms_norm_eps", 1e-6),
        rope_base=base,
        rope_scaling=scaling,
        window_tokens=window if window and window < longest else None,
        tie_embeddings=values.get("tie_word_embeddings", False),
        init_std=values.get("initializer_range", 0.02),
    )


def _rope(values: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before)."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    base = float(rope.get("rope_theta") or values.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise UserError(f"rope_type is {kind!r} in config.json; only 'default' and 'llama3' can be converted")
    return base, RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_position=rope["original_max_position_embeddings"],
    )


def model_to_hf_config(model: ModelConfig, dtype: str, special: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` that transformers before and after version 5 read alike. ``special``: ids of begin and end."""
    if model.attention_softcap or model.output_softcap:
        name = "attention_softcap" if model.attention_softcap else "output_softcap"
        raise UserError(
            f"model.{name} is {getattr(model, name)}, which Hugging Face's Llama and Mistral do not have; this model "
            "cannot be exported"
        )
    window = {"sliding_window": model.window_tokens} if model.window_tokens else {}
    family = "mistral" if window else "llama"
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling is not None:
        scaling = model.rope_scaling
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    return {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        **window,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_seq_length_tokens,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_base,
        "rope_scaling": rope if model.rope_scaling is not None else None,
        "rope_parameters": {**rope, "rope_theta": model.rope_base},
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
        **special,
    }
