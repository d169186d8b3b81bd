"""Translates a model and its numerics on a mesh into megatron-core's TransformerConfig."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from llm_parallel.config.tree import KernelsConfig, ModelConfig
from llm_parallel.model.deterministic import num_parts
from llm_parallel.model.numerics import Numerics, Recompute
from llm_parallel.model.rotary import attention_factor
from llm_parallel.parallel.mesh import Mesh
from llm_parallel.parallel.platform import Platform
from llm_parallel.parallel.stages import Stages

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
    from megatron.core.transformer.transformer_config import TransformerConfig

VOCAB_MULTIPLE = 128


@dataclass
class LlamaTransformerConfig(TransformerConfig):
    """The configuration that megatron-core hands to every module, with our choice of kernels."""

    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    keys_to_the_left: int = -1
    """Number of keys before its own that a query attends to; -1: all."""
    attention_softcap: float = 0.0
    attention_scale: float | None = None
    """Factor of the scores before the softmax; 1 / sqrt(head dim) if not given."""
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm_over_heads: bool = False
    layers_without_rope: tuple[int, ...] = ()
    """Layers, counted from 0, whose queries and keys are not rotated."""
    base: str = "full"
    """How the matrices of the layers are held: "full" in ``params_dtype``, or frozen in "int8" or "nf4"."""
    row_parts: int = 1
    """With ``kernels.deterministic``, parts into which the sum of a row-parallel product is cut on each rank."""


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding: the vocabulary rounded up to a multiple of 128 and of ``tp``.

    The same for all tp that divide 128, so that checkpoints of different layouts hold tensors of one shape.
    """
    multiple = math.lcm(VOCAB_MULTIPLE, tp)
    return -(-vocab_size // multiple) * multiple


def pipeline_layout(stages: Stages) -> PipelineParallelLayerLayout | None:
    """megatron-core's description of uneven stages, or None where all chunks have equally many layers."""
    if len(set(stages.num_layers)) == 1:
        return None
    rows = [["decoder"] * count for count in stages.num_layers]
    rows[0] = ["embedding", *rows[0]]
    rows[-1] = [*rows[-1], "loss"]
    return PipelineParallelLayerLayout(rows, stages.pp)


def recompute_settings(recompute: Recompute) -> dict[str, Any]:
    """megatron-core's settings of recomputation; none where every activation is kept."""
    if recompute.granularity == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": recompute.method,
            "recompute_num_layers": recompute.num_layers,
        }
    if recompute.granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(recompute.modules)}
    return {}


def transformer_config(
    model: ModelConfig, numerics: Numerics, mesh: Mesh, stages: Stages, platform: Platform
) -> LlamaTransformerConfig:
    """TransformerConfig of a checked model on a mesh."""
    dtype = numerics.dtype
    return LlamaTransformerConfig(
        kernels=numerics.kernels,
        base=numerics.base,
        row_parts=num_parts(model, mesh.tp) // mesh.tp,
        keys_to_the_left=-1 if model.window_tokens is None else model.window_tokens - 1,
        attention_softcap=model.attention_softcap,
        attention_scale=attention_factor(model) ** 2 * model.kv_channels**-0.5,
        add_qkv_bias=model.qkv_bias,
        attention_output_bias=model.attention_output_bias,
        mlp_bias=model.mlp_bias,
        layers_without_rope=model.layers_without_rope,
        qk_norm_over_heads=model.qk_norm_over_heads,
        # With this, megatron-core sums the gradients of both norms over the tensor-parallel group, as norms of single
        # heads need. The norm over all heads is divided over that group instead.
        qk_layernorm=model.qk_norm,
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
        use_te_activation_func=True,  # so that the layer spec's activation module, ours, is called
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=mesh.tp,
        pipeline_model_parallel_size=mesh.pp,
        virtual_pipeline_model_parallel_size=stages.vpp if stages.vpp > 1 else None,
        pipeline_model_parallel_layout=pipeline_layout(stages),
        context_parallel_size=mesh.cp,
        sequence_parallel=mesh.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=True,
        perform_initialization=False,  # model/init.py fills weights, alike in every layout
        use_cpu_initialization=not platform.is_cuda,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        deterministic_mode=numerics.deterministic,
        # Interleaved stages with batched, not overlapped sends reorder messages and train silently wrong.
        overlap_p2p_comm=stages.vpp > 1,
        batch_p2p_comm=stages.vpp == 1,
        batch_p2p_sync=platform.is_cuda,
        **recompute_settings(numerics.recompute),
    )
