"""How far the planner's predictions are from published rows that no constant was fitted to: step times by source and
chip, rankings of layouts, weak scaling, and memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llm_parallel.errors import UserError
from llm_parallel.planner.hardware import load_constants
from llm_parallel.planner.memory import GIB
from llm_parallel.planner.published.fit import clusters_with, family_of, is_fitted, predict
from llm_parallel.planner.published.peers import printed_bytes, say_peers
from llm_parallel.planner.published.rows import Refused, Row, read_rows
from llm_parallel.planner.published.trust import by_left_out, by_left_out_source
from llm_parallel.screen import markdown_table

CHIPS = ("A100", "H100")


@dataclass(frozen=True)
class Scored:
    """A row with its prediction, and whether constants were fitted to it."""

    row: Row
    predicted_s: float
    fitted: bool

    @property
    def error(self) -> float:
        """Predicted over measured step time, less one."""
        return self.predicted_s / self.row.step_s - 1.0


@dataclass(frozen=True)
class Score:
    """Errors of some rows: mean absolute, mean, and the worst with its row."""

    rows: int
    mape: float
    bias: float
    worst: float
    worst_row: int


def score_of(scored: Sequence[Scored]) -> Score:
    """The score of at least one row."""
    worst = max(scored, key=lambda item: abs(item.error))
    errors = [item.error for item in scored]
    mape = statistics.fmean(abs(error) for error in errors)
    return Score(len(scored), mape, statistics.fmean(errors), worst.error, worst.row.number)


def score_rows(path: str | None = None) -> tuple[list[Scored], list[Refused]]:
    """Predictions of all rows that can be predicted, and the other rows. No constant was fitted to a user's file."""
    rows, refused = read_rows(path)
    clusters = clusters_with({})
    half = is_fitted(rows) if path is None else {}
    return [Scored(row, predict(row, clusters[row.cluster]), half.get(row.number, False)) for row in rows], refused


def by_source(scored: Sequence[Scored]) -> dict[tuple[str, str], list[Scored]]:
    """Rows of each source and chip, in their order."""
    found: dict[tuple[str, str], list[Scored]] = {}
    for item in scored:
        found.setdefault((item.row.source, item.row.chip), []).append(item)
    return found


@dataclass(frozen=True)
class Ranking:
    """Several layouts of one model on one cluster: how much slower than the measured best the predicted best was, and
    the rank correlation (Spearman) of predicted with measured times."""

    name: str
    layouts: int
    regret: float
    correlation: float


def rankings(scored: Sequence[Scored], fewest: int = 5) -> list[Ranking]:
    """A ranking for every model, number of GPUs and batch with at least ``fewest`` different measured layouts."""
    sets: dict[str, list[Scored]] = {}
    for item in scored:
        s = item.row.strategy
        same = f"{item.row.source}: {item.row.model}, {s.gpus} GPUs, batch {s.global_batch}, {s.precision}"
        sets.setdefault(same, []).append(item)
    found = []
    for name, items in sets.items():
        if len({item.row.strategy for item in items}) < fewest:
            continue
        best = min(item.row.step_s for item in items)
        chosen = min(items, key=lambda item: item.predicted_s)
        correlation = spearman([item.predicted_s for item in items], [item.row.step_s for item in items])
        found.append(Ranking(name, len(items), chosen.row.step_s / best - 1.0, correlation))
    return found


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; ties share their mean rank."""
    x, y = _ranks(a), _ranks(b)
    return statistics.correlation(x, y) if len(set(x)) > 1 and len(set(y)) > 1 else float("nan")


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [(ordered.index(value) + len(ordered) - 1 - ordered[::-1].index(value)) / 2 for value in values]


@dataclass(frozen=True)
class Trend:
    """Weak scaling of one series: throughput per GPU at the largest number of GPUs over that at the smallest.
    ``family`` names its source, which stands for the software, and its chip."""

    name: str
    family: str
    fewest: int
    most: int
    measured: float
    predicted: float


def trends(scored: Sequence[Scored]) -> list[Trend]:
    """Series of rows that differ only in the number of GPUs, with the batch in proportion."""
    series: dict[str, list[Scored]] = {}
    for item in scored:
        s = item.row.strategy
        layout = s.tp, s.pp, s.cp, s.vpp, s.zero, s.micro_batch, s.recompute, s.fused
        same = item.row.source, item.row.model, s.precision, s.seq, layout, round(s.global_batch / s.gpus, 6)
        series.setdefault(" ".join(map(str, same)), []).append(item)
    found = []
    for items in series.values():
        items.sort(key=lambda item: item.row.strategy.gpus)
        first, last = items[0], items[-1]
        if last.row.strategy.gpus < 4 * first.row.strategy.gpus:
            continue
        name = f"{first.row.source}: {first.row.model}, {first.row.strategy.precision}"
        measured = last.row.tokens_per_s / first.row.tokens_per_s
        predicted = first.predicted_s / last.predicted_s
        gpus = first.row.strategy.gpus, last.row.strategy.gpus
        found.append(Trend(name, f"{first.row.source}, {first.row.chip}", *gpus, measured, predicted))
    return found


def family_trends(trended: Sequence[Trend]) -> dict[str, tuple[int, float]]:
    """For each family: the number of series that are not superlinear, and the mean of predicted minus measured
    efficiency."""
    families: dict[str, list[float]] = {}
    for trend in trended:
        if trend.measured <= 1.0:
            families.setdefault(trend.family, []).append(trend.predicted - trend.measured)
    return {name: (len(apart), statistics.fmean(apart)) for name, apart in families.items()}


def memory_errors(scored: Sequence[Scored]) -> list[tuple[Row, float]]:
    """Rows that print their peak memory, with the relative error of the prediction; where they print reserved memory,
    the prediction includes the allocator's allowance."""
    rows = [item.row for item in scored]
    return [(row, printed_bytes(row) / GIB / row.memory_gib - 1.0) for row in rows if row.memory_gib]


