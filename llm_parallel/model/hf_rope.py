"""Converts between rotary scaling in Hugging Face's ``config.json`` and ours."""

from __future__ import annotations

import math
from typing import Any

from llm_parallel.config.tree import ModelConfig, RopeScaling
from llm_parallel.errors import UserError

KINDS = ("default", "llama3", "linear", "dynamic", "yarn", "longrope")


def hf_to_rope(values: dict[str, Any], longest: int) -> tuple[float, RopeScaling | None, int]:
    """Base, scaling and longest context, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and
    ``rope_scaling`` (before). Raises UserError for a scaling that we do not have."""
    newer = values.get("rope_parameters") or {}
    rope = values.get("rope_scaling") or newer  # as in transformers, the older name wins where both are given
    for given in (rope, newer):
        if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
            raise UserError(f"rotary scaling in config.json is {given!r}; only one for all layers can be converted")
    base = float(rope.get("rope_theta") or newer.get("rope_theta") or values.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    kind = "longrope" if kind == "su" else kind  # the name that Phi-3 first gave it
    if kind not in KINDS:
        raise UserError(f"rope_type is {kind!r} in config.json; only {', '.join(KINDS)} can be converted")
    if rope.get("partial_rotary_factor", values.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError("partial_rotary_factor in config.json is not 1; only 1 (whole heads rotate) can be converted")
    if kind == "yarn" and rope.get("truncate") is False:
        raise UserError("rope_scaling.truncate is false in config.json; only yarn with whole pairs can be converted")
    if kind == "default":
        return base, None, longest
    if kind == "linear":
        return base, RopeScaling(kind="linear", factor=rope["factor"], original_max_position=longest), longest
    if kind == "dynamic":
        # transformers' ``max_position_embeddings`` is the context before the extension here.
        scaling = RopeScaling(kind="dynamic", factor=rope["factor"], original_max_position=longest)
        return base, scaling, int(longest * scaling.factor)
    # As in transformers, the one outside of the scaling wins where both are given.
    original = values.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or longest
    factor = rope.get("factor") or longest / original
    if kind == "llama3":
        scaling = RopeScaling(
            factor=factor,
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_max_position=original,
        )
    elif kind == "yarn":
        scaling = RopeScaling(
            kind="yarn",
            factor=factor,
            original_max_position=original,
            beta_fast=rope.get("beta_fast") or 32.0,
            beta_slow=rope.get("beta_slow") or 1.0,
            attention_factor=_yarn_attention(rope, factor),
        )
    else:
        scaling = RopeScaling(
            kind="longrope",
            factor=factor,
            original_max_position=original,
            short_factors=tuple(rope["short_factor"]),
            long_factors=tuple(rope["long_factor"]),
            attention_factor=rope.get("attention_factor"),
        )
    return base, scaling, longest


def _yarn_attention(rope: dict[str, Any], factor: float) -> float | None:
    """YaRN's attention factor, where it or DeepSeek's two parameters for it are given; None means the paper's
    formula."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    if not above or not below or factor <= 1.0:
        return None
    return (0.1 * above * math.log(factor) + 1.0) / (0.1 * below * math.log(factor) + 1.0)


def rope_to_hf(model: ModelConfig) -> tuple[dict[str, Any], int]:
    """``rope_scaling`` in Hugging Face's form, and ``max_position_embeddings``."""
    scaling, longest = model.rope_scaling, model.max_seq_length_tokens
    if scaling is None:
        return {"rope_type": "default"}, longest
    rope: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "dynamic":
        return rope, scaling.original_max_position
    if scaling.kind == "linear":
        return rope, longest
    rope["original_max_position_embeddings"] = scaling.original_max_position
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    if scaling.kind == "longrope":
        rope |= {"short_factor": list(scaling.short_factors or ()), "long_factor": list(scaling.long_factors or ())}
    if scaling.attention_factor is not None:
        rope["attention_factor"] = scaling.attention_factor
    return rope, longest
