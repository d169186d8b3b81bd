"""Choosing the next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_parallel.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 takes the likeliest token (greedy); ``top_k`` 0 and ``top_p`` 1 keep all
    tokens.

    Raises UserError for values out of range."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0.0, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0.0 < self.top_p <= 1.0, "over 0 and at most 1"),
        }
        for name, (fine, right) in limits.items():
            if not fine:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {right}")


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """fp32 logits [b, v] with temperature applied, and minus infinity for tokens that cannot be drawn: top-k (Fan et
    al. 2018, arXiv 1805.04833), then top-p (Holtzman et al. 2019, arXiv 1904.09751)."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        dropped = before >= sampling.top_p  # the token at which the sum reaches top_p stays
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    return logits


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Next tokens, int64 [b], of fp32 logits [b, v]. Drawn on the CPU, so that a seed means the same everywhere."""
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    shares = filtered(logits.float(), sampling).softmax(dim=-1)
    return torch.multinomial(shares.cpu(), 1, generator=generator).squeeze(-1).to(logits.device)
