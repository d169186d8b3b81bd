"""Models of both sides for parity tests."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_parallel.config.tree import DataConfig, ParallelConfig, RunConfig
from llm_parallel.model.hf_families import FAMILIES
from llm_parallel.versions import parse

RANDOM = {
    "llama-2": {"num_key_value_heads": 4},
    "grouped": {"num_key_value_heads": 2, "head_dim": 24},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 12},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 24},
    "llama with every bias": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "smollm3": {"num_key_value_heads": 2, "tie_word_embeddings": True, "no_rope_layer_interval": 2},
    "olmo2": {"num_key_value_heads": 2},
    "phi3": {"num_key_value_heads": 2, "sliding_window": 12},
    "linear": {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "dynamic, longer than its context": {
        "num_key_value_heads": 2,
        "max_position_embeddings": 40,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
    },
    "qwen2 yarn": {
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "longrope": {
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "short_factor": [1.0 + i / 20 for i in range(8)],
            "long_factor": [1.5 + i for i in range(8)],
        },
    },
    "llama-3.1 tied": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}


def _as_this_version_has_it(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of transformers 5 in the words of the installed one: before 5 the rotary embedding's stood apart, and
    before 4.46 a Llama's heads were always ``hidden_size / num_attention_heads`` wide."""
    version, settings = parse(metadata.version("transformers")), dict(settings)
    if version < (5,) and "rope_parameters" in settings:
        rope = dict(settings.pop("rope_parameters"))
        settings |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    if version < (4, 46):
        settings.pop("head_dim", None)
    return settings


def load_hf(folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    """transformers' model of a folder, whatever its version calls the dtype."""
    from transformers import AutoModelForCausalLM

    name = "dtype" if parse(metadata.version("transformers")) >= (4, 56) else "torch_dtype"
    return AutoModelForCausalLM.from_pretrained(folder, **{name: dtype}, **options)


def random_folder(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Hugging Face folder of a random Llama or Mistral with an odd vocabulary, and weights that are large enough to
    tell mistakes apart."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 301,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "rms_norm_eps": 1e-5,
    }
    family = next((name for name in FAMILIES if kind.startswith(name)), "llama")
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {metadata.version('transformers')} has no {family}")
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = AutoConfig.for_model(family, **_as_this_version_has_it({**settings, **special, **RANDOM[kind]}))
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder, max_shard_size="200KB")
    return folder


def hf_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """transformers' logits [b, s, v] in fp64, so that a difference is our error alone: its own fp32 logits are 6.9e-5
    from them for SmolLM2-135M."""
    model = load_hf(folder, torch.float64, attn_implementation="sdpa").eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def our_config(folder: str, seq_length: int, **parallel: Any) -> RunConfig:
    """Run configuration of the model in a Hugging Face folder."""
    from llm_parallel.model.hf_config import hf_config_to_model
    from llm_parallel.model.hf_files import read_hf_config

    model = hf_config_to_model(read_hf_config(folder))
    return RunConfig(
        device="cpu",
        model=model,
        data=DataConfig(seq_length_tokens=seq_length),
        parallel=ParallelConfig(**parallel),
    )


def open_models(config: RunConfig, rank: int, world_size: int) -> Any:
    """Model chunks of this rank."""
    return open_network(config, rank, world_size).models


def open_network(config: RunConfig, rank: int, world_size: int) -> Any:
    """This rank's part of a model, with random weights."""
    from llm_parallel.config.rules import check_config
    from llm_parallel.model.gpt import build_policy
    from llm_parallel.parallel.groups import open_groups
    from llm_parallel.parallel.layout import Layout
    from llm_parallel.parallel.platform import open_platform

    check_config(config, world_size, "cpu")
    groups = open_groups(Layout.from_config(config, world_size), rank, open_platform("cpu"), config.seed)
    return build_policy(config, groups)


def logits_job(
    rank: int, world_size: int, folder: str, tokens: np.ndarray, parallel: dict[str, Any]
) -> np.ndarray | None:
    """Our logits [b, s, v] of a Hugging Face folder under a layout; from one rank of the last stage, None elsewhere."""
    from llm_parallel.generate.forward import pipeline_logits
    from llm_parallel.model.hf import load_hf_weights

    models = open_models(our_config(folder, tokens.shape[1], **parallel), rank, world_size)
    load_hf_weights(folder, models)
    with torch.no_grad():
        logits = pipeline_logits(models, torch.from_numpy(tokens))
    return None if logits is None or models[0].groups.at.tp else logits.numpy()
