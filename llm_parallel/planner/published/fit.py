"""Fits a chip's constants to a declared half of the published rows; errors are measured on the other half.

The fitted half is, within every source and sorted by row number, each row at an even position. Each constant has a
prior from elsewhere (such as a large matrix product's share of the peak, or an NCCL ring's share of the line rate) that
weighs as much as a few rows, so that constants that the rows do not determine stay physical."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

from llm_parallel.planner.hardware import Cluster, Constants, load_cluster
from llm_parallel.planner.memory import memory
from llm_parallel.planner.published.rows import Row
from llm_parallel.planner.search import MICRO_BATCHES, fits, is_even_enough
from llm_parallel.planner.shapes import RECOMPUTES, Strategy
from llm_parallel.planner.steptime import step_time

# Prior, smallest and largest value of each constant, and how many rows the prior weighs as much as. The priors of gemm
# are a little under what large products were measured to reach (stas00/ml-engineering: A100 86.9 %, H100 80.3 %, fp8
# 70.9 %). That of an A100's NVLink is nccl-tests' all-reduce among eight (235 of 300 GB/s), and weighs little: layouts
# of the same model with TP 1 to 16 (vTrain) decide it.
PRIORS: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "A100": {
        "gemm": (0.82, 0.5, 0.92, 4), "gemm_te": (0.82, 0.5, 0.92, 4), "gemm_fp8": (0.82, 0.5, 0.92, 4),
        "flash": (0.50, 0.25, 0.75, 2), "flash_te": (0.55, 0.25, 0.8, 2), "memory": (0.75, 0.3, 0.95, 2),
        "nvlink": (0.78, 0.4, 0.95, 0.5), "nic": (0.75, 0.3, 0.98, 2), "tp_hidden": (0.5, 0.0, 0.95, 2),
        "dp_hidden": (0.9, 0.0, 1.0, 2), "layer_us": (30.0, 0.0, 400.0, 1), "jitter": (0.006, 0.0, 0.03, 1),
    },
    "H100": {
        "gemm": (0.72, 0.4, 0.85, 4), "gemm_te": (0.72, 0.4, 0.85, 4), "gemm_fp8": (0.60, 0.3, 0.75, 4),
        "flash": (0.35, 0.15, 0.70, 2), "flash_te": (0.5, 0.2, 0.8, 2), "memory": (0.75, 0.3, 0.95, 2),
        "nvlink": (0.75, 0.4, 0.95, 2), "nic": (0.85, 0.3, 0.98, 2), "tp_hidden": (0.6, 0.0, 0.95, 2),
        "dp_hidden": (0.9, 0.0, 1.0, 2), "layer_us": (20.0, 0.0, 400.0, 1), "jitter": (0.006, 0.0, 0.03, 1),
    },
}  # fmt: skip
SPREAD = 0.25
"""Relative distance from the prior at which it costs as much as 10 % error in each of the rows that it stands for."""


def family_of(chip: str) -> str:
    """Name of a chip's constants; an H200 is an H100 with more and faster memory."""
    return "A100" if chip == "A100" else "H100"


def is_fitted(rows: Sequence[Row]) -> dict[int, bool]:
    """Whether each row, by number, belongs to the fitted half."""
    seen: dict[str, int] = {}
    found = {}
    for row in sorted(rows, key=lambda row: row.number):
        found[row.number] = seen.get(row.source, 0) % 2 == 0
        seen[row.source] = seen.get(row.source, 0) + 1
    return found


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step: what counts, and the least and most over everything that the row leaves open."""

    counted: float
    """The one that is compared with the measurement."""
    least: float
    """With the fastest of what is possible."""
    most: float
    """With the slowest."""


def predict(row: Row, cluster: Cluster) -> float:
    """Predicted seconds of a step; see ``prediction``."""
    return prediction(row, cluster).counted


def prediction(row: Row, cluster: Cluster) -> Prediction:
    """Predicted seconds of a step over everything that the row leaves open.

    Those who publish a figure have tuned the sizes that cost nothing else, so of micro batches and numbers of model
    chunks the fastest counts. Of what the software may or may not do (recomputation, sequence parallelism, overlap)
    nothing is known, so the middle counts."""
    counted, every = [], []
    for choice in _may_do(row, cluster):
        tuned = [step_time(row.shape, size, cluster).total for size in _tuned(row, choice)]
        counted.append(min(tuned))
        every += tuned
    return Prediction(statistics.median(counted), min(every), max(every))


def _may_do(row: Row, cluster: Cluster) -> list[Strategy]:
    """The row's strategy with everything that the software may do; of recomputations those that fit."""
    choices = [row.strategy]
    if "sequence_parallel" in row.unknown:
        choices = [replace(choice, sequence_parallel=value) for choice in choices for value in (False, True)]
    if "overlap_tp" in row.unknown:
        choices = [replace(choice, overlap_tp=value) for choice in choices for value in (False, True)]
    if "recompute" not in row.unknown:
        return choices
    found = [replace(choice, recompute=kind) for choice in choices for kind in RECOMPUTES["ours"]]
    return [choice for choice in found if fits(memory(row.shape, choice), cluster)] or [
        choice for choice in found if choice.recompute == "full"
    ]


