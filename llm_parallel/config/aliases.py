"""Names that other systems give to our fields, so that their users can write what they know.

An alias is understood at the top of a file (Megatron's and Hugging Face's files are flat), inside any section of ours,
and inside the sections of another system. ``foreign.py`` has the names that have no field here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    is_flag: bool = False
    """On a command line it may stand without a value, which means true."""
    several: bool = False
    """On a command line it may have several values, which ``convert`` gets as one text with blanks between them."""


def _by_table(target: str, table: Mapping[Any, Any], more: str = "") -> Alias:
    allowed = " or ".join(dict.fromkeys(str(key).lower() for key in table))
    plain = {str(key).lower(): value for key, value in table.items()}
    return Alias(target, lambda value: plain[str(value).lower()], allowed + more, is_flag=True in table)


def _scaled(target: str, factor: float, words: str) -> Alias:
    def convert(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise KeyError(value)
        return value * factor

    return Alias(target, convert, words)


def _blend(value: Any) -> Any:
    """Megatron's weights and prefixes in turn, ``0.3 a 0.7 b`` or a list of such, as sources."""
    parts = value.split() if isinstance(value, str) else value
    if not isinstance(parts, list) or not parts:
        raise KeyError(value)
    if not any(_is_number(part) for part in parts):
        return [str(part) for part in parts]
    if len(parts) % 2 or not all(_is_number(part) for part in parts[::2]):
        raise KeyError(value)
    return [{"path": str(path), "weight": float(weight)} for weight, path in zip(parts[::2], parts[1::2])]


def _is_number(part: Any) -> bool:
    return isinstance(part, int | float) or (isinstance(part, str) and part.replace(".", "", 1).isdecimal())


def _items(value: Any) -> list[Any]:
    """A list, or words with blanks between them."""
    return list(value) if isinstance(value, list) else str(value).split()


def _rampup(value: Any) -> dict[str, Any]:
    """Megatron's ``32 32 1000`` as a section."""
    parts = value.split() if isinstance(value, str) else value
    if not isinstance(parts, list) or len(parts) != 3:
        raise KeyError(value)
    return dict(zip(("start", "increment", "samples"), map(int, parts)))


def _held_out(value: Any) -> float:
    """Megatron's ``949,50,1``: documents for training, validation and test. Here the last two are held out together."""
    parts = [float(part) for part in (value if isinstance(value, list) else str(value).split(","))]
    if not 1 <= len(parts) <= 3 or min(parts) < 0 or parts[0] == 0:
        raise KeyError(value)
    return round(sum(parts[1:]) / sum(parts), 9)


_PROJECTIONS = {f"{name}_proj": name for name in ("q", "k", "v", "o", "gate", "up", "down")}
_OF_VOCABULARY = {name: name for name in ("embed_tokens", "lm_head")}


def _projections(value: Any) -> list[str]:
    """Projections by Hugging Face's names, ``q_proj,v_proj`` or a list of such, by ours."""
    if str(value).lower() in ("all", "all-linear", "true"):
        return list(_PROJECTIONS.values())
    return [{**_PROJECTIONS, **_OF_VOCABULARY}[part] for part in _parts(value)]


def _parts(value: Any) -> list[str]:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else list(value)


def _whole_modules(value: Any) -> list[str]:
    """Modules that are trained whole beside adapters."""
    return [_OF_VOCABULARY[part] for part in _parts(value)]


def _interpolated(value: Any) -> dict[str, Any]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise KeyError(value)
    return {"kind": "linear", "factor": value}


def _fraction(value: Any) -> float:
    if isinstance(value, bool) or not 0 <= float(value) < 1:
        raise KeyError(value)
    return float(value)


def _template(value: Any) -> str | None:
    if value in (None, "tokenizer_default"):
        return None
    if value == "chatml" or str(value).endswith((".jinja", ".jinja2", ".j2")):
        return str(value)
    raise KeyError(value)


def _zeros(flags: Any) -> list[int]:
    """Places of the zeros of a list of 0 and 1."""
    if not isinstance(flags, list) or not set(flags) <= {0, 1}:
        raise KeyError(flags)
    return [place for place, flag in enumerate(flags) if not flag]


