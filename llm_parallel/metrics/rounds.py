"""Reads back what a run in rounds measured of each round: rewards and their spread, divergence, lengths, shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_parallel.errors import UserError
from llm_parallel.jsonlines import read_jsonlines
from llm_parallel.metrics.history import History

DIVERGENCES = {"kl_to_reference": "nats a token", "objective/kl": "nats an answer"}
"""Names of the divergence from the reference, with their units; the first that a run has is shown."""


@dataclass(frozen=True)
class ByNumber:
    """Of one round: the expected largest and median score among 1, 2, … of the answers to a prompt, mean over prompts;
    float64 [answers]."""

    round: int
    largest: np.ndarray
    median: np.ndarray


@dataclass(frozen=True)
class RoundHistory:
    """The rounds of one run in order, each once: as it was made last."""

    name: str
    records: tuple[dict[str, Any], ...]

    def __bool__(self) -> bool:
        return bool(self.records)

    def column(self, name: str) -> np.ndarray:
        """Values ``name``, float64 [rounds]; NaN where a round has none."""
        values = [record.get(name) for record in self.records]
        return np.array([np.nan if value is None else value for value in values], np.float64)

    def has(self, name: str) -> bool:
        """Whether some round has a value of that name."""
        return bool(np.isfinite(self.column(name)).any())

    @property
    def numbers(self) -> np.ndarray:
        """The rounds' numbers, from 0."""
        return self.column("number")

    @property
    def divergence(self) -> str | None:
        """Name of the divergence from the reference that the run has measured; None if it has no reference."""
        return next((name for name in DIVERGENCES if self.has(name)), None)

    def by_number(self) -> list[ByNumber]:
        """Of the rounds that have recorded it."""
        found = []
        for record in self.records:
            curves = [record.get(name) for name in ("reward_max_by_k", "reward_median_by_k")]
            if all(isinstance(curve, list) and len(curve) > 1 for curve in curves):
                largest, median = (np.array(curve, np.float64) for curve in curves)
                found.append(ByNumber(int(record["number"]), largest, median))
        return found


def read_rounds(history: History) -> RoundHistory:
    """The rounds of a run, which are few for its steps: ``events.jsonl`` has one record of each, and ``metrics.jsonl``
    further numbers with the step that began it. Empty if the run is not in rounds."""
    found: dict[int, dict[str, Any]] = {}
    last = int(history.steps[-1]["step"]) if history.steps else 0
    try:
        for record in read_jsonlines(history.folder / "events.jsonl"):
            whole = all(isinstance(record.get(name), int) for name in ("number", "step"))
            if record.get("event") == "round" and whole and record["step"] <= last:
                found[record["number"]] = record
    except UserError:
        pass  # a folder without events has no rounds
    for record in history.steps:
        number = record.get("train/round")
        if "train/reward" in record and number is not None and int(number) in found:
            more = {name.removeprefix("train/"): value for name, value in record.items() if name.startswith("train/")}
            found[int(number)] = {**more, **found[int(number)]}
    return RoundHistory(history.name, tuple(found[number] for number in sorted(found)))


def expected_order_statistics(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of scores [prompts, n] the expected largest one and the expected median among k of the n answers drawn without
    replacement, for k = 1 … n; means over prompts, float64 [n]. The median of an even number is the mean of the two in
    the middle. Exact, by the distribution of order statistics of a sample from a finite population."""
    n = scores.shape[1]
    ordered = np.sort(scores.astype(np.float64), axis=1).mean(axis=0)
    places = np.arange(n)

    def expected(rank: int, k: int) -> float:
        """Mean of the rank-th smallest of k."""
        chance = _log_ways(n, places, rank - 1) + _log_ways(n, n - 1 - places, k - rank)
        return float((ordered * np.exp(chance - _log_ways(n, np.array([n]), k))).sum())

    largest = np.array([expected(k, k) for k in range(1, n + 1)])
    middles = [((k + 1) // 2, k // 2 + 1) for k in range(1, n + 1)]
    median = np.array([(expected(low, k) + expected(high, k)) / 2 for k, (low, high) in enumerate(middles, 1)])
    return largest, median


def _log_ways(most: int, of: np.ndarray, choose: int) -> np.ndarray:
    """log of the number of ways to choose so many of ``of`` things; -inf where there are too few."""
    factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, most + 1)))])
    enough = of >= choose
    left = np.where(enough, of - choose, 0)
    return np.where(enough, factorial[of] - factorial[choose] - factorial[left], -np.inf)
