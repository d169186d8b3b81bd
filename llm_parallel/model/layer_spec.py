"""Says which module takes which slot of megatron-core's layers."""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from llm_parallel.config.tree import ModelConfig
from llm_parallel.model.adapters import ColumnLinear
from llm_parallel.model.attention import CoreAttention, LlamaAttention
from llm_parallel.model.modules import (
    AttentionOutput,
    LlamaLayer,
    MLPInput,
    MLPOutput,
    OutputNormLayer,
    RMSNorm,
    SwiGLU,
)


def head_norm(model: ModelConfig) -> Any:
    """Module that normalizes the queries, and the keys, of one head; LlamaAttention makes norms over all heads."""
    return RMSNorm if model.qk_norm else IdentityOp


def layer_spec(model: ModelConfig) -> ModuleSpec:
    """One layer: norm, attention, residual, norm, MLP, residual; or, with ``norm_outputs``, each norm after attention
    and MLP."""
    input_norm = IdentityOp if model.norm_outputs else RMSNorm
    attention = ModuleSpec(
        module=LlamaAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnLinear,
            core_attention=CoreAttention,
            linear_proj=AttentionOutput,
            q_layernorm=head_norm(model),
            k_layernorm=head_norm(model),
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=MLPInput, activation_func=SwiGLU, linear_fc2=MLPOutput),
    )
    return ModuleSpec(
        module=OutputNormLayer if model.norm_outputs else LlamaLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=input_norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=input_norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(num_layers: int, model: ModelConfig) -> TransformerBlockSubmodules:
    """The layers of one model chunk and the norm after the last layer of the model."""
    return TransformerBlockSubmodules(layer_specs=[layer_spec(model)] * num_layers, layer_norm=RMSNorm)
