"""The layout that ``plan --explain`` names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llm_parallel.errors import UserError
from llm_parallel.planner.shapes import Shape, Strategy

_SIZES = {
    "tp": "tp",
    "pp": "pp",
    "cp": "cp",
    "vpp": "vpp",
    "mbs": "micro_batch",
    "ep": "ep",
    "recompute": "recompute",
    "dp": "dp",
}


def explained(text: str, base: Strategy) -> Strategy:
    """The layout that a text like ``tp=8,pp=4,mbs=1`` names. Raises UserError where it is none, or does not divide the
    GPUs and the batch."""
    sizes: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in _SIZES or not value:
            raise UserError(f"--explain {text}: {part!r} is not one of {', '.join(_SIZES)} with a value, as tp=8")
        if _SIZES[name] in sizes:
            raise UserError(f"--explain {text}: {name} is given twice; give it once")
        if name == "recompute":
            if value not in ("none", "selective", "full", *(["ops"] if base.zero == 3 else [])):
                raise UserError(f"--explain {text}: recompute is none, selective or full, not {value}")
            sizes["recompute"] = value
        elif not value.isdecimal() or int(value) < 1:
            raise UserError(f"--explain {text}: {name}={value} must be a whole number of at least 1")
        else:
            sizes[_SIZES[name]] = int(value)
    dp = sizes.pop("dp", None)
    found = replace(base, **sizes, sequence_parallel=sizes.get("tp", 1) > 1, overlap_pp=sizes.get("vpp", 1) > 1)
    product = found.tp * found.pp * found.cp
    made = f"tp={found.tp} x pp={found.pp} x cp={found.cp}"
    if base.gpus % product:
        raise UserError(f"--explain {text}: {made} is {product}, which does not divide --gpus {base.gpus}")
    if dp is not None and dp * product != base.gpus:
        raise UserError(
            f"--explain {text}: {made} x dp={dp} is {dp * product}, not --gpus {base.gpus}; use dp={found.dp}"
        )
    if base.global_batch % (found.dp * found.micro_batch):
        raise UserError(
            f"--explain {text}: --global-batch {base.global_batch} does not divide into micro batches of "
            f"{found.micro_batch} on {found.dp} replicas"
        )
    return found


def check_ep(text: str, shape: Shape, strategy: Strategy) -> None:
    """Raises UserError for an expert-parallel size that divides neither the experts nor the ranks."""
    count, ranks = shape.experts.count if shape.experts else 1, strategy.dp * strategy.cp
    if count % strategy.ep or ranks % strategy.ep:
        raise UserError(
            f"--explain {text}: ep={strategy.ep} must divide the {count} expert{'s' * (count > 1)} of a layer and "
            f"dp x cp = {ranks}"
        )