def _tuned(row: Row, choice: Strategy) -> list[Strategy]:
    """A strategy with all sizes that its user may have tuned."""
    found = [choice]
    if "micro_batch" in row.unknown:
        most = choice.global_batch // choice.dp
        found = [replace(choice, micro_batch=m) for m in MICRO_BATCHES if m <= most and most % m == 0] or found
    if "vpp" in row.unknown:
        layers, pp = row.shape.layers, choice.pp
        chunks = [v for v in range(1, -(-layers // pp) + 1) if v == 1 or is_even_enough(layers, pp * v)]
        found = [replace(c, vpp=v, overlap_pp=c.overlap_pp or v > 1) for c in found for v in chunks]
    return found


def clusters_with(constants: Mapping[str, Constants]) -> dict[str, Cluster]:
    """The package's clusters with these constants."""
    return {
        name: load_cluster(name, constants)
        for name in ("dgx-a100", "dgx-a100-40", "dgx-h100", "dgx-h100-500w", "dgx-h200")
    }


def log_errors(rows: Sequence[Row], constants: Mapping[str, Constants]) -> list[float]:
    """ln(predicted / measured step time) of each row."""
    clusters = clusters_with(constants)
    return [math.log(predict(row, clusters[row.cluster]) / row.step_s) for row in rows]


def fit_chip(chip: str, rows: Sequence[Row]) -> Constants:
    """Constants of one kind of chip from its rows of the fitted half. A source weighs as much as the square root of its
    number of rows. Needs scipy."""
    from scipy.optimize import least_squares

    half = is_fitted(rows)
    mine = [row for row in rows if family_of(row.chip) == chip and half[row.number]]
    counts = {row.source: sum(other.source == row.source for other in mine) for row in mine}
    weights = [counts[row.source] ** -0.25 for row in mine]
    priors = PRIORS[chip]
    names = [field.name for field in fields(Constants)]
    base = clusters_with({})

    def residuals(x: Sequence[float]) -> list[float]:
        constants = Constants(**dict(zip(names, x)))
        here = {n: replace(c, chip=replace(c.chip, constants=constants)) for n, c in base.items()}
        errors = [w * math.log(predict(row, here[row.cluster]) / row.step_s) for row, w in zip(mine, weights)]
        pulls = []
        for name, value in zip(names, x):
            prior, least, most, strength = priors[name]
            scale = SPREAD * (prior if prior < 1.5 else most - least)
            pulls.append(0.1 * math.sqrt(strength) * (value - prior) / scale)
        return [*errors, *pulls]

    start = [priors[name][0] for name in names]
    bounds = ([priors[name][1] for name in names], [priors[name][2] for name in names])
    scales = [max(value, 0.1) for value in start]
    found = least_squares(residuals, start, bounds=bounds, loss="soft_l1", f_scale=0.1, x_scale=scales)
    return Constants(**{name: float(f"{value:.4g}") for name, value in zip(names, found.x)})


def left_out(chip: str, rows: Sequence[Row]) -> dict[int, float]:
    """Seconds of a step that are predicted for each row of a chip, by number, with constants that were fitted without
    any row of its source. Needs scipy."""
    mine = [row for row in rows if family_of(row.chip) == chip]
    found: dict[int, float] = {}
    for source in {row.source: None for row in mine}:
        clusters = clusters_with({chip: fit_chip(chip, [row for row in rows if row.source != source])})
        found |= {row.number: predict(row, clusters[row.cluster]) for row in mine if row.source == source}
    return found


def as_record(constants: Constants, rows: Sequence[Row], chip: str) -> dict[str, object]:
    """What constants.json keeps of a fit: the constants, the rows that they were fitted to, and what is predicted for
    each row by constants that were fitted without its source."""
    half = is_fitted(rows)
    return {
        "constants": asdict(constants),
        "rows": [row.number for row in rows if family_of(row.chip) == chip and half[row.number]],
        "left_out": {str(number): float(f"{seconds:.5g}") for number, seconds in left_out(chip, rows).items()},
    }
