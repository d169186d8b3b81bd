"""Published figures that the runs of a sweep are compared with, and the table of measured, predicted and published
speeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llm_parallel.config.rules import check_config, num_processes
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError
from llm_parallel.planner.hardware import Cluster
from llm_parallel.planner.published.fit import clusters_with, predict
from llm_parallel.planner.published.rows import Row, read_rows
from llm_parallel.planner.search import Candidate, evaluate, fits
from llm_parallel.planner.shapes import SOFTWARE_NAMES, shape_of, strategy_of
from llm_parallel.screen import show, show_table

NONE = "none published"
CONVENTIONS = ("full", "causal", "six_n", "hardware")
LAYOUTS = ("published", "ours")
_FIGURES = ("tokens_per_s_per_gpu", "step_time_s", "mfu_pct")
_FIELDS = ("row", "source", *_FIGURES, "mfu_convention", "layout")


@dataclass(frozen=True)
class Reference:
    """What a source published for a configuration."""

    row: int
    """Line of the package's published_throughput.csv."""
    source: str
    """Who published it."""
    layout: str
    """``published`` where the run has the source's layout, ``ours`` where only the work is the same."""
    tokens_per_s_per_gpu: float | None = None
    """As published."""
    step_time_s: float | None = None
    """As published, in the source's layout."""
    mfu_pct: float | None = None
    """As published."""
    mfu_convention: str | None = None
    """Which FLOPs the MFU counts."""

    def tokens_per_s(self, config: RunConfig) -> float:
        """Tokens per second and GPU; where the layout is the source's, from the step time, which is rounded less."""
        if self.step_time_s is not None and self.layout == "published":
            tokens = config.train.global_batch_size * config.data.seq_length_tokens
            return tokens / self.step_time_s / num_processes(config)
        assert self.tokens_per_s_per_gpu is not None
        return self.tokens_per_s_per_gpu


def reference_of(tree: Any, where: str) -> Reference | None:
    """Reads a run's ``reference``; None for ``none published``. Raises UserError, with a message that begins with
    ``where``, for a field that is missing, unknown or not a positive number."""
    if tree == NONE:
        return None
    if not isinstance(tree, dict):
        raise UserError(f"{where}: reference {tree!r} must be `{NONE}` or a mapping of {', '.join(_FIELDS)}")
    unknown = [str(name) for name in tree if name not in _FIELDS]
    if unknown:
        raise UserError(f"{where}: reference.{unknown[0]} is unknown; there are {', '.join(_FIELDS)}")
    for name in ("row", "source", "layout"):
        if name not in tree:
            raise UserError(f"{where}: reference lacks {name}")
    if tree["layout"] not in LAYOUTS:
        raise UserError(f"{where}: reference.layout {tree['layout']!r} must be {' or '.join(LAYOUTS)}")
    for name in ("row", *_FIGURES):
        value = tree.get(name, 1)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise UserError(f"{where}: reference.{name} {value!r} must be a number over 0")
    if "tokens_per_s_per_gpu" not in tree and not ("step_time_s" in tree and tree["layout"] == "published"):
        raise UserError(f"{where}: reference needs tokens_per_s_per_gpu, or step_time_s of the published layout")
    convention = tree.get("mfu_convention")
    if ("mfu_pct" in tree) != (convention is not None) or convention not in (None, *CONVENTIONS):
        raise UserError(
            f"{where}: reference.mfu_convention {convention!r} must go with mfu_pct and be one of"
            f" {', '.join(CONVENTIONS)}"
        )
    return Reference(**tree)


@dataclass(frozen=True)
class Line:
    """One configuration of a sweep."""

    number: int
    """``--index`` of its first run."""
    series: str
    """Its series in the sweep."""
    config: RunConfig
    """What is trained."""
    reference: Reference | None
    """What was published for it."""
    predicted: Candidate | None
    """What the planner predicts for our trainer."""
    measured: float | None = None
    """Median tokens per second and GPU of its repeats; None before it ran."""
    step_s: tuple[float, float, float] | None = None
    """Shortest, median and longest seconds of a step over its repeats; None before it ran."""

    @property
    def published(self) -> float | None:
        """Published tokens per second and GPU."""
        return self.reference.tokens_per_s(self.config) if self.reference else None

    @property
    def ratio(self) -> float | None:
        """Measured over published speed."""
        return self.measured / self.published if self.measured and self.published else None


def predicted(config: RunConfig, cluster: Cluster) -> Candidate:
    """The planner's prediction of a configuration under our trainer."""
    return evaluate(shape_of(config.model), strategy_of(config, num_processes(config)), cluster)


@dataclass(frozen=True)
class Recalled:
    """The planner's prediction of a published row, with the source's own software, layout and cluster."""

    software: str
    """The source's."""
    tokens_per_s: float
    """Predicted tokens per second and GPU."""
    published: float
    """Published tokens per second and GPU."""

    @property
    def error(self) -> float:
        """Relative error of the predicted speed."""
        return self.tokens_per_s / self.published - 1.0


@lru_cache(maxsize=1)
def _published_rows() -> dict[int, Row]:
    return {row.number: row for row in read_rows()[0]}


def recalled(reference: Reference) -> Recalled | None:
    """The prediction of a reference's row; None where the row lacks what a prediction needs, as Llama 2's rows do."""
    row = _published_rows().get(reference.row)
    if row is None:
        return None
    seconds = predict(row, clusters_with({})[row.cluster])
    return Recalled(row.software, row.tokens_per_s * row.step_s / seconds, row.tokens_per_s)


def check_layout(config: RunConfig) -> None:
    """Raises UserError if the run breaks a rule of the configuration on any cluster."""
    check_config(config, num_processes(config), "cpu" if config.device == "cpu" else "cuda")


