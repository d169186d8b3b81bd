"""Paged attention in plain torch: every request by itself, its keys gathered from their pages."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_kernels.attention.ref import Options, explicit
from llm_kernels.paged_attention.plan import Plan


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, left: int = -1, softcap: float = 0.0
) -> Tensor:
    """softmax(scale q k') v of each request over its own keys; computed in fp64 for fp64 inputs, in fp32 for others.

    q: [t, h, d]; k, v: [slots, g, d]. Key ``n`` of a request lies in slot ``pages[n // page_tokens] * page_tokens + n %
    page_tokens``. Its queries are the last of its tokens, and see the keys up to their own, ``left`` of them before it
    (-1: all). softcap > 0: scores become softcap tanh(score / softcap). Returns [t, h, d] in q's dtype, 0 for rows of
    no request.
    """
    out = torch.zeros_like(q)
    options = Options(scale, left, 0, softcap)
    for (first, count, length), of in zip(plan.parts.tolist(), plan.pages):
        at = torch.arange(length, device=q.device)
        slots = of[at // plan.page_tokens].long() * plan.page_tokens + at % plan.page_tokens
        table = torch.tensor([[0, 0, count, 0, length]], device=q.device)
        q_part, k_part, v_part = (x.unsqueeze(1) for x in (q[first : first + count], k[slots], v[slots]))
        out[first : first + count] = explicit(q_part, k_part, v_part, table, options)[0].squeeze(1)
    return out
