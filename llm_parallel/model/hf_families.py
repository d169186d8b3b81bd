"""What every Hugging Face family that we know means by its ``config.json``: one row for each, and nothing elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_parallel.config.tree import ModelConfig

SWITCHES = (
    "qkv_bias",
    "attention_output_bias",
    "mlp_bias",
    "qk_norm",
    "qk_norm_over_heads",
    "norm_outputs",
    "window_tokens",
    "layers_without_rope",
    "attention_softcap",
    "output_softcap",
)
"""Fields of ``model`` in which families differ; all are off (false, none or 0) in a Llama."""
EVERYWHERE: Mapping[str, Any] = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "max_position_embeddings": 2048,
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
"""What transformers takes where a ``config.json`` leaves a field out, in most families."""
BOTH = ("qkv_bias", "attention_output_bias")
FULL: Mapping[str, Any] = {"use_sliding_window": False}
FUSED: Mapping[str, str] = {
    "self_attn.q_proj.weight": "self_attn.qkv_proj.weight",
    "self_attn.k_proj.weight": "self_attn.qkv_proj.weight",
    "self_attn.v_proj.weight": "self_attn.qkv_proj.weight",
    "mlp.gate_proj.weight": "mlp.gate_up_proj.weight",
    "mlp.up_proj.weight": "mlp.gate_up_proj.weight",
}


@dataclass(frozen=True)
class Family:
    """One row of the table.

    class_name: begin of transformers' class names; defaults: what transformers takes for fields that are left out, if
    not as ``EVERYWHERE``; always: switches that are on in every model of the family; by_field: fields of
    ``config.json`` that turn switches on; window: whether ``sliding_window`` limits attention in all layers;
    skips_rope: whether ``no_rope_layers`` (or ``no_rope_layer_interval``) leaves the rotary embedding out in some
    layers; needed: fields with the one value that can be converted; fused: matrices of a Llama that stand one after
    the other in another tensor of its files; scalings: kinds of rotary scaling, all of ours if not given.
    """

    class_name: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    always: Sequence[str] = ()
    by_field: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    window: bool = False
    skips_rope: bool = False
    needed: Mapping[str, Any] = field(default_factory=dict)
    fused: Mapping[str, str] = field(default_factory=dict)
    scalings: Sequence[str] | None = None

    def default(self, name: str) -> Any:
        """Value of a field that a ``config.json`` leaves out."""
        return {**EVERYWHERE, **self.defaults}.get(name)

    def fits(self, model: ModelConfig) -> bool:
        """Whether a ``config.json`` of this family can say what the model is."""
        used = switches_of(model)
        allowed = {*self.always, *(name for names in self.by_field.values() for name in names)}
        allowed |= {"window_tokens"} if self.window else set()
        allowed |= {"layers_without_rope"} if self.skips_rope else set()
        whole = all(used.issuperset(names) or used.isdisjoint(names) for names in self.by_field.values())
        scaling = model.rope_scaling
        scales = scaling is None or self.scalings is None or scaling.kind in self.scalings
        return used <= allowed and used.issuperset(self.always) and whole and scales

    def settings(self, model: ModelConfig) -> dict[str, Any]:
        """Fields of ``config.json`` for what only some families have."""
        used = switches_of(model)
        found: dict[str, Any] = {name: used.issuperset(names) for name, names in self.by_field.items()}
        if self.window:
            found["sliding_window"] = model.window_tokens
        if self.skips_rope:
            found["no_rope_layers"] = [int(n not in model.layers_without_rope) for n in range(model.num_layers)]
        return found | {name: value for name, value in self.needed.items() if name not in EVERYWHERE}


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "Llama", by_field={"attention_bias": BOTH, "mlp_bias": ("mlp_bias",)}, needed={"pretraining_tp": 1}
    ),
    "mistral": Family(
        "Mistral",
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        window=True,
    ),
    "qwen2": Family(
        "Qwen2",
        {"num_key_value_heads": 32, "max_position_embeddings": 32768},
        always=("qkv_bias",),
        needed=FULL,
    ),
    "qwen3": Family(
        "Qwen3",
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
        always=("qk_norm",),
        by_field={"attention_bias": BOTH},
        needed=FULL,
    ),
    "smollm3": Family(
        "SmolLM3",
        {
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2000000.0,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
        },
        by_field={"attention_bias": BOTH, "mlp_bias": ("mlp_bias",)},
        skips_rope=True,
        needed=FULL,
    ),
    "olmo2": Family(
        "Olmo2",
        {"rms_norm_eps": 1e-5},
        always=("qk_norm_over_heads", "norm_outputs"),
        by_field={"attention_bias": BOTH},
    ),
    "phi3": Family(
        "Phi3",
        {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        window=True,
        needed={"resid_pdrop": 0.0, "embd_pdrop": 0.0},
        fused=FUSED,
        scalings=("longrope",),
    ),
}
"""Families by their ``model_type``. An exported model becomes the first that fits it, unless it came from another."""

NEEDED_EVERYWHERE: Mapping[str, Any] = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "rope_interleaved": False,
    "use_sliding_window": False,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": None,
    "scale_emb": 1.0,
    "scale_depth": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "query_pre_attn_scalar": None,
    "num_experts": None,
    "num_local_experts": None,
    "n_routed_experts": None,
    "kv_lora_rank": None,
    "attention_chunk_size": None,
    "parallel_attn": False,
    "use_parallel_residual": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
}
"""Fields of config.json that would change what a model computes, with the value that changes nothing."""
READ = frozenset(
    {
        *("model_type", "architectures", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"),
        *("num_attention_heads", "quantization_config", "layer_types", "rope_scaling", "rope_parameters"),
        *("partial_rotary_factor", "original_max_position_embeddings", "sliding_window", "use_sliding_window"),
        *("max_window_layers", "attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "use_cache"),
    }
)
"""Fields that decide nothing beyond what the table reads, or are carried along."""
HARMLESS = frozenset(
    {
        *("transformers_version", "_name_or_path", "name_or_path", "_attn_implementation", "attn_implementation"),
        *("return_dict", "output_hidden_states", "output_attentions", "torchscript", "use_bfloat16", "pruned_heads"),
        *("chunk_size_feed_forward", "is_decoder", "cross_attention_hidden_size", "decoder_start_token_id"),
        *("id2label", "label2id", "problem_type", "task_specific_params", "finetuning_task", "tokenizer_class"),
        *("prefix", "sep_token_id", "unsloth_version", "unsloth_fixed", "_commit_hash"),
        *(
            "transformers.js_config",
            "tf_legacy_loss",
            "tie_encoder_decoder",
            "return_dict_in_generate",
            "is_llama_config",
        ),
        *("max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "typical_p", "num_beams"),
        *("repetition_penalty", "length_penalty", "early_stopping", "num_return_sequences", "num_beam_groups"),
        *("diversity_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
        *("output_scores", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "suppress_tokens"),
        *("exponential_decay_length_penalty", "begin_suppress_tokens"),
    }
)
"""Fields that say nothing about the function; a folder need not be asked about them."""


def switches_of(model: ModelConfig) -> set[str]:
    """The switches that a model has on."""
    return {name for name in SWITCHES if getattr(model, name)}


def known_families() -> str:
    """The families in words, for messages."""
    return ", ".join(f"'{name}'" for name in FAMILIES)
