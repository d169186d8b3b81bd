"""Self-attention: packed projection, rotary embedding, attention of this process's heads, output projection.

Shapes: S tokens, B samples, H hidden, N query heads, G key/value groups, D head dim, W = (N + 2G) D.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

from llm_kernels.attention.op import attention, attention_qkv
from llm_kernels.attention.op import backend_for as attention_backend
from llm_kernels.attention.ref import attention as attention_by_segment
from llm_kernels.dispatch import backend_for
from llm_kernels.rope.op import rope, rope_qkv_
from llm_parallel.errors import UserError
from llm_parallel.model.deterministic_attention import Scores
from llm_parallel.model.deterministic_attention import attention as deterministic_attention
from llm_parallel.model.mcore_config import LlamaTransformerConfig
from llm_parallel.model.modules import KeyNorm, QueryNorm
from llm_parallel.model.sequence import SequenceInfo
from llm_parallel.parallel.scatter import all_gather, reduce_scatter


class LlamaAttention(SelfAttention):
    """megatron-core's projections around our core attention."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.config.qk_norm_over_heads:
            # Not by the layer spec: megatron-core refuses norms there unless its qk_layernorm is true.
            self.q_layernorm = QueryNorm(self.config, self.pg_collection.tp)
            self.k_layernorm = KeyNorm(self.config, self.pg_collection.tp)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, info: SequenceInfo, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [S, B, H] (S/tp with sequence parallelism) → the same shape, and the output projection's bias
        to be added, if it has one."""
        core: CoreAttention = self.core_attention
        # With more processes than groups, megatron-core divides one group's heads over several of them.
        whole_groups = self.config.num_query_groups >= self.config.tensor_model_parallel_size
        if whole_groups and core.takes_packed(hidden_states, info):
            qkv_SBW, _bias = self.linear_qkv(hidden_states)
            inputs = (core.rotate_packed(qkv_SBW, info),)
        else:
            inputs = self.get_query_key_value_tensors(hidden_states)
        if self.checkpoint_core_attention and self.training:
            attended = checkpoint(lambda *x: core(*x, info=info), False, *inputs)
        else:
            attended = core(*inputs, info=info)
        return self.linear_proj(attended)


class CoreAttention(nn.Module):
    """RoPE and causal attention of this process's heads; all-gathers keys and values under context parallelism."""

    def __init__(
        self,
        config: LlamaTransformerConfig,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.head_dim = config.kv_channels
        self.rotates = layer_number - 1 not in config.layers_without_rope
        # The configured scale holds the factor of the rotary angles, which a layer that does not rotate leaves out.
        configured = softmax_scale or config.attention_scale if self.rotates else None
        self.scale = configured or config.kv_channels**-0.5
        self.normed = config.qk_layernorm or config.qk_norm_over_heads
        self.window, self.softcap = (config.keys_to_the_left, -1), config.attention_softcap
        self.cp_group = pg_collection.cp
        self.kernels = config.kernels
        if self.kernels.attention == "gluon" and torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            if (major, minor) != (9, 0):
                raise UserError(
                    "kernels.attention = gluon needs a GPU of compute capability 9.0 (H100, H200), and this one has "
                    f"{major}.{minor}; use kernels.attention=auto"
                )
        self.num_groups = config.num_query_groups // config.tensor_model_parallel_size

    def _options(self) -> dict[str, Any]:
        """Keywords of the attention operators."""
        return {
            "scale": self.scale,
            "window": self.window,
            "softcap": self.softcap,
            "backend": self.kernels.attention,
        }

    def takes_packed(self, x: Tensor, info: SequenceInfo) -> bool:
        """Whether rotary embedding and attention work in place on the packed projection: with Triton, unless queries
        and keys are normalized before, or keys and values must be gathered separately."""
        alone = self.cp_group.size() == 1 and not self.normed
        rotates = backend_for(x, self.kernels.rope) == "triton"
        return alone and rotates and attention_backend(x, self.kernels.attention) != "torch"

    def rotate_packed(self, qkv_SBW: Tensor, info: SequenceInfo) -> Tensor:
        """Rotates queries and keys in place: the projection's result is needed in no other form."""
        if not self.rotates:
            return qkv_SBW
        return rope_qkv_(
            qkv_SBW, info.rope, num_groups=self.num_groups, head_dim=self.head_dim, backend=self.kernels.rope
        )

    def forward(self, *inputs: Tensor, info: SequenceInfo) -> Tensor:
        """Rotated qkv [S, B, W], or q [S, B, N, D] and k, v [S, B, G, D] not yet rotated → [S, B, N·D]."""
        if len(inputs) == 1:
            qkv_SBGMD = inputs[0].unflatten(2, (self.num_groups, -1, self.head_dim))
            (_, segments), *_ = info.tables()
            return attention_qkv(qkv_SBGMD, segments, **self._options()).flatten(2)
        q_SBND, k_SBGD, v_SBGD = inputs
        if self.rotates:
            q_SBND, k_SBGD = rope(q_SBND, k_SBGD, info.rope, backend=self.kernels.rope)
        if self.cp_group.size() > 1:
            k_SBGD, v_SBGD = gather_keys_values(torch.stack((k_SBGD, v_SBGD), dim=1), self.cp_group)
        if self.kernels.deterministic:
            how = Scores(self.scale, self.window[0], self.softcap)
            return deterministic_attention(q_SBND, k_SBGD, v_SBGD, info.segments, how).flatten(2)
        if attention_backend(q_SBND, self.kernels.attention) == "torch":
            seen = (info.segments, self.scale, self.window[0], self.softcap)
            return attention_by_segment(q_SBND, k_SBGD, v_SBGD, *seen).flatten(2)
        # One call for each range of this process's tokens: the keys that two ranges see overlap.
        parts: list[Any] = [
            attention(q_SBND[part], k_SBGD, v_SBGD, segments=table, **self._options()) for part, table in info.tables()
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(2)


class _GatherZigzag(torch.autograd.Function):
    """[S/cp, …] in zigzag order → [S, …] in order; backward sums the gradients of this process's tokens over all
    processes."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = x.new_empty(group.size(), 2, x.shape[0] // 2, *x.shape[1:])
        all_gather(parts.view(-1, *x.shape[1:]), x.contiguous(), group=group)
        return torch.cat((parts[:, 0], parts[:, 1].flip(0))).flatten(0, 1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cp = ctx.group.size()
        chunks = grad.view(2, cp, -1, *grad.shape[1:])
        by_rank = torch.stack((chunks[0], chunks[1].flip(0)), dim=1).flatten(1, 2).contiguous()
        out = torch.empty_like(by_rank[0])
        reduce_scatter(out, by_rank.flatten(0, 1), group=ctx.group)
        return out, None


def gather_keys_values(kv: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Keys and values of the whole sample from kv [S/cp, 2, B, G, D] of each process (Llama 3, arXiv 2407.21783)."""
    whole = _GatherZigzag.apply(kv, group)
    return whole[:, 0], whole[:, 1]