def measured_of(
    rows: Sequence[Mapping[str, str]], keys: Sequence[str]
) -> tuple[float | None, tuple[float, float, float] | None]:
    """Of the rows of a sweep's CSV with these keys: median tokens per second and GPU, and the shortest, median and
    longest step. None and None without such rows."""
    mine = [row for row in rows if row["key"] in keys]
    if not mine:
        return None, None
    steps = [float(row["step_time_s"]) for row in mine]
    low, high = (
        pick(float(row.get(f"step_time_{name}_s") or row["step_time_s"]) for row in mine)
        for name, pick in (("min", min), ("max", max))
    )
    return statistics.median(float(row["tokens_per_s_per_gpu"]) for row in mine), (low, statistics.median(steps), high)


def print_table(lines: Sequence[Line], cluster: Cluster | None, min_ratio: float) -> None:
    """Prints measured and predicted speeds, and published ones with a verdict where there are any."""
    names = ["--index", "series", "GPUs", "layout", "GiB", "measured", "step s", "efficiency", "our trainer, predicted"]
    published = any(line.reference for line in lines)
    names += ["published", "row", "its software, predicted", "verdict"] if published else []
    title = "tokens/s/GPU (step time) and MFU with square attention"
    show_table(title, names, [_cells(line, lines, cluster, min_ratio)[: len(names)] for line in lines])
    show(_legend(cluster, published))


def efficiency(line: Line, lines: Sequence[Line]) -> float | None:
    """Measured speed per GPU over that of the fastest measured line of the series on the fewest GPUs; None where it did
    not run."""
    mine = [one for one in lines if one.series == line.series and one.measured]
    if not line.measured or not mine:
        return None
    fewest = min(num_processes(one.config) for one in mine)
    return line.measured / max(one.measured or 0.0 for one in mine if num_processes(one.config) == fewest)


def _legend(cluster: Cluster | None, published: bool) -> str:
    said = f"the planner's for {SOFTWARE_NAMES['ours']} in this layout on {cluster.name}" if cluster else ""
    text = (
        "`step s`: median, and shortest to longest of all steps that count. `efficiency`: speed per GPU over that of "
        "the series' fastest layout on the fewest GPUs. GiB and `our trainer, predicted`: "
        f"{said or 'not there, since the sweep names no cluster'}."
    )
    if not published:
        return text
    return text + (
        " `published`: as "
        "printed by the source in that row of published_throughput.csv; MFU in other conventions is marked. `its "
        "software, predicted`: the planner's for that row, with the source's own software, layout and cluster, and how "
        "far it is from the published figure: that is the planner's error; the rest of the way to our trainer's is the "
        "software's, of which no GPU measurement was at hand: it is counted as open PyTorch code was "
        "measured. A row marked * has the source's work in a layout of ours."
    )


def _cells(line: Line, lines: Sequence[Line], cluster: Cluster | None, min_ratio: float) -> list[str]:
    config, reference = line.config, line.reference
    strategy = strategy_of(config, num_processes(config))
    layout = strategy.describe().replace(",", " ").replace("recompute=", "").replace(" none", "")
    now = f"{line.measured:,.0f}" if line.measured else "not run"
    share = efficiency(line, lines)
    memory_gib, forecast = _forecast(line, cluster)
    step = "—" if line.step_s is None else "{1:.4g} ({0:.4g} to {2:.4g})".format(*line.step_s)
    return [
        *(str(line.number), line.series, str(num_processes(config)), layout, memory_gib, now, step),
        *("—" if share is None else f"{share:.1%}", forecast),
        *(_published(reference, config) if reference else (NONE, "", "")),
        verdict(line, min_ratio),
    ]


def _forecast(line: Line, cluster: Cluster | None) -> tuple[str, str]:
    """Table cells: memory, and the speed predicted for our trainer."""
    found = line.predicted
    if found is None or cluster is None:
        return "—", "—"
    memory_gib = f"{found.memory.total / 2**30:.0f}"
    if cluster.host is None and not fits(found.memory, cluster):
        memory_gib += f" of {cluster.chip.memory_bytes / 2**30:.0f}: does not fit"
    share = found.mfu(shape_of(line.config.model), cluster, causal=False)
    return memory_gib, f"{found.tokens_per_s():,.0f} ({found.time.total:.3g} s) {share:.1%}"


def _published(reference: Reference, config: RunConfig) -> tuple[str, str, str]:
    """Table cells: the source's figure, its row, and the planner's prediction of that row."""
    step = f" ({reference.step_time_s:.4g} s)" if reference.step_time_s and reference.layout == "published" else ""
    printed = f"{reference.tokens_per_s(config):,.0f}{step}"
    if reference.mfu_pct is not None:
        printed += f" {reference.mfu_pct:g}%"
        printed += "" if reference.mfu_convention == "full" else f" {reference.mfu_convention}"
    row = f"{reference.row}{'' if reference.layout == 'published' else '*'}"
    own = recalled(reference)
    said = f"{own.software} {own.tokens_per_s:,.0f} ({own.error:+.0%})" if own else "layout not stated"
    return printed, row, said


def verdict(line: Line, min_ratio: float) -> str:
    """``pass`` or ``FAIL`` by ``min_ratio`` of the published speed; empty where a measured or published speed is
    missing."""
    if line.ratio is None:
        return ""
    return f"{'pass' if line.ratio >= min_ratio else 'FAIL'} {line.ratio:.2f}"


def slower_than_published(lines: Sequence[Line], min_ratio: float) -> int:
    """1 if a measured line is under ``min_ratio`` of its published speed, else 0."""
    return int(any(line.ratio is not None and line.ratio < min_ratio for line in lines))
