"""Our operators behind megatron-core's module interfaces. Written for one device; parallelism is named where it enters.

Shapes: S tokens, B samples, H hidden, N query heads, G key/value groups, D head dim, F feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from llm_kernels.attention.ref import attention
from llm_kernels.rms_norm.ref import rms_norm
from llm_kernels.rope.ref import rope
from llm_kernels.swiglu.ref import swiglu
from llm_parallel.model.sequence import SequenceInfo


class RMSNorm(nn.Module):
    """RMSNorm over H. Under sequence parallelism every process norms its own tokens, so the weight's gradient is summed
    over the tensor-parallel group; megatron-core does that for parameters marked ``sequence_parallel``."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else "cuda"
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x_SBH: Tensor) -> Tensor:
        """[S, B, H] → [S, B, H]."""
        return rms_norm(x_SBH, self.weight, self.eps)


class SwiGLU(MegatronModule):
    """Activation of the MLP; a MegatronModule because MLP asks it for its sharded state."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)

    def forward(self, x_SBF: Tensor) -> Tensor:
        """[S, B, 2F] (gate, then up) → [S, B, F]."""
        return swiglu(x_SBF)


class CoreAttention(nn.Module):
    """RoPE and causal attention of this process's heads; all-gathers keys and values under context parallelism."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.cp_group = pg_collection.cp

    def forward(
        self,
        q_SBND: Tensor,
        k_SBGD: Tensor,
        v_SBGD: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        packed_seq_params: SequenceInfo,
        **_: Any,
    ) -> Tensor:
        """q [S, B, N, D]; k, v [S, B, G, D] → [S, B, N·D]. The mask is in ``packed_seq_params.segments``."""
        info = packed_seq_params
        assert info.cos is not None and info.sin is not None
        q_SBND, k_SBGD = rope(q_SBND, info.cos, info.sin), rope(k_SBGD, info.cos, info.sin)
        if info.cache is not None:
            k_SBGD, v_SBGD = info.cache.extend(self.layer_number, k_SBGD, v_SBGD)
        elif self.cp_group.size() > 1:
            k_SBGD, v_SBGD = gather_keys_values(torch.stack((k_SBGD, v_SBGD), dim=1), self.cp_group)
        return attention(q_SBND, k_SBGD, v_SBGD, info.segments, self.scale).flatten(2)


class _GatherZigzag(torch.autograd.Function):
    """[S/cp, …] in zigzag order → [S, …] in order; backward sums what all processes found for this one's tokens."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = x.new_empty(group.size(), 2, x.shape[0] // 2, *x.shape[1:])
        dist.all_gather_into_tensor(parts.view(-1, *x.shape[1:]), x.contiguous(), group=group)
        return torch.cat((parts[:, 0], parts[:, 1].flip(0))).flatten(0, 1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cp = ctx.group.size()
        chunks = grad.view(2, cp, -1, *grad.shape[1:])
        by_rank = torch.stack((chunks[0], chunks[1].flip(0)), dim=1).flatten(1, 2).contiguous()
        out = torch.empty_like(by_rank[0])
        dist.reduce_scatter_tensor(out, by_rank.flatten(0, 1), group=ctx.group)
        return out, None


def gather_keys_values(kv: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Keys and values of the whole sample from kv [S/cp, 2, B, G, D] of each process (Llama 3, arXiv 2407.21783)."""
    whole = _GatherZigzag.apply(kv, group)
    return whole[:, 0], whole[:, 1]
