"""Rows of ``foreign.py`` that were missed when the example files of LLaMA-Factory and of Megatron-LM were run."""

from __future__ import annotations

from llm_parallel.config.foreign_row import ANY, Foreign, row

TEMPLATES = (
    "llama2", "llama3", "mistral", "mistral_small", "olmo", "phi", "phi_small", "phi4", "qwen", "qwen3",
    "qwen3_nothink", "smollm", "smollm2",
)  # fmt: skip
"""LLaMA-Factory's names of chat templates that models of our families bring with their tokenizers."""

_TEXT_ALONE = "models read and write text alone"
_ATTENTION = "every layer has attention and an MLP; model.window_tokens and model.layers_without_rope change attention"
_USE = (
    "a run file is for training; `llm-parallel generate`, `chat` and `serve` use a model, and answers that a run makes "
    "are set in method.rollout and chat.answer_tokens"
)

MORE: tuple[Foreign, ...] = (
    # LLaMA-Factory.
    row("use_adam_mini use_muon galore_* apollo_* badam_*", "AdamW is the only optimizer; optim.moment_bits=8 holds "
        "its moments in 8 bits", "optim.moment_bits", "false none null"),
    row("use_dft_loss use_asft_loss use_eaft_loss asft_alpha eaft_alpha", "fine-tuning minimises the mean of -log p "
        "over the trained tokens, with train.label_smoothing and train.z_loss if they are given",
        "train.label_smoothing train.z_loss", "false none null"),
    row("mixture_of_depths shift_attn block_diag_attn", "attention is that of the model; chat.packing=best_fit keeps "
        "conversations of a sample apart", "chat.packing", "false none null"),
    row("freeze_vision_tower freeze_multi_modal_projector freeze_language_model image_* video_* audio_* "
        "use_audio_in_video crop_to_patches media_dir", _TEXT_ALONE, same=ANY),
    row("do_predict predict_with_generate eval_num_beams", "`llm-parallel generate RUN --input FILE` answers a file of "
        "prompts, and `llm-parallel evaluate` measures a model", same="false none null"),
    row("max_new_tokens temperature top_p top_k num_beams do_sample repetition_penalty length_penalty "
        "skip_special_tokens infer_backend infer_dtype use_kv_cache vllm_* sglang_*", _USE,
        "method.rollout chat.answer_tokens"),
    row("export_*", "a run file is for training; `llm-parallel convert RUN FOLDER` writes a Hugging Face folder, with "
        "--merge one that has the adapters in its weights"),
    row("model_class sample_backend kernel_config batching_strategy init_config", "the model's family is read from its "
        "files, and the section kernels chooses operators", "kernels", ANY),
    row("peft_config quant_config", "adapters and the bits of what lies under them are in the section adapter",
        "adapter"),
    row("dist_config optim_config", "how a run is divided is in the section parallel, and its optimizer in optim",
        "parallel optim"),
    row("use_reentrant_gc gradient_checkpointing_kwargs disable_gradient_checkpointing activations_checkpoint_method "
        "checkpoint_activations", "parallel.recompute says what is computed again in the backward pass",
        "parallel.recompute", ANY),
    row("model_revision cache_dir download_mode offload_folder device_map", "nothing is downloaded or moved: "
        "checkpoint.load names a folder on this machine", "checkpoint.load", ANY),
    row("resize_vocab add_tokens add_special_tokens new_special_tokens_config init_special_tokens", "tokenizers get no "
        "further tokens; give a model whose tokenizer and embedding have them", same="false none null"),
    row("split_special_tokens", "what is typed in a conversation never becomes a special token", same=ANY),
    row("enable_thinking preserve_thinking tool_format", "the chat template writes thinking and tools; a Jinja file in "
        "chat.template writes them otherwise", "chat.template", "none null"),
    row("eval_on_each_dataset", "losses are given for each source too", same=ANY),
    row("ignore_pad_token_for_loss", "padding is never trained", same="true"),
    row("use_swanlab swanlab_*", "log.wandb_project and log.tensorboard switch reports on; SwanLab is not one of them",
        "log.wandb_project log.tensorboard", "false none null"),
    row("task task_dir n_shot", "`llm-parallel evaluate MODEL --tasks NAME` measures a model on benchmarks"),
    row("train_from_scratch", "a run without checkpoint.load begins with random weights, of the sizes in the section "
        "model", "checkpoint.load model", "false"),
    # Megatron-LM.
    row("mock_data", "no data are made up; `llm-parallel prepare` writes token files, and `llm-parallel bench step` "
        "measures a step without any", same="false"),
    row("attention_softmax_in_fp32", "the softmax of attention is computed in fp32", same="true"),
    row("calculate_per_token_loss", "the loss is the mean over all tokens of the global batch", same="true"),
    row("use_checkpoint_args no_use_tokenizer_model_from_checkpoint_args use_mp_args_from_checkpoint_args",
        "checkpoint.load brings sizes and tokenizer where the run file does not say otherwise", "checkpoint.load", ANY),
    row("use_checkpoint_opt_param_scheduler override_opt_param_scheduler", "a run that goes on takes the section optim "
        "from the run file, and says what changed", "optim", ANY),
    row("manual_gc manual_gc_interval empty_unused_memory_level disable_gloo_process_groups use_nccl_ub "
        "ddp_average_in_collective use_tp_pp_dp_mapping init_model_with_meta_device", "memory and process groups have "
        "no settings of their own", same=ANY),
    row("no_check_for_nan_in_loss_and_grad rerun_mode", "train.guard says which steps are skipped, and a loss that is "
        "not finite is always one of them", "train.guard", ANY),
    row("squared_relu quick_geglu glu_linear_offset activation_func_clamp_value use_fused_weighted_squared_relu",
        "the MLP is SwiGLU", same="false none"),
    row("apply_layernorm_1p", "the weight of RMSNorm is held as it is, not as its difference from 1", same="false"),
    row("no_position_embedding", "positions are rotary, and not added to the embedding", same="true"),
    row("softmax_type", "attention has the plain softmax", same="vanilla"),
    row("cp_comm_type hierarchical_context_parallel_sizes", "context parallelism gathers keys and values; parallel.cp "
        "sets it", "parallel.cp", ANY),
    row("window_attn_skip_freq no_rope_freq hybrid_* is_hybrid_model mamba_* linear_attention_freq "
        "experimental_attention_variant dsa_*", _ATTENTION, "model.window_tokens model.layers_without_rope",
        "false none"),
    row("microbatch_group_size_per_virtual_pipeline_stage", "interleaved pipelines take micro batches in groups of "
        "parallel.pp", "parallel.pp", "none"),
    row("account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split", "parallel.stage_layers lists the "
        "layers of every model chunk", "parallel.stage_layers", "false"),
    row("num_distributed_optimizer_instances", "parallel.distributed_optimizer divides the state over all replicas",
        "parallel.distributed_optimizer", "1"),
    row("use_precision_aware_optimizer", "optim.moment_bits=8 holds AdamW's moments in 8 bits", "optim.moment_bits",
        "false"),
    row("lr_warmup_init", "the warm-up begins at 0: optim.warmup_steps", "optim.warmup_steps", "0 0.0"),
    row("step_batch_size_schedule", "train.rampup raises the batch size: {start: 32, increment: 32, samples: 100000}",
        "train.rampup"),
    row("fim_data fim_rate fim_spm_rate", "documents are trained from left to right", same="false none 0 0.0"),
    row("use_mup mup_*", "every matrix has the learning rate and the initial deviation of its field: optim.lr and "
        "model.init_std", "optim.lr model.init_std", "false"),
    row("tiktoken_pattern", "the kind of tokenizer is read from its files", same=ANY),
    row("inference_* prompts prompt_file num_tokens_to_generate return_log_probs stop_words", _USE,
        "method.rollout chat.answer_tokens"),
    row("perform_rl_step rl_* langrl_*", "`llm-parallel prefer` with method.kind=grpo trains on answers of the model's "
        "own", "method.kind", "false"),
    row("sft", "`llm-parallel sft` trains on the conversations of chat.train", "chat.train", "false"),
    row("error_injection_rate error_injection_type", "`llm-parallel drill` breaks a run on purpose", same="0 0.0"),
    row("wandb_save_dir", "Weights & Biases has its files in run_dir", "run_dir", ANY),
    row("use_packed_sequences", "chat.packing=best_fit lets conversations share a sample", "chat.packing", "true"),
    row("export", "`llm-parallel convert RUN FOLDER` writes a Hugging Face folder"),
)  # fmt: skip
