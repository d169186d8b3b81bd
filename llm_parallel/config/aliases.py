"""Names that other systems give to our fields, so that their users can write what they know.

An alias is understood at the top of a file (Megatron's and Hugging Face's files are flat) and inside any section.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Alias:
    """Another name of a field."""

    target: str
    """Our dotted name."""
    convert: Callable[[Any], Any] | None = None
    """Maps the other system's value to ours; raises ``KeyError`` for one that has no counterpart."""
    allowed: str = ""
    """Values that ``convert`` understands, in words."""


def _by_table(target: str, table: dict[Any, Any]) -> Alias:
    return Alias(target, table.__getitem__, " or ".join(str(key).lower() for key in table))


def _zeros(flags: Any) -> list[int]:
    """Places of the zeros of a list of 0 and 1."""
    if not isinstance(flags, list) or not set(flags) <= {0, 1}:
        raise KeyError(flags)
    return [place for place, flag in enumerate(flags) if not flag]


_NAMES = {
    "parallel.tp": "tp tensor_model_parallel_size tensor_parallel_size tensor_parallel_degree",
    "parallel.pp": "pp pipeline_model_parallel_size pipeline_parallel_size pipeline_parallel_degree",
    "parallel.cp": "cp context_parallel_size context_parallel_degree",
    "parallel.dp": "dp data_parallel_size dp_shard_size",
    "parallel.vpp": "vpp virtual_pipeline_model_parallel_size",
    "parallel.sequence_parallel": "sequence_parallel",
    "parallel.distributed_optimizer": "use_distributed_optimizer",
    "parallel.recompute": "recompute_granularity",
    "parallel.recompute_method": "recompute_method",
    "parallel.recompute_num_layers": "recompute_num_layers",
    "parallel.recompute_modules": "recompute_modules",
    "model.num_layers": "num_layers num_hidden_layers",
    "model.hidden_size": "hidden_size",
    "model.ffn_hidden_size": "ffn_hidden_size intermediate_size",
    "model.num_attention_heads": "num_attention_heads",
    "model.num_query_groups": "num_query_groups num_key_value_heads",
    "model.head_dim": "kv_channels",
    "model.vocab_size": "vocab_size",
    "model.max_seq_length_tokens": "max_position_embeddings",
    "model.norm_epsilon": "norm_epsilon layernorm_epsilon rms_norm_eps",
    "model.rope_base": "rotary_base rope_theta",
    "model.window_tokens": "sliding_window",
    "model.attention_softcap": "attn_logit_softcapping",
    "model.output_softcap": "final_logit_softcapping",
    "model.qkv_bias": "add_qkv_bias",
    "model.qk_norm": "qk_layernorm",
    "model.tie_embeddings": "tie_word_embeddings",
    "model.init_std": "init_method_std initializer_range",
    "data.seq_length_tokens": "seq_length sequence_len seq_len cutoff_len max_seq_length max_length",
    "data.tokenizer": "tokenizer_model tokenizer_path",
    "train.micro_batch_size": "micro_batch_size per_device_train_batch_size local_batch_size",
    "train.global_batch_size": "global_batch_size",
    "train.steps": "train_iters max_steps",
    "train.eval_interval_steps": "eval_interval eval_steps",
    "optim.lr": "lr learning_rate",
    "optim.min_lr": "min_lr",
    "optim.warmup_steps": "warmup_steps lr_warmup_iters",
    "optim.decay_steps": "lr_decay_iters",
    "optim.schedule": "lr_decay_style lr_scheduler_type",
    "optim.beta1": "adam_beta1",
    "optim.beta2": "adam_beta2",
    "optim.epsilon": "adam_eps adam_epsilon",
    "optim.weight_decay": "weight_decay",
    "optim.clip_grad": "clip_grad max_grad_norm gradient_clipping",
    "checkpoint.interval_steps": "save_interval save_steps",
    "checkpoint.keep_every_steps": "save_retain_interval",
    "checkpoint.keep_last": "save_total_limit keep_latest_k",
    "checkpoint.asynchronous": "async_save",
    "checkpoint.load": "pretrained_checkpoint initial_load_path",
    "log.interval_steps": "log_interval logging_steps",
    "log.wandb_project": "wandb_project",
    "run_dir": "save output_dir out_dir dump_folder",
}

ALIASES: dict[str, Alias] = {
    alias: Alias(target) for target, aliases in _NAMES.items() for alias in aliases.split()
} | {
    "bf16": _by_table("train.precision", {True: "bf16", False: "fp32"}),
    "no_rope_layers": Alias("model.layers_without_rope", _zeros, "a list with 1 (rotated) or 0 for each layer"),
    "untie_embeddings_and_output_weights": _by_table("model.tie_embeddings", {True: False, False: True}),
}

ALIASES_INSIDE: dict[str, dict[str, Alias]] = {
    "model.rope_scaling": {
        "rope_type": Alias("model.rope_scaling.kind"),
        "type": Alias("model.rope_scaling.kind"),
        "original_max_position_embeddings": Alias("model.rope_scaling.original_max_position"),
        "short_factor": Alias("model.rope_scaling.short_factors"),
        "long_factor": Alias("model.rope_scaling.long_factors"),
    }
}
"""Other names of the fields of one section, by the section; understood only there."""
