"""How tokens are chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_parallel.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 takes the likeliest token (greedy); ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0
    keep all tokens. The penalties are those of the usual interfaces: ``repetition_penalty`` divides the positive logits
    of tokens that occurred, the prompt's included, and multiplies the negative ones (Keskar et al. 2019, arXiv
    1909.05858); ``frequency_penalty`` is taken off for each time that a token occurred in the answer, and
    ``presence_penalty`` once. ``logit_bias``: numbers that are added to the logits of tokens. ``top_log_probs``: how
    many of the likeliest tokens are reported with each answer's token.

    Raises UserError for values out of range."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_log_probs: int = 0

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0.0, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0.0 < self.top_p <= 1.0, "over 0 and at most 1"),
            "min_p": (0.0 <= self.min_p <= 1.0, "0 (all tokens) to 1"),
            "seed": (-(2**63) <= self.seed < 2**63, "a number of 64 bits"),
            "repetition_penalty": (self.repetition_penalty > 0.0, "over 0 (1 for none)"),
            "top_log_probs": (0 <= self.top_log_probs <= 100, "0 to 100"),
        }
        for name, (fine, right) in limits.items():
            if not fine:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {right}")

    @property
    def changes_logits(self) -> bool:
        """Whether penalties or biases are added to the logits."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return penalties != (1.0, 0.0, 0.0) or bool(self.logit_bias)


GREEDY = Sampling()


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """fp32 logits [b, v] with temperature applied, and minus infinity for tokens that cannot be drawn: top-k (Fan et
    al. 2018, arXiv 1805.04833), then top-p (Holtzman et al. 2019, arXiv 1904.09751), then min-p (Nguyen et al. 2024,
    arXiv 2407.01082), which keeps tokens of at least ``min_p`` times the likeliest one's share."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        dropped = before >= sampling.top_p  # the token at which the sum reaches top_p stays
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    if sampling.min_p > 0.0:
        shares = logits.softmax(dim=-1)
        logits = logits.masked_fill(shares < sampling.min_p * shares.max(dim=-1, keepdim=True).values, -torch.inf)
    return logits