_NAMES = {
    "parallel.tp": "tp tensor_model_parallel_size tensor_parallel_size tensor_parallel_degree",
    "parallel.pp": "pp pipeline_model_parallel_size pipeline_parallel_size pipeline_parallel_degree",
    "parallel.cp": "cp cp_size context_parallel_size context_parallel_degree sequence_parallel_degree",
    "parallel.dp": "dp data_parallel_size dp_shard_size dp_replicate_size data_parallel_replicate_degree",
    "parallel.vpp": "vpp virtual_pipeline_model_parallel_size num_virtual_stages_per_pipeline_rank",
    "parallel.sequence_parallel": "sequence_parallel",
    "parallel.distributed_optimizer": "use_distributed_optimizer",
    "parallel.overlap": "overlap_grad_reduce",
    "parallel.bucket_size": "ddp_bucket_size",
    "parallel.recompute": "recompute_granularity",
    "parallel.recompute_method": "recompute_method",
    "parallel.recompute_num_layers": "recompute_num_layers",
    "model.num_layers": "num_layers num_hidden_layers n_layers n_layer",
    "model.hidden_size": "hidden_size n_embd d_model",
    "model.ffn_hidden_size": "ffn_hidden_size intermediate_size",
    "model.num_attention_heads": "num_attention_heads n_heads n_head",
    "model.num_query_groups": "num_query_groups num_key_value_heads n_kv_heads",
    "model.head_dim": "kv_channels",
    "model.vocab_size": "vocab_size",
    "model.max_seq_length_tokens": "max_position_embeddings",
    "model.norm_epsilon": "norm_epsilon layernorm_epsilon rms_norm_eps norm_eps",
    "model.rope_base": "rotary_base rope_theta",
    "model.rope_scaling.factor": "rope_scaling_factor",
    "model.window_tokens": "sliding_window",
    "model.attention_softcap": "attn_logit_softcapping",
    "model.output_softcap": "final_logit_softcapping",
    "model.qkv_bias": "add_qkv_bias",
    "model.qk_norm": "qk_layernorm",
    "model.tie_embeddings": "tie_word_embeddings",
    "model.init_std": "init_method_std initializer_range",
    "data.seq_length_tokens": "seq_length sequence_len seq_len cutoff_len max_seq_length max_length max_seq_len "
    "encoder_seq_length block_size",
    "data.tokenizer": "tokenizer_model tokenizer_path tokenizer_name_or_path hf_assets_path",
    "train.micro_batch_size": "micro_batch_size per_device_train_batch_size local_batch_size "
    "train_micro_batch_size_per_gpu",
    "train.global_batch_size": "global_batch_size train_batch_size",
    "train.steps": "train_iters max_steps",
    "train.epochs": "num_train_epochs num_epochs",
    "train.eval_interval_steps": "eval_interval eval_steps val_check_interval",
    "train.label_smoothing": "label_smoothing_factor",
    "train.deterministic": "deterministic_mode full_determinism",
    "optim.lr": "lr learning_rate",
    "optim.min_lr": "min_lr",
    "optim.warmup_steps": "warmup_steps lr_warmup_iters warmup_num_steps",
    "optim.decay_steps": "lr_decay_iters lr_wsd_decay_iters",
    "optim.beta1": "adam_beta1",
    "optim.beta2": "adam_beta2",
    "optim.epsilon": "adam_eps adam_epsilon eps",
    "optim.weight_decay": "weight_decay",
    "optim.clip_grad": "clip_grad max_grad_norm gradient_clipping gradient_clip_val max_norm",
    "checkpoint.load": "load pretrained_checkpoint initial_load_path model_name_or_path base_model "
    "pretrained_model_name_or_path model_id restore_from_path",
    "checkpoint.interval_steps": "save_interval save_steps",
    "checkpoint.keep_every_steps": "save_retain_interval",
    "checkpoint.keep_last": "save_total_limit keep_latest_k",
    "checkpoint.asynchronous": "async_save",
    "log.interval_steps": "log_interval logging_steps log_every_n_steps log_freq steps_per_print",
    "log.wandb_project": "wandb_project",
    "log.tensorboard": "enable_tensorboard",
    "log.plots": "plot_loss",
    "chat.neftune_alpha": "neftune_noise_alpha",
    "chat.system": "default_system",
    "chat.max_records": "max_samples max_train_samples",
    "train.early_stop_evaluations": "early_stopping_steps early_stopping_patience",
    "method.dpo.label_smoothing": "dpo_label_smoothing",
    "method.dpo.sft_weight": "pref_ftx",
    "method.dpo.gamma": "simpo_gamma",
    "method.dpo.beta": "dpo_beta",
    "method.kto.beta": "kto_beta",
    "method.kto.desirable_weight": "kto_chosen_weight desirable_weight",
    "method.kto.undesirable_weight": "kto_rejected_weight undesirable_weight",
    "method.reference.load": "ref_model",
    "method.rollout.prompts": "grpo_prompts_per_step",
    "method.rollout.answers": "grpo_group_size",
    "method.rollout.epochs": "grpo_iterations",
    "method.grpo.kl_weight": "grpo_kl_beta",
    "method.grpo.clip_low": "grpo_clamp_eps_lower",
    "method.grpo.clip_high": "grpo_clamp_eps_upper",
    "adapter.rank": "lora_rank lora_r",
    "adapter.alpha": "lora_alpha",
    "adapter.dropout": "lora_dropout",
    "adapter.rank_stabilized": "use_rslora peft_use_rslora",
    "adapter.dora": "use_dora lora_use_dora",
    "adapter.load": "adapter_name_or_path lora_model_dir",
    "run_dir": "save output_dir out_dir dump_folder",
    # Names whose meaning depends on their section: torchtitan's, NeMo's and DeepSpeed's.
    "train.steps ": "training.steps",
    "train.eval_interval_steps ": "validation.freq",
    "train.deterministic ": "debug.deterministic training.deterministic",
    "optim.decay_steps ": "lr_scheduler.decay_steps",
    "optim.warmup_steps ": "model.optim.sched.warmup_steps scheduler.params.warmup_num_steps",
    "optim.min_lr ": "model.optim.sched.min_lr",
    "optim.lr ": "model.optim.lr optimizer.params.lr",
    "optim.weight_decay ": "model.optim.weight_decay optimizer.params.weight_decay",
    "optim.epsilon ": "optimizer.params.eps",
    "optim.beta1 ": "optimizer.beta1",
    "optim.beta2 ": "optimizer.beta2",
    "checkpoint.interval_steps ": "checkpoint.interval",
    "seed ": "debug.seed training.seed data_seed random_seed",
}

