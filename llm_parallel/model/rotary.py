"""Rotary frequencies of a model, with the scaling by which its context was extended."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llm_kernels.rope.ref import inverse_frequencies
from llm_parallel.config.tree import ModelConfig, RopeScaling


def frequencies(model: ModelConfig, length: int, device: torch.device) -> Tensor:
    """Angle per token of each pair of dimensions, fp32 [D / 2], for samples of ``length`` tokens, on which ``dynamic``
    and ``longrope`` scaling depend."""
    scaling, head = model.rope_scaling, model.kv_channels
    if scaling is None:
        return inverse_frequencies(head, model.rope_base, None, device)
    if scaling.kind == "llama3":
        numbers = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position)
        return inverse_frequencies(head, model.rope_base, numbers, device)
    if scaling.kind == "dynamic":
        # The base at which the slowest pair turns as far over the longer sample as before over the original context.
        beyond = max(length / scaling.original_max_position, 1.0)
        stretch = scaling.factor * beyond - (scaling.factor - 1.0)
        return inverse_frequencies(head, model.rope_base * stretch ** (head / (head - 2)), None, device)
    plain = inverse_frequencies(head, model.rope_base, None, device)
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "longrope":
        divisors = scaling.long_factors if length > scaling.original_max_position else scaling.short_factors
        return plain / torch.tensor(divisors, dtype=torch.float32, device=device)
    kept = _kept_by_yarn(scaling, model.rope_base, head).to(device)
    return plain * kept + plain / scaling.factor * (1.0 - kept)


def _kept_by_yarn(scaling: RopeScaling, base: float, head: int) -> Tensor:
    """Share of each pair's frequency that YaRN keeps, fp32 [D / 2]: 1 for pairs that turn more than ``beta_fast`` times
    within the original context, 0 below ``beta_slow``, and a ramp between."""

    def pair_that_turns(times: float) -> float:
        return head * math.log(scaling.original_max_position / (2 * math.pi * times)) / (2 * math.log(base))

    first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow)), head - 1)
    ramp = (torch.arange(head // 2, dtype=torch.float32) - first) / max(last - first, 1e-3)
    return 1.0 - ramp.clamp(0.0, 1.0)


def attention_factor(model: ModelConfig) -> float:
    """Factor of the cosines and sines; its square multiplies the attention scores."""
    scaling = model.rope_scaling
    if scaling is None or scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1.0:
        return 1.0
    if scaling.kind == "yarn":
        return 1.0 + 0.1 * math.log(scaling.factor)
    return math.sqrt(1.0 + math.log(scaling.factor) / math.log(scaling.original_max_position))
