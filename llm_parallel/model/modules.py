"""Our operators behind megatron-core's module interfaces. Written for one device; parallelism is mentioned where it
matters.

Shapes: S tokens, B samples, H hidden, F feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import checkpoint
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from llm_kernels.rms_norm.op import add_rms_norm, rms_norm
from llm_kernels.swiglu.op import swiglu
from llm_parallel.model import deterministic
from llm_parallel.model.adapters import ColumnLinear, RowLinear
from llm_parallel.model.mcore_config import LlamaTransformerConfig
from llm_parallel.model.sequence import SequenceInfo


class RMSNorm(nn.Module):
    """RMSNorm over H. Under sequence parallelism every process norms its own tokens, so the weight's gradient is summed
    over the tensor-parallel group; megatron-core does that for parameters marked ``sequence_parallel``."""

    def __init__(self, config: LlamaTransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps, self.backend, self.deterministic = eps, config.kernels.rms_norm, config.kernels.deterministic
        device = "cpu" if config.use_cpu_initialization else "cuda"
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x_SBH: Tensor) -> Tensor:
        """[S, B, H] → [S, B, H]."""
        # torch reduces a row in the same order wherever it lies only if its numbers are contiguous.
        x_SBH = x_SBH.contiguous() if self.deterministic else x_SBH
        return rms_norm(x_SBH, self.weight, self.eps, backend=self.backend)

    def of_sum(self, x_SBH: Tensor, residual_SBH: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum) in one pass."""
        return add_rms_norm(x_SBH, residual_SBH, self.weight, self.eps, backend=self.backend)


class HeadsNorm(nn.Module):
    """RMSNorm over all heads together, of which this process has those of its tensor-parallel rank: the squares are
    summed over the group, and the weight is divided as the heads are (another name than RMSNorm's whole one)."""

    def __init__(self, config: LlamaTransformerConfig, num_heads: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.eps, self.backend, self.group = config.layernorm_epsilon, config.kernels.rms_norm, group
        self.deterministic = config.kernels.deterministic
        self.channels = num_heads * config.kv_channels
        shape = (self.channels // config.tensor_model_parallel_size,)
        device = "cpu" if config.use_cpu_initialization else "cuda"
        self.heads_weight = nn.Parameter(torch.ones(shape, dtype=config.params_dtype, device=device))

    def forward(self, x_SBND: Tensor) -> Tensor:
        """[S, B, heads of this process, D] → the same shape."""
        x_SBW = x_SBND.flatten(2)
        if x_SBW.shape[-1] == self.channels and not self.deterministic:
            return rms_norm(x_SBW, self.heads_weight, self.eps, backend=self.backend).view_as(x_SBND)
        x = x_SBW.float()
        if self.deterministic:
            found: Any = deterministic.SquaresOfHeads.apply(x_SBND.contiguous().flatten(0, 1), self.group)
            return self._scaled(x, found.unflatten(0, x.shape[:2])).to(x_SBND.dtype).view_as(x_SBND)
        # Every rank's output depends on the whole sum, so its gradient is summed over the group as well.
        squares = reduce_from_tensor_model_parallel_region(x.square().sum(-1, keepdim=True), group=self.group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        return self._scaled(x, squares).to(x_SBND.dtype).view_as(x_SBND)

    def _scaled(self, x: Tensor, squares: Tensor) -> Tensor:
        return x * torch.rsqrt(squares / self.channels + self.eps) * self.heads_weight.float()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """For megatron-core's checkpoints: the weight is divided over the tensor-parallel group."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"heads_weight": 0},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class QueryNorm(HeadsNorm):
    """RMSNorm over the queries of all heads."""

    def __init__(self, config: LlamaTransformerConfig, group: dist.ProcessGroup) -> None:
        super().__init__(config, config.num_attention_heads, group)


class KeyNorm(HeadsNorm):
    """RMSNorm over the keys of all groups."""

    def __init__(self, config: LlamaTransformerConfig, group: dist.ProcessGroup) -> None:
        super().__init__(config, config.num_query_groups, group)


class SwiGLU(MegatronModule):
    """Activation of the MLP; a MegatronModule because MLP asks it for its sharded state."""

    def __init__(self, config: LlamaTransformerConfig) -> None:
        super().__init__(config)

    def forward(self, x_SBF: Tensor) -> Tensor:
        """[S, B, 2F] (gate, then up) → [S, B, F]. The gradient is written over x, which nothing else keeps."""
        if self.config.kernels.deterministic:
            out: Tensor = deterministic.SwiGLU.apply(x_SBF)
            return out
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


class OutputNormLayer(TransformerLayer):
    """One layer that adds the norm of attention's output, then that of the MLP's, to the residual stream."""

    def __init__(self, config: LlamaTransformerConfig, *arguments: Any, **named: Any) -> None:
        super().__init__(config, *arguments, **named)
        self.attention_output_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.mlp_output_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: SequenceInfo | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """As LlamaLayer."""
        attended, bias = self.self_attention(hidden_states, info=packed_seq_params)
        attended = attended if bias is None else attended + bias
        residual = hidden_states + self.attention_output_layernorm(attended)
        fed, bias = (
            checkpoint(self.mlp, False, residual) if self.recompute_mlp and self.training else self.mlp(residual)
        )
        return residual + self.mlp_output_layernorm(fed if bias is None else fed + bias), None