_SCHEDULES = {
    **{name: name for name in ("cosine", "linear", "constant", "wsd")},
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
    "warmup_stable_decay": "wsd",
    "cosineannealing": "cosine",
}
_PRECISIONS = {
    "bf16-mixed": "bf16",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "32": "fp32",
    "32-true": "fp32",
    "fp32": "fp32",
}
_ZERO = ". Stages 2 and 3 divide gradients and weights too, which is not supported: divide the model by parallel.tp, \
parallel.pp"

_ADAPTER_SWITCH: dict[str, dict[str, Any] | None] = {"lora": {}, "full": None}

_CONVERTED: dict[str, Alias] = {
    "bf16": _by_table("train.precision", {True: "bf16", False: "fp32"}),
    "bf16.enabled": _by_table("train.precision", {True: "bf16", False: "fp32"}),
    "precision": _by_table("train.precision", _PRECISIONS),
    "mixed_precision": _by_table("train.precision", {**_PRECISIONS, "bf16_mixed": "bf16", "no": "fp32"}),
    "stage": _by_table("method.kind", {"dpo": "dpo", "kto": "kto", "rm": "reward", "ppo": "ppo"}),
    "pref_loss": _by_table("method.dpo.loss", {loss: loss for loss in ("sigmoid", "hinge", "ipo", "simpo", "orpo")}),
    "rotary_seq_len_interpolation_factor": Alias("model.rope_scaling", _interpolated, "a number over 0"),
    "mixed_precision_param": _by_table("train.precision", {"bfloat16": "bf16", "float32": "fp32"}),
    "no_rope_layers": Alias("model.layers_without_rope", _zeros, "a list with 1 (rotated) or 0 for each layer"),
    "model.rope_scaling.rope_type": Alias("model.rope_scaling.kind"),
    "model.rope_scaling.type": Alias("model.rope_scaling.kind"),
    "model.rope_scaling.original_max_position_embeddings": Alias("model.rope_scaling.original_max_position"),
    "model.rope_scaling.short_factor": Alias("model.rope_scaling.short_factors"),
    "model.rope_scaling.long_factor": Alias("model.rope_scaling.long_factors"),
    "untie_embeddings_and_output_weights": _by_table("model.tie_embeddings", {True: False, False: True}),
    "recompute_activations": _by_table("parallel.recompute", {True: "selective", False: "none"}),
    "gradient_checkpointing": _by_table("parallel.recompute", {True: "full", False: "none"}),
    "activation_checkpoint.mode": _by_table(
        "parallel.recompute", {"none": "none", "selective": "selective", "full": "full"}
    ),
    "zero_optimization.stage": _by_table("parallel.distributed_optimizer", {0: False, 1: True}, _ZERO),
    "zero_stage": _by_table("parallel.distributed_optimizer", {0: False, 1: True}, _ZERO),
    "reset_attention_mask": _by_table("data.packing", {True: "isolate", False: "concatenate"}),
    **dict.fromkeys(
        ("data_path", "train_data_path", "data_prefix", "model.data.data_prefix"),
        Alias("data.train", _blend, "prefixes of token files, or weights and prefixes in turn", several=True),
    ),
    "valid_data_path": Alias(
        "data.eval", _blend, "prefixes of token files, or weights and prefixes in turn", several=True
    ),
    "recompute_modules": Alias("parallel.recompute_modules", _items, "names of modules", several=True),
    **dict.fromkeys(
        ("split", "splits_string"),
        Alias(
            "data.eval_fraction",
            _held_out,
            "up to three shares, as 949,50,1; the second and third are held out together",
        ),
    ),
    "rampup_batch_size": Alias("train.rampup", _rampup, "three numbers: start, increment, samples", several=True),
    "exit_duration_in_mins": _scaled("train.time_limit_s", 60.0, "a number of minutes"),
    **dict.fromkeys(
        ("lr_decay_style", "lr_scheduler_type", "lr_scheduler.decay_type", "model.optim.sched.name"),
        _by_table("optim.schedule", _SCHEDULES),
    ),
    "finetune": _by_table("checkpoint.load_optimizer", {True: False, False: True}),
    "no_load_optim": _by_table("checkpoint.load_optimizer", {True: False, False: True}),
    "async_mode": _by_table(
        "checkpoint.asynchronous", {"disabled": False, "async": True, "async_with_pinned_mem": True}
    ),
    **dict.fromkeys(
        ("packing", "sample_packing", "neat_packing"),
        _by_table("chat.packing", {True: "best_fit", False: "pad"}),
    ),
    "mask_history": _by_table("chat.train_on", {True: "last_turn", False: "all_turns"}),
    **dict.fromkeys(
        ("template", "chat_template"),
        Alias("chat.template", _template, "chatml or a Jinja file; leave it out to have the tokenizer's own template"),
    ),
    **dict.fromkeys(
        ("val_size", "val_set_size"),
        Alias("chat.eval_fraction", _fraction, "a share of at least 0 and below 1; a count is not understood"),
    ),
    "finetuning_type": _by_table("adapter", _ADAPTER_SWITCH),
    "peft_scheme": _by_table("adapter", {**_ADAPTER_SWITCH, "none": None}),
    **dict.fromkeys(
        ("lora_target", "lora_target_modules", "target_modules", "lora_target_linear"),
        Alias("adapter.targets", _projections, f"all, or of {', '.join((*_PROJECTIONS, *_OF_VOCABULARY))}"),
    ),
    **dict.fromkeys(
        ("additional_target", "modules_to_save", "lora_modules_to_save"),
        Alias("adapter.modules_to_save", _whole_modules, "embed_tokens and lm_head"),
    ),
    "quantization_bit": _by_table("adapter.base", {8: "int8", 4: "nf4"}),
    "load_in_8bit": _by_table("adapter.base", {True: "int8"}),
    "load_in_4bit": _by_table("adapter.base", {True: "nf4"}),
}

ALIASES: dict[str, Alias] = {
    alias: Alias(target.strip()) for target, aliases in _NAMES.items() for alias in aliases.split()
} | _CONVERTED
