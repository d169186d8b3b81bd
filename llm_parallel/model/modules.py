"""Our operators behind megatron-core's module interfaces. Written for one device; parallelism is mentioned where it
matters.

Shapes: S tokens, B samples, H hidden, F feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from llm_kernels.rms_norm.op import add_rms_norm, rms_norm
from llm_kernels.swiglu.op import swiglu
from llm_parallel.model.adapters import ColumnLinear, RowLinear
from llm_parallel.model.mcore_config import LlamaTransformerConfig
from llm_parallel.model.sequence import SequenceInfo


class RMSNorm(nn.Module):
    """RMSNorm over H. Under sequence parallelism every process norms its own tokens, so the weight's gradient is summed
    over the tensor-parallel group; megatron-core does that for parameters marked ``sequence_parallel``."""

    def __init__(self, config: LlamaTransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps, self.backend = eps, config.kernels.rms_norm
        device = "cpu" if config.use_cpu_initialization else "cuda"
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x_SBH: Tensor) -> Tensor:
        """[S, B, H] → [S, B, H]."""
        return rms_norm(x_SBH, self.weight, self.eps, backend=self.backend)

    def of_sum(self, x_SBH: Tensor, residual_SBH: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum) in one pass."""
        return add_rms_norm(x_SBH, residual_SBH, self.weight, self.eps, backend=self.backend)


class SwiGLU(MegatronModule):
    """Activation of the MLP; a MegatronModule because MLP asks it for its sharded state."""

    def __init__(self, config: LlamaTransformerConfig) -> None:
        super().__init__(config)

    def forward(self, x_SBF: Tensor) -> Tensor:
        """[S, B, 2F] (gate, then up) → [S, B, F]. The gradient is written over x, which nothing else keeps."""
        return swiglu(x_SBF, inplace_backward=True, backend=self.config.kernels.swiglu)


class AttentionOutput(RowLinear):
    """Attention's output projection. megatron-core has one switch for all biases except those of queries, keys and
    values; here the model's configuration decides about each."""

    def __init__(self, *arguments: Any, config: LlamaTransformerConfig, bias: bool, **named: Any) -> None:
        super().__init__(*arguments, config=config, bias=config.attention_output_bias, **named)


class MLPInput(ColumnLinear):
    """The MLP's first matrix, gate and up, with a bias if the model has one."""

    interleaved = 2

    def __init__(self, *arguments: Any, config: LlamaTransformerConfig, bias: bool, **named: Any) -> None:
        super().__init__(*arguments, config=config, bias=config.mlp_bias, **named)


class MLPOutput(RowLinear):
    """The MLP's second matrix, with a bias if the model has one."""

    def __init__(self, *arguments: Any, config: LlamaTransformerConfig, bias: bool, **named: Any) -> None:
        super().__init__(*arguments, config=config, bias=config.mlp_bias, **named)


class LlamaLayer(TransformerLayer):
    """One layer: norm, attention, residual and norm in one pass, MLP, residual."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: SequenceInfo | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [S, B, H], the residual stream → (the stream after this layer, no cross-attention context)."""
        attended, bias = self.self_attention(self.input_layernorm(hidden_states), info=packed_seq_params)
        attended = attended if bias is None else attended + bias
        normed, residual = self.pre_mlp_layernorm.of_sum(attended, hidden_states)
        fed, bias = checkpoint(self.mlp, False, normed) if self.recompute_mlp and self.training else self.mlp(normed)
        return residual + (fed if bias is None else fed + bias), None
