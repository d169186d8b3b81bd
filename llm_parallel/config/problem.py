"""The problem that a broken rule reports, and the case that rules check."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from llm_parallel.config.tree import RunConfig

WORLD_SIZE = "world_size"
"""Key of a fix that changes the number of processes instead of a field."""


@dataclass(frozen=True)
class Problem:
    """One broken rule."""

    fields: tuple[str, ...]
    """Dotted names of the fields that do not fit together."""
    statement: str
    """What does not fit, with values; a clause without a full stop."""
    fix: dict[str, Any]
    """Values by dotted name (or ``WORLD_SIZE``) that mend it."""

    @property
    def message(self) -> str:
        """The statement and the fix in one sentence."""
        return f"{self.statement}; use " + " and ".join(
            f"{value} processes" if name == WORLD_SIZE else f"{name}={_as_override(value)}"
            for name, value in self.fix.items()
        )


@dataclass(frozen=True)
class Case:
    """A configuration and where it is to run."""

    config: RunConfig
    world_size: int | None
    device: Literal["cpu", "cuda"]

    @property
    def model_size(self) -> int:
        """Processes of one replica of the model."""
        parallel = self.config.parallel
        return parallel.tp * parallel.pp * parallel.cp

    @property
    def dp(self) -> int:
        """Data-parallel replicas; at least 1, also where the number of processes does not fit."""
        return self.config.parallel.dp or max(1, (self.world_size or 0) // self.model_size)

    @property
    def sequence_parallel(self) -> bool:
        """Whether sequence parallelism is on, by the default too."""
        return self.config.parallel.divides_sequence

    @property
    def batch_unit(self) -> int:
        """Number that every global batch size must be a multiple of."""
        parallel = self.config.parallel
        interleaved = parallel.pp if parallel.vpp > 1 else 1
        return self.config.train.micro_batch_size * self.dp * interleaved


def divisors(number: int) -> list[int]:
    """All divisors of ``number``, ascending."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def nearest(value: int, options: list[int]) -> int:
    """The option nearest to ``value``, the smaller of two."""
    return min(options, key=lambda option: (abs(option - value), option))


def multiple(value: int, unit: int) -> int:
    """The positive multiple of ``unit`` nearest to ``value``."""
    return max(round(value / unit), 1) * unit


def _as_override(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).partition("\n")[0].replace(" ", "")
