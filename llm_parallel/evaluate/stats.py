"""Statistics of two evaluations of the same documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROUNDS = 10_000
EXACT = 2000
"""Changed documents up to which McNemar's test is exact."""


@dataclass(frozen=True)
class Paired:
    """Two evaluations of ``count`` documents. first, second: means; low, high: the 95 % interval of the difference;
    better, worse: documents whose value rose and fell; p: of McNemar's test, None where values are not 0 and 1."""

    count: int
    first: float
    second: float
    low: float
    high: float
    better: int
    worse: int
    p: float | None

    @property
    def difference(self) -> float:
        """Of the means."""
        return self.second - self.first


def paired(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Paired:
    """Compares the values of the same documents in two evaluations. The interval is the percentile interval of a
    bootstrap over documents (Efron 1979), which are drawn in pairs."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    assert a.shape == b.shape and a.size
    differences = b - a
    low, high = bootstrap_interval(differences, seed)
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    binary = bool(np.isin(a, (0.0, 1.0)).all() and np.isin(b, (0.0, 1.0)).all())
    p = mcnemar(better, worse) if binary else None
    return Paired(a.size, float(a.mean()), float(b.mean()), low, high, better, worse, p)


def bootstrap_interval(values: np.ndarray, seed: int = 0, rounds: int = ROUNDS) -> tuple[float, float]:
    """The 95 % percentile interval of the mean. Equal values are drawn together: a round is one draw of how often each
    value occurs, which for 0 and 1 takes as long for 10 documents as for 10,000."""
    distinct, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(values.size, counts / values.size, size=rounds)
    means = drawn @ distinct / values.size
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def mcnemar(better: int, worse: int) -> float:
    """The two-sided p of McNemar's test (1947): the chance of so uneven a division of the changed documents if both
    ways were as likely. Exact by the binomial distribution, by the normal one with a correction for many documents."""
    count, least = better + worse, min(better, worse)
    if not count:
        return 1.0
    if count <= EXACT:
        logs = [_log_comb(count, number) - count * math.log(2) for number in range(least + 1)]
        return min(1.0, 2 * sum(map(math.exp, logs)))
    z = max(abs(better - worse) - 1, 0) / math.sqrt(count)
    return math.erfc(z / math.sqrt(2))


def _log_comb(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
