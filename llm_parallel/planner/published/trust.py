"""How far a prediction may be off: the error on published rows that are like the question, each predicted by constants
that were fitted without any row of its source."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from llm_parallel.planner.hardware import Cluster, left_out_predictions
from llm_parallel.planner.published.fit import family_of
from llm_parallel.planner.published.rows import Row, read_rows
from llm_parallel.planner.shapes import Strategy

FEWEST = 5
"""Rows that a mean error is given for."""
FEWEST_OF_SOURCE = 3
"""Rows of a source whose mean error counts among the sources'."""
LENGTHS, SIZES = 4.0, 8.0
"""Ratios of sequence lengths, and of numbers of GPUs, up to which a row is like the question."""
KNOWN_CHIPS = ("A100", "H100", "H200")


@dataclass(frozen=True)
class Trust:
    """What is known about the error of a prediction."""

    like: int
    """Published rows that are like the question."""
    sources: int
    """Sources of these rows."""
    error: float | None
    """Mean absolute error of the step time on them; None if they are too few."""
    best: float
    """Least of the mean errors of all sources of the same kind of chip, or of all chips if none has published."""
    worst: float
    """Largest of them."""
    apart: str
    """In what the question is unlike all rows; empty if rows are like it."""

    def describe(self) -> str:
        """A sentence or two."""
        across = f"the mean errors of single sources range from {self.best:.0%} to {self.worst:.0%}"
        if self.error is None:
            return f"No published row is like this ({self.apart}); {across}, so take the times as rough ones."
        return (
            f"Expected error of the step time: {self.error:.1%}, the mean over {self.like} published rows like this "
            f"from {self.sources} source{'s' * (self.sources > 1)}, each predicted by constants fitted without its "
            f"source; {across} "
            "(llm-parallel plan --validate)."
        )


@lru_cache(maxsize=1)
def _errors() -> tuple[tuple[Row, float], ...]:
    """Each published row with its relative error when its source is left out."""
    seconds = left_out_predictions()
    rows, _ = read_rows()
    return tuple((row, seconds[row.number] / row.step_s - 1.0) for row in rows if row.number in seconds)


def trust(cluster: Cluster, strategy: Strategy, has_experts: bool = False) -> Trust:
    """How far a prediction of ``strategy`` on ``cluster`` may be off. Rows are like it if they are of the same kind of
    chip and of software (NVIDIA's stack or open), of 8 or of 16 bits, and if their lengths are within a factor of four
    and their numbers of GPUs within a factor of eight."""
    chip = next((name for name in KNOWN_CHIPS if cluster.chip.name.startswith(name)), None)
    exact = chip is not None and "PCIE" not in cluster.chip.name.upper()
    family = [(row, error) for row, error in _errors() if exact and family_of(row.chip) == family_of(str(chip))]
    like, apart = family, "" if exact else f"the chip {cluster.chip.name}"
    if strategy.adapter is not None or has_experts:  # no row that is predicted has either
        like, apart = [], apart or ("a mixture of experts" if has_experts else "adapters on frozen weights")
    for name, keeps in (
        ("its software", lambda row: row.strategy.te == strategy.te),
        (f"{strategy.precision}", lambda row: (row.strategy.precision == "fp8") == (strategy.precision == "fp8")),
        (f"{strategy.seq:,} tokens", lambda row: _within(row.strategy.seq, strategy.seq, LENGTHS)),
        (f"{strategy.gpus:,} GPUs", lambda row: _within(row.strategy.gpus, strategy.gpus, SIZES)),
    ):
        left = [(row, error) for row, error in like if keeps(row)]
        if like and len(left) < FEWEST and not apart:
            apart = name
        like = left
    of = _of_sources(family or _errors())
    known = len(like) >= FEWEST
    return Trust(
        like=len(like),
        sources=len({row.source for row, _ in like}),
        error=statistics.fmean(abs(error) for _, error in like) if known else None,
        best=min(of.values()),
        worst=max(of.values()),
        apart="" if known else apart,
    )


def by_left_out_source() -> dict[str, tuple[int, float, float]]:
    """For each source and chip: rows, mean absolute error, and mean error, with the source left out of the fit."""
    groups: dict[str, list[float]] = {}
    for row, error in _errors():
        groups.setdefault(f"{row.source} ({row.chip})", []).append(error)
    return {
        name: (len(some), statistics.fmean(map(abs, some)), statistics.fmean(some)) for name, some in groups.items()
    }


SIZE_STEPS = (8, 64, 512)
"""Numbers of GPUs that end a group of sizes."""


def by_left_out(kind: str) -> dict[str, tuple[int, float, float]]:
    """Rows, mean absolute error and mean error with the row's source left out of the fit, for each ``chip``,
    ``software`` or ``size``, the number of GPUs."""
    groups: dict[str, list[float]] = {}
    for row, error in sorted(_errors(), key=lambda item: item[0].strategy.gpus):
        groups.setdefault(_group(row, kind), []).append(error)
    return {
        name: (len(some), statistics.fmean(map(abs, some)), statistics.fmean(some)) for name, some in groups.items()
    }


def _group(row: Row, kind: str) -> str:
    if kind != "size":
        return row.chip if kind == "chip" else row.software
    gpus = row.strategy.gpus
    most = next((end for end in SIZE_STEPS if gpus <= end), None)
    return f"up to {most} GPUs" if most else f"over {SIZE_STEPS[-1]} GPUs"


def _of_sources(rows: Sequence[tuple[Row, float]]) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for row, error in rows:
        groups.setdefault(row.source, []).append(abs(error))
    return {name: statistics.fmean(some) for name, some in groups.items() if len(some) >= FEWEST_OF_SOURCE}


def _within(a: int, b: int, ratio: float) -> bool:
    return max(a, b) <= ratio * min(a, b)
