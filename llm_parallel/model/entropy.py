"""The entropy of the model's distribution over the vocabulary, with a gradient: what an entropy bonus needs.

Shapes: R rows (positions), V columns of the vocabulary that this tensor-parallel rank holds.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm_parallel.model.observe import block_rows, joined, sums_of_columns


class _Entropy(torch.autograd.Function):
    """Saves the logits, which exist anyway, and two numbers for each row."""

    @staticmethod
    def forward(ctx: Any, logits_RV: Tensor, num_valid: int, softcap: float, group: Any) -> Tensor:
        rows = block_rows(logits_RV.shape[1])
        found = torch.cat([sums_of_columns(block, num_valid, softcap) for block in logits_RV.split(rows)], dim=1)
        if group is not None and group.size() > 1:
            gathered = found.new_empty(group.size(), *found.shape)
            dist.all_gather_into_tensor(gathered.view(-1), found.contiguous().view(-1), group=group)
            found = joined(gathered)
        top, _, total, moment = found
        entropies = total.log() - moment / total
        ctx.save_for_backward(logits_RV, top + total.log(), entropies)
        ctx.num_valid, ctx.softcap = num_valid, softcap
        return entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        logits_RV, lse, entropies = ctx.saved_tensors
        out, rows = torch.zeros_like(logits_RV), block_rows(logits_RV.shape[1])
        for start in range(0, len(logits_RV), rows):
            block = slice(start, start + rows)
            x = logits_RV[block, : ctx.num_valid].float()
            bent = torch.tanh(x / ctx.softcap) if ctx.softcap else None
            x = x if bent is None else ctx.softcap * bent
            log_p = x - lse[block, None]
            # H = -sum p log p, so dH/dx = -p (log p + H).
            slope = -log_p.exp() * (log_p + entropies[block, None]) * grad[block, None]
            out[block, : ctx.num_valid] = slope if bent is None else slope * (1.0 - bent**2)
        return out, None, None, None


def entropy(logits: Tensor, num_valid: int, softcap: float = 0.0, group: dist.ProcessGroup | None = None) -> Tensor:
    """Entropy in nats, fp32 [...], of the distribution over the first ``num_valid`` columns of ``logits`` [..., V],
    after ``softcap`` as in the model. With a ``group`` the vocabulary is divided over its ranks; the entropy is the
    same on each, and the gradient is that of the rank's own columns. One all-gather of four numbers for each position
    in forward, nothing in backward, which writes a gradient of the size of the logits. Differentiable once."""
    flat = logits.reshape(-1, logits.shape[-1])
    found: Tensor = _Entropy.apply(flat, num_valid, softcap, group)
    return found.view(logits.shape[:-1])
