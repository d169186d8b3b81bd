"""How a model is held while it writes, as commands are asked for it; it imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm_parallel.errors import UserError

WEIGHTS = ("saved", "fp32", "bf16", "int8", "int4")
"""How weights may be held: as they are saved, or so."""
FEW_BITS: dict[str, Literal[4, 8]] = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Held:
    """The model's device, its ``weights``, one of ``WEIGHTS``, and whether it is deterministic. Raises UserError for
    weights that there are not, and for few bits in deterministic mode."""

    device: str = "auto"
    weights: str = "saved"
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise UserError(f"weights is {self.weights!r}; it must be one of {', '.join(WEIGHTS)}")
        if self.weights in FEW_BITS and self.deterministic:
            raise UserError(
                f"weights is {self.weights} and deterministic is given, which needs whole matrices; take fp32 or bf16"
            )


AS_SAVED = Held()
