"""A head that gives every token one number in place of log-probabilities: what a critic or a reward model says of the
text up to and with it."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from llm_parallel.model.mcore_config import LlamaTransformerConfig


class ValueHead(nn.Module):
    """value = w · hidden, in fp32, with w [1, H] on every tensor-parallel rank of the last stage."""

    def __init__(self, config: LlamaTransformerConfig, device: torch.device, group: Any) -> None:
        super().__init__()
        self._sequence_parallel, self._group = config.sequence_parallel, group
        self.weight = nn.Parameter(torch.empty(1, config.hidden_size, dtype=config.params_dtype, device=device))
        # Each rank sees its own tokens then, and megatron-core sums the gradient over them.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden_SBH: Tensor) -> Tensor:
        """Hidden states, this rank's tokens under sequence parallelism → fp32 values [B, S] of all tokens."""
        values_SB1 = hidden_SBH.float() @ self.weight.float().t()
        if self._sequence_parallel:
            # All ranks compute the same loss of the same values: backward takes this rank's tokens and sums nothing.
            values_SB1 = gather_from_sequence_parallel_region(
                values_SB1, tensor_parallel_output_grad=False, group=self._group
            )
        return values_SB1.squeeze(-1).t().contiguous()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """For megatron-core's checkpoints: every tensor-parallel rank has the same weight."""
        state, groups = self.state_dict(keep_vars=True), {"dp_cp_group": metadata["dp_cp_group"]}
        return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets, tp_group=self._group, **groups)
