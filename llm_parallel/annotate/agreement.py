"""How far annotators agree, beyond chance.

Cohen, "A Coefficient of Agreement for Nominal Scales", 1960, for each two annotators; Krippendorff, "Computing
Krippendorff's Alpha-Reliability", 2011, for any number of them, of whom each may have judged some of the units.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from llm_parallel.annotate.board import Judgement, Task

Units = Mapping[Hashable, Mapping[str, Hashable]]
"""For each thing that was judged, what each annotator said of it."""


@dataclass(frozen=True)
class Agreement:
    """units: things that at least two annotators judged; raw: the share of pairs of judgements of one unit that are the
    same; alpha: Krippendorff's, nominal; kappa: Cohen's, of each two annotators with common units, with the number of
    these. NaN where it is not defined: nobody to compare, or no two values that could differ."""

    units: int
    raw: float
    alpha: float
    kappa: Mapping[tuple[str, str], tuple[float, int]]


def units_of(tasks: Mapping[str, Task], judgements: Sequence[Judgement], mode: str) -> Units:
    """What is compared. A ranking is taken apart into each two of its answers (the first is better, the second, or
    neither); the best answer and the better one of two are named by their place in the record, whatever the order in
    which they were shown; 0 is a tie."""
    found: dict[Hashable, dict[str, Hashable]] = {}
    for judgement in judgements:
        task, ranks = tasks.get(judgement.task), judgement.ranks
        if task is None or ranks is None:
            continue
        if mode == "ranking":
            for one, other in combinations(range(len(ranks)), 2):
                sign = (ranks[one] > ranks[other]) - (ranks[one] < ranks[other])
                found.setdefault((task.id, one, other), {})[judgement.annotator] = sign
        elif mode == "good-bad":
            found.setdefault(task.id, {})[judgement.annotator] = ranks[0]
        else:
            best = ranks.index(1) + 1 if ranks.count(1) == 1 else 0
            found.setdefault(task.id, {})[judgement.annotator] = best
    return found


def agreement(units: Units) -> Agreement:
    """The agreement of all annotators."""
    shared = [values for values in units.values() if len(values) > 1]
    pairs = [one == other for values in shared for one, other in combinations(values.values(), 2)]
    raw = sum(pairs) / len(pairs) if pairs else math.nan
    return Agreement(len(shared), raw, krippendorff_alpha(shared), dict(_kappas(shared)))


def krippendorff_alpha(units: Sequence[Mapping[str, Hashable]]) -> float:
    """1 - observed disagreement / expected disagreement, nominal."""
    counts = [Counter(values.values()) for values in units if len(values) > 1]
    total: Counter[Hashable] = Counter()
    disagreeing = 0.0
    for count in counts:
        total += count
        size = sum(count.values())
        disagreeing += sum(number * (size - number) for number in count.values()) / (size - 1)
    whole = sum(total.values())
    expected = sum(number * (whole - number) for number in total.values()) / (whole - 1) if whole > 1 else 0.0
    return 1.0 - disagreeing / expected if expected else math.nan


def cohen_kappa(pairs: Sequence[tuple[Hashable, Hashable]]) -> float:
    """(observed - expected agreement) / (1 - expected agreement) of two annotators who judged the same units."""
    size = len(pairs)
    if not size:
        return math.nan
    observed = sum(one == other for one, other in pairs) / size
    mine, theirs = Counter(one for one, _ in pairs), Counter(other for _, other in pairs)
    expected = sum(mine[value] * theirs[value] for value in mine) / size**2
    return (observed - expected) / (1.0 - expected) if expected < 1.0 else math.nan


def _kappas(units: Sequence[Mapping[str, Hashable]]) -> Iterator[tuple[tuple[str, str], tuple[float, int]]]:
    names = sorted({name for values in units for name in values})
    for one, other in combinations(names, 2):
        pairs = [(values[one], values[other]) for values in units if one in values and other in values]
        if pairs:
            yield (one, other), (cohen_kappa(pairs), len(pairs))


def said(found: Agreement) -> list[str]:
    """Sentences about it."""
    if not found.units:
        return ["nothing was judged by two annotators, so there is no agreement to speak of (give --overlap 2)"]
    lines = [
        f"agreement over {found.units:,} judged by two or more: {found.raw:.1%} the same, "
        f"Krippendorff's alpha {written(found.alpha)}"
    ]
    for (one, other), (kappa, count) in found.kappa.items():
        lines.append(f"{one} and {other}: Cohen's kappa {written(kappa)} over {count:,}")
    return lines


def written(value: float) -> str:
    """A coefficient with two decimals, or why there is none."""
    return f"{value:.2f}" if math.isfinite(value) else "not defined (all said the same)"