def report(path: str | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Prints the whole validation as Markdown; the same as data. Raises UserError if no row can be predicted."""
    scored, refused = score_rows(path)
    if not scored:
        first = refused[0]
        raise UserError(
            f"--rows {path}: none of its {len(refused)} rows can be predicted; row {first.number}: {first.reason}"
        )
    heads = "source", "chip", "rows", "fitted", "held-out MAPE", "bias", "worst (row)", "MAPE, bias without the source"
    alone = by_left_out_source() if path is None else {}
    say("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for (source, chip), items in by_source(scored).items():
        held = [item for item in items if not item.fitted]
        fitted = len(items) - len(held)
        _, error, bias = alone.get(f"{source} ({chip})", (0, math.nan, math.nan))
        without = f"{error:.1%}, {bias:+.1%}" if error == error else ""
        say(f"| {source} | {chip} | {len(items)} | {fitted} | {_cells(held)} | {without} |")
    for chip in CHIPS:
        held = [s for s in scored if not s.fitted and family_of(s.row.chip) == chip]
        of = [s for s in scored if family_of(s.row.chip) == chip]
        say(f"| **all** | {chip} | {len(of)} | {len(of) - len(held)} | {_cells(held)} | |")
    held = [item for item in scored if not item.fitted]
    overall = sum(rows * error for rows, error, _ in alone.values()) / max(
        1, sum(rows for rows, _, _ in alone.values())
    )
    say(f"| **all** | | {len(scored)} | {len(scored) - len(held)} | {_cells(held)} | {overall:.1%} |")
    if path is None:
        _say_left_out(say)
    _say_rankings(rankings(scored), trends(scored), say)
    _say_memory(memory_errors(scored), say)
    if path is None:
        say_peers([(item.row, item.predicted_s, item.fitted) for item in scored], say)
    _say_refused(refused, say)
    if path is None:
        _say_constants(say)
    return {
        "overall": asdict(score_of(held)) if held else None,
        "sources": {
            f"{source} ({chip})": asdict(score_of(some))
            for (source, chip), items in by_source(scored).items()
            if (some := [item for item in items if not item.fitted])
        },
        "refused": [asdict(item) for item in refused],
    }


def _say_left_out(say: Callable[[str], None]) -> None:
    say("\n| left out with its source, by | rows | mean error | bias |\n|" + " --- |" * 4)
    for kind in ("chip", "software", "size"):
        for name, (rows, error, bias) in by_left_out(kind).items():
            say(f"| {kind}: {name} | {rows} | {error:.1%} | {bias:+.1%} |")


def summary() -> list[str]:
    """The validation in about ten lines of Markdown."""
    scored, refused = score_rows()
    rows = []
    for chip in (*CHIPS, "all"):
        of = [item for item in scored if chip == "all" or family_of(item.row.chip) == chip]
        held = [item for item in of if not item.fitted]
        score = score_of(held)
        errors = f"{score.mape:.1%}", f"{score.bias:+.1%}", f"{score.worst:+.0%} (row {score.worst_row})"
        rows.append([chip, len(by_source(of)), len(of), len(held), *errors])
    heads = ["chip", "sources", "rows", "held out", "mean error of the step time", "bias", "worst"]
    ranked, trended, memory = rankings(scored), trends(scored), memory_errors(scored)
    worst = max(ranked, key=lambda item: item.regret)
    counted = [trend for trend in trended if trend.measured <= 1.0]
    near = sum(abs(trend.predicted - trend.measured) <= 0.02 for trend in counted)
    mean = statistics.fmean(abs(error) for _, error in memory)
    return [
        "Predictions against published measurements; the figures are of rows that no constant was fitted to.",
        *markdown_table(heads, rows).split("\n"),
        f"choice of a layout: in {len(ranked)} sets of measured layouts the predicted best is "
        f"{statistics.fmean(item.regret for item in ranked):.1%} slower than the measured best on average, "
        f"{worst.regret:.1%} at worst ({worst.name})",
        f"weak scaling: {near} of {len(counted)} series are within 2 points of the measured efficiency",
        f"peak memory: mean error {mean:.1%} on the {len(memory)} rows that print it; nothing was fitted to them",
        f"not predicted: {len(refused)} rows, which do not state what a prediction needs",
    ]


def _cells(held: Sequence[Scored]) -> str:
    if not held:
        return "none held out | | "
    score = score_of(held)
    return f"{score.mape:.1%} | {score.bias:+.1%} | {score.worst:+.0%} ({score.worst_row})"


def _say_rankings(ranked: Sequence[Ranking], trended: Sequence[Trend], say: Callable[[str], None]) -> None:
    if ranked:
        say("\n| layouts of | number | predicted best against measured best | rank correlation |\n|" + " --- |" * 4)
        for item in ranked:
            say(f"| {item.name} | {item.layouts} | {item.regret:+.1%} | {item.correlation:.2f} |")
    if trended:
        say("\n| weak scaling of | GPUs | measured efficiency | predicted | points apart |\n|" + " --- |" * 5)
        for trend in trended:
            apart = 100 * (trend.predicted - trend.measured)
            noise = " (superlinear: noise, not counted)" if trend.measured > 1.0 else ""
            say(
                f"| {trend.name} | {trend.fewest} to {trend.most} | {trend.measured:.1%} | {trend.predicted:.1%} | "
                f"{apart:+.1f}{noise} |"
            )
        counted = [trend for trend in trended if trend.measured <= 1.0]
        near = sum(abs(trend.predicted - trend.measured) <= 0.02 for trend in counted)
        say(f"\nWithin 2 points: {near} of {len(counted)} series; {len(trended) - len(counted)} superlinear ones apart")
        families = family_trends(trended)
        say("\n| weak scaling of a source's software on a chip | series | mean points apart |\n|" + " --- |" * 3)
        for name, (series, apart) in families.items():
            say(f"| {name} | {series} | {100 * apart:+.1f} |")
        near = sum(abs(apart) <= 0.02 for _, apart in families.values())
        say(f"\nWithin 2 points: {near} of {len(families)} families")


def _say_memory(errors: Sequence[tuple[Row, float]], say: Callable[[str], None]) -> None:
    if not errors:
        return
    say("\n| peak memory that rows print (nothing fitted) | counts | rows | mean error | bias | worst (row) |")
    say("|" + " --- |" * 6)
    by_source: dict[tuple[str, str], list[tuple[Row, float]]] = {}
    for row, error in errors:
        by_source.setdefault((row.source, row.memory_of), []).append((row, error))
    for (source, counts), some in [*by_source.items(), (("**all**", ""), list(errors))]:
        worst, most = max(some, key=lambda item: abs(item[1]))
        mean, bias = statistics.fmean(abs(error) for _, error in some), statistics.fmean(error for _, error in some)
        say(f"| {source} | {counts} | {len(some)} | {mean:.1%} | {bias:+.1%} | {most:+.0%} ({worst.number}) |")
    for row, error in errors:
        say(f"- row {row.number}, {row.model}, {row.strategy.describe()}: {row.memory_gib:.1f} GiB, {error:+.0%}")


def _say_refused(refused: Sequence[Refused], say: Callable[[str], None]) -> None:
    counts: dict[tuple[str, str], list[int]] = {}
    for item in refused:
        counts.setdefault((item.source, item.reason), []).append(item.number)
    say(f"\nNot predicted: {len(refused)} rows")
    for (source, reason), numbers in counts.items():
        shown = ", ".join(map(str, numbers[:12])) + (" …" if len(numbers) > 12 else "")
        say(f"- {source}: {reason} (rows {shown})")


def _say_constants(say: Callable[[str], None]) -> None:
    scored, _ = score_rows()
    for chip in CHIPS:
        fitted = [item.row.number for item in scored if item.fitted and family_of(item.row.chip) == chip]
        values = ", ".join(f"{name} {value:g}" for name, value in asdict(load_constants(chip)).items())
        say(f"\n{chip}, 12 constants: {values}; from rows {_ranges(fitted)}")


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers as text, like ``1, 3, 10 to 20 by 2``: runs with an equal step are shortened."""
    found: list[str] = []
    left = sorted(numbers)
    while left:
        length = 1
        step = left[1] - left[0] if len(left) > 1 else 0
        while length < len(left) and left[length] - left[length - 1] == step:
            length += 1
        if length >= 3:
            found.append(f"{left[0]} to {left[length - 1]}" + (f" by {step}" if step > 1 else ""))
        else:
            length = 1
            found.append(str(left[0]))
        left = left[length:]
    return ", ".join(found)
