"""Draws step times by tensor- and pipeline-parallel size: measured if the sweep has them, else predicted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError
from llm_parallel.planner.hardware import load_cluster
from llm_parallel.planner.memory import memory
from llm_parallel.planner.search import fits, layouts
from llm_parallel.planner.shapes import shape_of, strategy_of
from llm_parallel.planner.steptime import step_time
from llm_parallel.report.efficiency import Point, Series
from llm_parallel.report.figures import Picture, new_figure

LARGEST = 8
"""Largest size of either axis for which predictions are drawn; measured layouts are always drawn."""


@dataclass(frozen=True)
class Cell:
    """The fastest layout with a pair of tensor- and pipeline-parallel sizes."""

    step_s: float
    is_measured: bool


def cells_of(points: Sequence[Point]) -> dict[tuple[int, int], Cell]:
    """Cells by TP and PP from points on one number of processes; empty if the sweep does not give TP and PP."""
    cells: dict[tuple[int, int], Cell] = {}
    for point in points:
        if point.tp is None or point.pp is None:
            continue
        before = cells.get((point.tp, point.pp))
        if before is None or point.step_s < before.step_s:
            cells[point.tp, point.pp] = Cell(point.step_s, True)
    if not cells:
        return {}
    for key, seconds in _predicted(points[0]).items():
        cells.setdefault(key, Cell(seconds, False))
    return cells


def _predicted(point: Point) -> dict[tuple[int, int], float]:
    """Predicted seconds by TP and PP of the layouts that fit, with the point's CP, micro batch and recomputation and
    the best number of model chunks. Empty if the sweep lacks the configuration, or names no cluster of the package."""
    if not point.config or not point.cluster:
        return {}
    try:
        config = RunConfig.model_validate(json.loads(point.config))
        cluster = load_cluster(point.cluster)
    except (ValueError, UserError):
        return {}
    shape, base = shape_of(config.model), strategy_of(config, point.world_size)
    found: dict[tuple[int, int], float] = {}
    for one in layouts(shape, replace(base, stage_layers=None), cluster):
        same = (one.cp, one.micro_batch, one.recompute) == (base.cp, base.micro_batch, base.recompute)
        if not same or max(one.tp, one.pp) > LARGEST or not fits(memory(shape, one), cluster):
            continue
        seconds = step_time(shape, one, cluster).total
        found[one.tp, one.pp] = min(seconds, found.get((one.tp, one.pp), seconds))
    return found


def heat_map(series: Series, number: int) -> Picture | None:
    """Draws the number of processes with most measured cells; None if that has fewer than three."""
    by_size: dict[int, list[Point]] = {}
    for point in series.points:
        by_size.setdefault(point.world_size, []).append(point)
    size, points = max(by_size.items(), key=lambda item: (len({(p.tp, p.pp) for p in item[1]}), item[0]))
    cells = cells_of(points)
    if len(cells) < 3:
        return None
    tps, pps = sorted({tp for tp, _ in cells}), sorted({pp for _, pp in cells})
    grid = np.full((len(pps), len(tps)), np.nan)
    for (tp, pp), cell in cells.items():
        grid[pps.index(pp), tps.index(tp)] = cell.step_s
    figure, axes = new_figure(1.3 + 0.42 * len(pps))
    axes.grid(visible=False)
    fastest, slowest = float(np.nanmin(grid)), float(np.nanmax(grid))
    axes.imshow(grid, cmap="Blues", aspect="auto", vmin=fastest - 0.2 * (slowest - fastest), vmax=1.2 * slowest)
    for (tp, pp), cell in cells.items():
        column, row = tps.index(tp), pps.index(pp)
        text = f"{cell.step_s:.3g} s" if cell.is_measured else f"~{cell.step_s:.3g} s predicted"
        dark = cell.step_s > fastest + 0.6 * (slowest - fastest)
        weight, style = ("bold", "normal") if cell.is_measured else ("normal", "italic")
        axes.text(column, row, text, ha="center", va="center", fontsize=8, weight=weight, style=style,
                  color="#ffffff" if dark else "#10161c")  # fmt: skip
    axes.set_xticks(range(len(tps)), [f"TP {tp}" for tp in tps])
    axes.set_yticks(range(len(pps)), [f"PP {pp}" for pp in pps])
    caption = (
        f"{series.name}: seconds of a step on {size} processes by TP and PP, the fastest over the rest; bold: measured"
    )
    if not all(cell.is_measured for cell in cells.values()):
        caption += (
            f"; ~: the planner's prediction for {points[0].cluster} with the CP, micro batch and"
            " recomputation of the sweep's fastest layout; an empty field is not legal or does not fit"
        )
    return Picture(f"heat_{number}", caption, figure)
