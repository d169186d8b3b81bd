"""Settings of other systems that have no field here: what to do instead, or why it is not supported.

The systems are Megatron-LM, torchtitan, NeMo, DeepSpeed, Hugging Face's TrainingArguments, LLaMA-Factory and axolotl.
Names that mean one of our fields are in ``aliases.py``, and those whose value follows from several in ``derived.py``.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from llm_parallel.config.foreign_more import MORE, TEMPLATES
from llm_parallel.config.foreign_row import ANY, Foreign
from llm_parallel.config.foreign_row import row as _row

SECTIONS = frozenset({
    "activation_checkpoint", "comm", "compile", "debug", "experimental", "exp_manager", "float8", "job", "metrics",
    "lr_scheduler", "optimizer", "parallelism", "profiling", "trainer", "training", "validation", "scheduler",
    "zero_optimization", "bf16", "fp16",
})  # fmt: skip
"""Sections of other systems, inside which their names are understood."""

_NO_MOE = "mixtures of experts are not supported; models are dense"
_NO_FP8 = (
    "8-bit training is not supported; use train.precision=bf16, and `llm-parallel plan --precision fp8` to see what it "
    "would bring"
)
_NO_FSDP = (
    "dividing weights and gradients (FSDP, ZeRO 2 and 3) is not supported; parallel.distributed_optimizer divides the "
    "optimizer's state (ZeRO 1), and parallel.tp and parallel.pp divide the model"
)
_KERNELS = "the fields of the section kernels choose the implementation of each operator"
_BY_FILE = "the kind of tokenizer is read from its files"

ROWS: tuple[Foreign, ...] = (
    # What is not supported.
    _row("num_experts num_local_experts num_experts_per_tok n_routed_experts expert_model_parallel_size "
         "expert_tensor_parallel_size expert_parallel_degree moe moe_* expert_*", _NO_MOE, same="1 none null"),
    _row("fp8 fp8_* fp4 fp4_* float8 float8.* transformer_engine_fp8", _NO_FP8, "train.precision", "false none null"),
    _row("fp16 fp16.enabled", "fp16 is not supported; use train.precision=bf16, which needs no loss scaling",
         "train.precision", "false"),
    _row("fsdp fsdp_* use_torch_fsdp2 use_megatron_fsdp data_parallel_shard_degree zero_optimization.offload_* "
         "data_parallel_sharding_strategy", _NO_FSDP, "parallel.distributed_optimizer parallel.tp parallel.pp",
         "false none null 1"),
    _row("deepspeed", "DeepSpeed is not used; parallel.distributed_optimizer divides the optimizer's state (ZeRO 1), "
         "and parallel.tp and parallel.pp divide the model where memory does not suffice",
         "parallel.distributed_optimizer parallel.tp parallel.pp", ANY),
    _row("cpu_offloading* optimizer_cpu_offload offload_optimizer offload_params enable_cpu_offload",
         "state is not moved to the host's memory; parallel.distributed_optimizer, parallel.tp and parallel.pp divide "
         "it over devices", "parallel.distributed_optimizer parallel.tp parallel.pp", "false"),
    _row("multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim v_head_dim qk_pos_emb_head_dim",
         "multi-latent attention is not supported; model.num_query_groups sets grouped-query attention",
         "model.num_query_groups", "false"),
    _row("mtp_num_layers mtp_loss_scaling_factor", "predicting several tokens at a time is not supported",
         same="0 none"),
    _row("attention_dropout hidden_dropout attn_pdrop resid_pdrop embd_pdrop",
         "dropout in the model is not supported; adapter.dropout is for adapters", "adapter.dropout", "0 0.0"),
    _row("tp_comm_overlap tp_comm_* enable_async_tensor_parallel",
         "overlapping tensor-parallel communication with products is not supported; parallel.overlap overlaps that of "
         "data and pipeline parallelism", "parallel.overlap", "false"),
    _row("compile torch_compile compile.enable training.compile torch_compile_*",
         "models are not compiled; on GPUs the fused kernels of the section kernels run", "kernels", "false none"),
    _row("additional_target modules_to_save lora_modules_to_save", "adapter.modules_to_save names what is trained "
         "whole beside adapters: embed_tokens, lm_head", "adapter.modules_to_save", "none null"),
    _row("pissa_init pissa_iter loraplus_lr_ratio use_galore use_badam use_apollo lora_layers_to_transform "
         "lora_fan_in_fan_out freeze_trainable_layers freeze_trainable_modules freeze_extra_modules lisa_n_layers "
         "relora_steps oft_* use_llama_pro pissa_convert loraplus_lr_embedding module_dropout create_new_adapter",
         "of the ways to train few parameters only LoRA is here: section adapter", "adapter", "false none null"),
    _row("use_unsloth use_unsloth_gc unsloth_*", "Unsloth is not used; the fused kernels of the section kernels take "
         "its place", "kernels", "false"),
    _row("push_to_hub hub_* push_dataset_to_hub", "nothing is uploaded; `llm-parallel convert` writes a folder that "
         "Hugging Face's tools take", same="false none null"),
    _row("group_by_length length_column_name disable_shuffling", "samples are drawn in an order that depends on seed "
         "alone; chat.packing=best_fit fills them", "seed chat.packing", "false"),
    _row("streaming buffer_size max_steps_per_epoch", "all of a file is used, and it may be larger than memory; "
         "chat.max_records takes the first records alone", "chat.max_records", "false none null"),
    _row("decoupled_lr decoupled_min_lr", "one learning rate holds for all matrices: optim.lr", "optim.lr", "none"),
    _row("start_weight_decay end_weight_decay weight_decay_incr_style", "weight decay is constant: optim.weight_decay",
         "optim.weight_decay", "constant"),
    # What is always so here.
    _row("swiglu", "the MLP is SwiGLU", same="true"),
    _row("normalization", "norms are RMSNorm", same="rmsnorm"),
    _row("hidden_act activation_function", "the MLP is SwiGLU, which has silu inside", same="silu swiglu"),
    _row("position_embedding_type use_rotary_position_embeddings add_position_embedding",
         "positions are rotary; model.rope_base and model.rope_scaling set them", "model.rope_base model.rope_scaling",
         "rope true"),
    _row("rotary_percent partial_rotary_factor", "the whole head is rotated", same="1 1.0"),
    _row("rotary_interleaved", "rotary pairs are the two halves of a head", same="false"),
    _row("disable_bias_linear", "biases are set one by one: model.qkv_bias, model.attention_output_bias, "
         "model.mlp_bias", "model.qkv_bias model.attention_output_bias model.mlp_bias", "true"),
    _row("add_bias_linear attention_bias", "biases are set one by one: model.qkv_bias, model.attention_output_bias, "
         "model.mlp_bias", "model.qkv_bias model.attention_output_bias model.mlp_bias", "false"),
    _row("group_query_attention", "model.num_query_groups says it", "model.num_query_groups", ANY),
    _row("accumulate_allreduce_grads_in_fp32", "gradients are summed in fp32", same="true"),
    _row("optimizer optim optimizer.name optimizer.type model.optim.name", "AdamW is the only optimizer; "
         "optim.implementation says whose, and optim.moment_bits=8 holds its moments in 8 bits. They are not moved to "
         "the host; parallel.distributed_optimizer divides them over replicas",
         "optim.implementation optim.moment_bits parallel.distributed_optimizer",
         "adam adamw adamw_torch adamw_torch_fused fused_adam distributed_fused_adam"),
    _row("distributed_backend accelerator", "GPUs use NCCL and CPUs gloo, as the field device says", "device",
         "nccl gloo gpu cuda cpu"),
    _row("stage", "the command says what is trained: `llm-parallel pretrain`, `sft` or `prefer`", same="pt sft"),
    _row("template", "the tokenizer's own chat template is taken, or ChatML where it has none; a Jinja file in "
         "chat.template is another one", "chat.template", " ".join(TEMPLATES)),
    _row("do_train", "a run trains", same="true"),
    _row("completion_only_loss assistant_only_loss", "answers alone are trained; `llm-parallel pretrain` learns from "
         "whole texts", same="true none null"),
    _row("train_on_prompt train_on_inputs", "answers alone are trained; `llm-parallel pretrain` learns from whole "
         "texts", same="false"),
    _row("save_strategy", "checkpoints come every checkpoint.interval_steps, and at the end",
         "checkpoint.interval_steps", "steps"),
    _row("eval_strategy evaluation_strategy", "evaluations come every train.eval_interval_steps, and at the end",
         "train.eval_interval_steps", "steps"),
    _row("checkpoint.enable checkpoint.enable_checkpoint", "every run saves at its end", same="true"),
    _row("resume_from_checkpoint auto_resume auto_resume_from_checkpoints",
         "a run that is started again goes on from its last checkpoint by itself; checkpoint.load names another one",
         "checkpoint.load", "true false none null"),
    _row("overwrite_output_dir", "a run folder is never overwritten: a run that is started again goes on in it, and "
         "another run_dir begins anew", "run_dir", ANY),
    # What changes no result, and is left out.
    _row("transformer_impl use_mcore_models use_flash_attn flash_attn flash_attention attn_implementation "
         "attention_backend sdp_attention xformers_attention no_*_fusion *_fusion no_persist_layer_norm "
         "enable_liger_kernel liger_* use_fused_rmsnorm no_async_tensor_model_parallel_allreduce "
         "apply_query_key_layer_scaling no_rope_fusion *_fusion_impl use_flashinfer_fused_rope spec transformer_spec "
         "cuda_graph_* enable_cuda_graph external_cuda_graph te_rng_tracker", _KERNELS, "kernels", ANY),
    _row("quantization_method quantization_type quantization_device_map bnb_4bit_quant_type",
         "adapter.base says how the matrices under adapters are held: int8, or nf4 with a scale for each block of 64",
         "adapter.base", "bnb bitsandbytes nf4 none null auto"),
    _row("double_quantization bnb_4bit_use_double_quant", "the scales of adapter.base=nf4 are not quantised themselves",
         "adapter.base", "false"),
    _row("bnb_4bit_compute_dtype", "products are computed in train.precision", "train.precision", ANY),
    _row("tokenizer_type tokenizer_use_fast use_fast_tokenizer", _BY_FILE, same=ANY),
    _row("tf32 loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis fp16_lm_cross_entropy "
         "params_dtype torch_dtype use_cpu_initialization low_cpu_mem_usage ddp_find_unused_parameters "
         "main_grads_dtype main_params_dtype pure_bf16 grad_reduce_in_bf16 upcast_layernorm upcast_lmhead_output "
         "compute_dtype", "train.precision=bf16 computes in bf16 and keeps weights, "
         "gradients and moments in fp32", "train.precision", ANY),
    _row("overlap_param_gather overlap_param_gather_with_optimizer_step overlap_p2p_communication_warmup_flush "
         "defer_embedding_wgrad_compute wgrad_deferral_limit overlap_p2p_communication align_grad_reduce "
         "align_param_gather batch_p2p_comm",
         "parallel.overlap covers it", "parallel.overlap", ANY),
    _row("num_workers dataloader_num_workers preprocessing_num_workers dataloader_type dataset_processes "
         "dataloader_pin_memory overwrite_cache tokenized_path remove_unused_columns pad_to_sequence_len "
         "dataset_prepared_path data_cache_path no_mmap_bin_files no_create_attention_mask_in_dataloader "
         "preprocessing_batch_size data_shared_file_system",
         "token files are read in place; data.prefetch_batches sets how far ahead", "data.prefetch_batches", ANY),
    _row("ckpt_format dist_ckpt_format use_dist_ckpt auto_detect_ckpt_format ckpt_fully_parallel_save no_load_rng "
         "no_save_rng save_safetensors dist_ckpt_* use_persistent_ckpt_worker ckpt_assume_constant_structure "
         "ckpt_fully_parallel_load no_ckpt_fully_parallel_save async_strategy async_ckpt_*", "checkpoints have "
         "one format, which loads under any layout; `llm-parallel convert` makes Hugging Face's", same=ANY),
    _row("log_throughput timing_log_level timing_log_option wall_clock_breakdown log_timers_to_tensorboard "
         "log_params_norm log_num_zeros_in_grad include_tokens_per_second include_effective_tokens_per_second "
         "include_num_input_tokens_seen log_validation_ppl_to_tensorboard log_memory_to_tensorboard log_progress "
         "tensorboard_log_interval logging_level compute_accuracy print_param_status log_straggler straggler_*",
         "all numbers of a step are in metrics.jsonl of the run folder", same=ANY),
    _row("ddp_timeout distributed_timeout_minutes", "`llm-parallel launch` finds runs that hang; "
         "elastic.hang_deviations says after how long", "elastic.hang_deviations", ANY),
    _row("make_vocab_size_divisible_by padded_vocab_size", "the vocabulary is padded as parallel.tp needs it",
         "parallel.tp", ANY),
    _row("trust_remote_code", "nothing that lies in a model's folder is executed", same=ANY),
    _row("per_device_eval_batch_size eval_batch_size", "an evaluation takes train.micro_batch_size samples at a time",
         "train.micro_batch_size", ANY),
    # What is set otherwise.
    _row("model.name model.flavor model_type", "model.preset names a model's shape", "model.preset", "llama"),
    _row("datasets train_dataset dataset_path training.dataset training.dataset_path test_datasets",
         "raw text becomes token files by `llm-parallel prepare`, named in data.train; conversations are named in "
         "chat.train, as {path: FILE}, or {path: DATASET_DIR, dataset: NAME} of a dataset_info.json",
         "data.train chat.train"),
    _row("mix_strategy interleave_probs", "each source has a weight, in data.train or chat.train",
         "data.train chat.train", "concat"),
    _row("data_args_path per_split_data_args_path", "data.train and data.eval list sources with their weights",
         "data.train data.eval"),
    _row("test_data_path test_data", "there is no test set beside the held-out data: data.eval", "data.eval"),
    _row("vocab_file merge_file vocab_path", "data.tokenizer takes a SentencePiece .model or a tokenizer.json; "
         "transformers writes the latter by AutoTokenizer.from_pretrained(FOLDER).save_pretrained(TARGET)",
         "data.tokenizer"),
    _row("window_size", "model.window_tokens counts the tokens that a query attends to, itself too",
         "model.window_tokens", "none"),
    _row("use_rope_scaling rope_type", "the section model.rope_scaling has the kind and its parameters",
         "model.rope_scaling", "false"),
    _row("decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers pipeline_model_parallel_layout "
         "pipeline_parallel_split_points first_pipeline_num_layers "
         "last_pipeline_num_layers module_fqns_per_model_part", "parallel.stage_layers lists the layers of every model "
         "chunk", "parallel.stage_layers", "none null"),
    _row("pipeline_parallel_schedule", "pipelines are 1F1B, or interleaved where parallel.vpp is over 1",
         "parallel.vpp", "1f1b interleaved1f1b"),
    _row("pipeline_parallel_microbatch_size", "train.micro_batch_size is the size of a pipeline's micro batch",
         "train.micro_batch_size"),
    _row("activation_checkpoint.selective_ac_option", "parallel.recompute_modules names what is recomputed",
         "parallel.recompute_modules"),
    _row("nproc_per_node num_gpus devices num_nodes nnodes node_rank master_addr master_port ray_* "
         "use_ray trainer.devices trainer.num_nodes world_size gpus_per_node",
         "the sizes in the section parallel say how many processes a run has; torchrun, srun or `llm-parallel submit` "
         "start them on several machines", "parallel"),
    _row("exit_interval", "train.steps ends a run, and a run that is started again goes on", "train.steps"),
    _row("validation.enable do_eval", "evaluations come with held-out data: data.eval_fraction, data.eval",
         "data.eval_fraction data.eval", "true"),
    _row("lr_scheduler.decay_ratio lr_wsd_decay_style", "optim.decay_steps is the length of the decay of "
         "optim.schedule=wsd", "optim.decay_steps optim.schedule", "exponential"),
    _row("betas optimizer.params.betas model.optim.betas", "optim.beta1 and optim.beta2 are two fields",
         "optim.beta1 optim.beta2"),
    _row("non_persistent_save_interval non_persistent_ckpt_type", "elastic.replicate_every_steps sets how often state "
         "is copied into memory", "elastic.replicate_every_steps"),
    _row("checkpoint.folder", "checkpoints are in the folder checkpoints of run_dir", "run_dir", "checkpoint"),
    _row("no_save_optim save_only_model last_save_model_only", "a checkpoint holds all that a run needs to go on; "
         "`llm-parallel convert` writes weights alone", same="false"),
    _row("report_to", "log.wandb_project and log.tensorboard switch reports on", "log.wandb_project log.tensorboard",
         "none"),
    _row("enable_wandb wandb_exp_name wandb_name wandb_run_name run_name wandb_entity", "log.wandb_project switches "
         "Weights & Biases on; a run there has the name of run_dir", "log.wandb_project run_dir", "false none null"),
    _row("tensorboard_dir logging_dir metrics.save_tb_folder", "TensorBoard's files are in the folder tensorboard of "
         "run_dir", "run_dir"),
    _row("profile profiling.* use_pytorch_profiler profiler_steps", "`llm-parallel bench step --trace FOLDER` traces a "
         "step", same="false"),
    _row("profile_* profiler_* memory_snapshot_path record_memory_history", "`llm-parallel bench step --trace FOLDER` "
         "traces a step", same=ANY),
    _row("exp_manager exp_manager.*", "run_dir, and the sections checkpoint and log, say what a run leaves and where",
         "run_dir checkpoint log"),
    _row("reward_model reward_model_type reward_model_adapters reward_model_quantization_bit", "method.rollout.judges "
         "names what judges answers: {kind: reward_model, folder: FOLDER}, a run of method.kind=reward or a Hugging "
         "Face folder", "method.rollout.judges method.kind", "none null lora"),
    _row("ref_model_adapters ref_model_quantization_bit", "method.reference.load names the reference, which is held in "
         "the run's precision; if it is not given, it is the model that training begins with", "method.reference.load",
         "none null"),
    _row("pref_bco_weight ld_alpha ppo_* rl", "method.kind and the sections of method set training by preferences and "
         "rewards", "method.kind method", "0 0.0 none null"),
    *MORE,
)  # fmt: skip
"""All of them; the first row that has a name counts."""

_EXACT = {name: row for row in reversed(ROWS) for name in row.names if "*" not in name}
_PATTERNS = tuple((name, row) for row in ROWS for name in row.names if "*" in name)


def foreign(name: str) -> Foreign | None:
    """The row of a setting, given with or without its section."""
    if name in _EXACT:
        return _EXACT[name]
    return next((row for pattern, row in _PATTERNS if fnmatchcase(name, pattern)), None)


def asks_for_the_same(row: Foreign, value: Any) -> bool:
    """Whether a value asks for what happens here anyway."""
    return ANY in row.same or str(value).lower() in row.same
