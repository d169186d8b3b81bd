"""Our typed configuration → megatron-core's TransformerConfig."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from llm_parallel.config.tree import KernelsConfig, RunConfig
from llm_parallel.parallel.layout import Layout
from llm_parallel.parallel.platform import Platform

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
    from megatron.core.transformer.transformer_config import TransformerConfig

VOCAB_MULTIPLE = 128


@dataclass
class LlamaTransformerConfig(TransformerConfig):
    """What megatron-core hands to every module, with our choice of kernels."""

    kernels: KernelsConfig = field(default_factory=KernelsConfig)


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding: the vocabulary rounded up to a multiple of 128 and of ``tp``.

    The same for all tp that divide 128, so that checkpoints of different layouts hold tensors of one shape.
    """
    multiple = math.lcm(VOCAB_MULTIPLE, tp)
    return -(-vocab_size // multiple) * multiple


def compute_dtype(config: RunConfig) -> torch.dtype:
    """Dtype of weights and activations in forward and backward."""
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def overlap_enabled(config: RunConfig, platform: Platform) -> bool:
    """Whether communication overlaps compute: as configured, by default on CUDA only."""
    return platform.is_cuda if config.parallel.overlap is None else config.parallel.overlap


def pipeline_layout(layout: Layout) -> PipelineParallelLayerLayout | None:
    """megatron-core's description of uneven stages, or None where all chunks have equally many layers."""
    if len(set(layout.stage_layers)) == 1:
        return None
    rows = [["decoder"] * count for count in layout.stage_layers]
    rows[0] = ["embedding", *rows[0]]
    rows[-1] = [*rows[-1], "loss"]
    return PipelineParallelLayerLayout(rows, layout.pp)


def transformer_config(config: RunConfig, layout: Layout, platform: Platform) -> LlamaTransformerConfig:
    """TransformerConfig of a checked run configuration."""
    model, parallel = config.model, config.parallel
    dtype = compute_dtype(config)
    recompute: dict[str, Any] = {}
    if parallel.recompute == "full":
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": parallel.recompute_method,
            "recompute_num_layers": parallel.recompute_num_layers,
        }
    elif parallel.recompute == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": list(parallel.recompute_modules)}
    return LlamaTransformerConfig(
        kernels=config.kernels,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        layernorm_epsilon=model.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # the activation module of the layer spec, ours, is called
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        pipeline_model_parallel_layout=pipeline_layout(layout),
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=True,
        perform_initialization=False,  # model/init.py fills weights, alike in every layout
        use_cpu_initialization=not platform.is_cuda,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        deterministic_mode=config.train.deterministic,
        # Interleaved stages with batched, not overlapped sends reorder messages and train silently wrong.
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=layout.vpp == 1,
        batch_p2p_sync=platform.is_cuda,
        **recompute,
    )
