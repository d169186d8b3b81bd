"""Checks that two models hold tensors of the same shapes and meaning."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from llm_parallel.config.tree import ModelConfig
from llm_parallel.errors import UserError

# The rest (rotary base and scaling, epsilon, context) may be changed on purpose, as for a longer context.
ARCHITECTURE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "tie_embeddings",
    "qkv_bias",
    "attention_output_bias",
    "mlp_bias",
    "qk_norm",
    "qk_norm_over_heads",
    "norm_outputs",
    "value_head",
)


def check_same_architecture(
    folder: str | Path, theirs: ModelConfig, ours: ModelConfig, but_for: Collection[str] = ()
) -> None:
    """Raises UserError that names every field in which the model in ``folder`` differs from the configured one;
    ``but_for``: fields that may."""
    differences = [
        f"model.{name} is {getattr(theirs, name)} there and {getattr(ours, name)} here"
        for name in ARCHITECTURE
        if getattr(theirs, name) != getattr(ours, name) and name not in but_for
    ]
    if differences:
        raise UserError(f"{folder} holds another model: {'; '.join(differences)}; make them the same")
