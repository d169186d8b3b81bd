"""Draws one run, or several in the same figures, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_parallel.files import atomic_write
from llm_parallel.metrics.history import History, read_history
from llm_parallel.metrics.round_plots import panels_of
from llm_parallel.metrics.rounds import RoundHistory, read_rounds
from llm_parallel.metrics.task_plots import draw_task, scored_tasks
from llm_parallel.metrics.time_split import PART_COLOURS, split_by_step

# matplotlib takes 0.4 s to import, so it is imported where a figure is made.
# Colours of Okabe and Ito, which colour-blind people can distinguish.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKS = {"restart": ("0.35", ":", "restart"), "layout": ("#882255", "--", "change of layout")}
"""Colour, line style and name of a vertical line by the kind of its mark."""


def plot_run(run_dir: str | Path, *, unigram_entropy: float | None = None) -> list[Path]:
    """Draws ``loss.png``, ``throughput.png``, ``lr_gradnorm.png``, ``statistics.png`` if the run recorded numbers of
    its objective, ``tasks.png`` if it scored tasks, and ``rounds.png`` of a run in rounds, into ``run_dir/plots`` and
    returns their paths.

    ``unigram_entropy`` (nats per token) is what a model reaches that knows only how frequent each token is; it is drawn
    as a dashed line. A run without a step yields no plots. Raises UserError if the folder has no metrics.jsonl.
    """
    return _draw([read_history(run_dir)], Path(run_dir) / "plots", "", unigram_entropy)


def compare_runs(
    run_dirs: Sequence[str | Path], folder: str | Path, *, unigram_entropy: float | None = None
) -> list[Path]:
    """Draws several runs into the same pictures ``folder/compared_loss.png`` and so on; see ``plot_run``."""
    return _draw([read_history(run_dir) for run_dir in run_dirs], Path(folder), "compared_", unigram_entropy)


def _draw(runs: Sequence[History], folder: Path, prefix: str, unigram_entropy: float | None) -> list[Path]:
    runs = [run for run in runs if run.steps]
    if not runs:
        return []
    figures = {
        "loss": _draw_loss(runs, unigram_entropy),
        "throughput": _draw_throughput(runs),
        "lr_gradnorm": _draw_schedule(runs),
    }
    if any(run.statistics() for run in runs):
        figures["statistics"] = draw_statistics(runs)
    if scored_tasks(runs):
        figures["tasks"] = _draw_tasks(runs)
    rounds = [found for run in runs if (found := read_rounds(run))]
    if rounds:
        figures["rounds"] = _draw_rounds(rounds, runs)
    return [_save(figure, folder / f"{prefix}{name}.png") for name, figure in figures.items()]


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over about ``window`` neighbours, float64 [n] to float64 [n]; NaN does not count.

    The neighbourhood is symmetric, also at the steep start, where it shrinks: an average of the past would lag behind
    the falling loss. At the flat end it reaches only back, so that the last value is not the noise of one step.
    """
    index, half = np.arange(len(values)), window // 2
    first = np.maximum(index - half, 0)
    last = np.minimum(index + np.minimum(half, index), len(values) - 1)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    with np.errstate(invalid="ignore"):
        return (sums[last + 1] - sums[first]) / (counts[last + 1] - counts[first])


def smoothed(values: np.ndarray) -> np.ndarray:
    """``smooth`` over a twentieth of the values."""
    return smooth(values, max(1, len(values) // 20))


def _draw_loss(runs: Sequence[History], unigram_entropy: float | None) -> Any:
    figure, (axes,) = _figure("Training loss", 1, runs)
    for history, colour in zip(runs, _colours(runs)):
        tokens, loss = history.column("train/tokens"), history.column("train/loss")
        label = "training" if len(runs) == 1 else history.name
        axes.plot(tokens, loss, _style(history), color=colour, alpha=0.3, linewidth=0.8)
        last = f"{label}, smoothed (last step {_last(loss):.4f})"
        axes.plot(tokens, smoothed(loss), color=colour, linewidth=1.8, label=last)
        _mark_evals(axes, history, colour, label)
    if unigram_entropy is not None:
        axes.axhline(
            unigram_entropy, color="0.35", linestyle="--", linewidth=1.2, label=f"unigram entropy {unigram_entropy:.3f}"
        )
    _mark(axes, runs, "tokens")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(_engineering())
    if len(runs) == 1:
        _add_step_axis(axes, runs[0])
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _last(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else math.nan


def _mark(axes: Any, runs: Sequence[History], x: str, *, named: bool = True) -> None:
    """Vertical lines where a run was started again, and crosses at the bottom where a step was skipped. ``x`` is the
    attribute of a mark that the axis shows; ``named``: the legend has them."""
    for history, colour in zip(runs, _colours(runs)):
        marks = history.marks()
        before = "" if len(runs) == 1 else f"{history.name}: "
        for kind, (line_colour, style, name) in _MARKS.items():
            found = [mark for mark in marks if mark.kind == kind]
            what = found[0].text if len(found) == 1 and len(runs) == 1 else f"{before}{_count(len(found), name)}"
            for index, mark in enumerate(found):
                label = what if named and index == 0 else None
                own = line_colour if len(runs) == 1 else colour
                axes.axvline(getattr(mark, x), color=own, linestyle=style, linewidth=1.1, label=label)
        skipped = [getattr(mark, x) for mark in marks if mark.kind == "skip"]
        if skipped:
            own = "#CC0000" if len(runs) == 1 else colour
            text = f"{before}{_count(len(skipped), 'skipped step')}"
            axes.plot(
                *(skipped, np.full(len(skipped), 0.02), "x"),
                color=own,
                markersize=6,
                markeredgewidth=1.6,
                transform=axes.get_xaxis_transform(),
                label=text if named else None,
            )


def _count(number: int, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    first, space, rest = noun.partition(" ")
    return f"{number:,} " + (f"{first}s{space}{rest}" if first in ("restart", "change") else f"{noun}s")


def _mark_evals(axes: Any, history: History, colour: str, label: str) -> None:
    if not history.evals:
        return
    tokens = history.tokens_at(history.eval_column("step"))
    loss = history.eval_column("eval/loss")
    axes.plot(
        *(tokens, loss, "o-"),
        color="#D55E00" if label == "training" else colour,
        markersize=5,
        markeredgecolor="white",
        linewidth=0.8,
        label=f"{'held out' if label == 'training' else label + ' held out'} (last {loss[-1]:.4f})",
    )


def _add_step_axis(axes: Any, history: History) -> None:
    """Adds an axis of steps above the picture. It interpolates, since with a batch-size ramp-up steps are not
    proportional to tokens."""
    tokens, steps = history.column("train/tokens"), history.column("step")
    if len(steps) < 2:
        return
    tokens_per_step = (tokens[-1] - tokens[0]) / (steps[-1] - steps[0])

    def extended(x: np.ndarray, known: np.ndarray, wanted: np.ndarray, slope: float) -> np.ndarray:
        beyond = np.minimum(x - known[0], 0.0) + np.maximum(x - known[-1], 0.0)
        return np.interp(x, known, wanted) + beyond * slope

    above = axes.secondary_xaxis(
        "top",
        functions=(
            lambda x: extended(np.asarray(x), tokens, steps, 1.0 / tokens_per_step),
            lambda x: extended(np.asarray(x), steps, tokens, tokens_per_step),
        ),
    )
    above.set_xlabel("steps")


def _draw_throughput(runs: Sequence[History]) -> Any:
    unit = runs[0].unit
    figure, (rate, split) = _figure("Throughput", 2, runs)
    for history, colour in zip(runs, _colours(runs)):
        steps, tokens_per_s = history.column("step"), history.column("perf/tokens_per_s_per_gpu")
        rate.plot(
            steps,
            tokens_per_s,
            _style(history),
            color=colour,
            linewidth=1.0,
            label=_rates(history) if len(runs) == 1 else f"{history.name}: {_rates(history)}",
        )
    rate.set_ylabel(f"tokens/s/{unit}")
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter(_engineering())
    if len(runs) == 1:
        _stack_times(split, runs[0])
    else:
        for history, colour in zip(runs, _colours(runs)):
            split.plot(history.column("step"), history.column("perf/step_time"), color=colour, label=history.name)
    for axes in (rate, split):
        _mark(axes, runs, "step", named=axes is rate)
    # The first steps are slow (allocation, page faults) and must not decide the scale of the axis.
    typical = max(float(np.nanpercentile(history.column("perf/step_time"), 98)) for history in runs)
    split.set_ylim(0, 1.1 * typical)
    split.set_ylabel("seconds per step")
    split.set_xlabel("steps")
    _legend_above(rate)
    _legend_above(split)
    return figure


def _legend_above(axes: Any) -> None:
    """The legend between the panel and what is above it, where it hides no data."""
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        columns = max(1, min(len(labels), int(110 // (max(map(len, labels)) + 6))))
        place = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2}
        axes.legend(**place, ncols=columns, frameon=False, fontsize=9, handlelength=1.6, columnspacing=1.2)


def _rates(history: History) -> str:
    tokens = np.nanmedian(history.column("perf/tokens_per_s_per_gpu"))
    tflops = np.nanmedian(history.column("perf/tflops"))
    text = f"median {tokens:,.0f} tokens/s/{history.unit}, {tflops:.3g} TFLOP/s/{history.unit}"
    mfu = history.column("perf/mfu")
    return text + (f", MFU {np.nanmedian(mfu):.1%}" if np.isfinite(mfu).any() else "")


def _stack_times(axes: Any, history: History) -> None:
    steps = history.column("step")
    num_points = max(2, len(steps))
    if len(steps) == 1:  # An area needs two points.
        steps = steps[0] + np.array([-0.5, 0.5])
    bottom = np.zeros(num_points)
    split = split_by_step(history)
    whole = sum(seconds.sum() for seconds in split.values())
    for name, seconds in split.items():
        part = np.broadcast_to(seconds, num_points)
        share = seconds.sum() / whole
        label = f"{name} {share:.0%}" if share >= 0.01 else f"{name} < 1%"
        axes.fill_between(steps, bottom, bottom + part, color=PART_COLOURS[name], linewidth=0, label=label)
        bottom = bottom + part


def _draw_schedule(runs: Sequence[History]) -> Any:
    figure, (rate, norm) = _figure("Learning rate and gradient norm", 2, runs)
    for history, colour in zip(runs, _colours(runs)):
        steps, label = history.column("step"), None if len(runs) == 1 else history.name
        rate.plot(steps, history.column("train/lr"), _style(history), color=colour, linewidth=1.5, label=label)
        norm.plot(steps, history.column("train/grad_norm"), _style(history), color=colour, linewidth=0.9)
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter("{x:g}")
    norms = np.concatenate([history.column("train/grad_norm") for history in runs])
    norms = norms[np.isfinite(norms) & (norms > 0)]
    if len(norms) and norms.max() > 20 * norms.min():
        norm.set_yscale("log")
    for limit in sorted({limit for run in runs if (limit := clip_limit(run))}):
        clipped = sum(int((run.column("train/grad_norm") > limit).sum()) for run in runs if clip_limit(run) == limit)
        text = f"optim.clip_grad {limit:g}, exceeded by {_count(clipped, 'step')}"
        norm.axhline(limit, color="0.25", linestyle="-.", linewidth=1.2, label=text)
    _mark(rate, runs, "step")
    _mark(norm, runs, "step", named=False)
    norm.set_ylabel("gradient norm before clipping")
    norm.set_xlabel("steps")
    _legend_above(rate)
    _legend_above(norm)
    return figure


def clip_limit(history: History) -> float | None:
    """Gradient norm to which the run clips; None if it does not clip or its folder does not say."""
    limit = history.config.get("optim.clip_grad")
    return float(limit) if isinstance(limit, (int, float)) and limit > 0 else None


def draw_statistics(runs: Sequence[History]) -> Any:
    """A panel for every kind of number that the runs' objectives recorded; at least one run must have one."""
    kinds = dict.fromkeys(kind for run in runs for kind in run.statistics())
    figure, panels = _figure("Statistics", len(kinds), runs)
    for axes, kind in zip(panels, kinds):
        colours = iter(_COLOURS * 20)
        for history in runs:
            for name in history.statistics().get(kind, ()):
                colour, label = next(colours), name if len(runs) == 1 else f"{history.name}: {name}"
                if name.startswith("eval/"):
                    x, values = history.eval_column("step"), history.eval_column(name)
                    axes.plot(x, values, "o-", color=colour, markersize=4, linewidth=0.8, label=label)
                else:
                    x, values = history.column("step"), history.column(name)
                    axes.plot(x, values, _style(history), color=colour, alpha=0.3, linewidth=0.7)
                    axes.plot(x, smoothed(values), color=colour, linewidth=1.6, label=f"{label} (smoothed)")
        _mark(axes, runs, "step", named=axes is panels[0])
        axes.set_ylabel(kind)
        _legend_above(axes)
    panels[-1].set_xlabel("steps")
    return figure


def _draw_tasks(runs: Sequence[History]) -> Any:
    """A panel for each task that the runs have scored."""
    tasks = scored_tasks(runs)
    figure, panels = _figure("Scores of tasks", len(tasks), runs)
    for axes, task in zip(panels, tasks):
        draw_task(axes, runs, task)
        _mark(axes, runs, "step", named=axes is panels[0])
        _legend_above(axes)
    panels[-1].set_xlabel("steps")
    return figure


def _draw_rounds(rounds: Sequence[RoundHistory], runs: Sequence[History]) -> Any:
    """A panel for each number of rounds; they do not all share an axis."""
    drawn = panels_of(rounds)
    figure, panels = _figure("Rounds", len(drawn), runs, shared=False)
    for axes, panel in zip(panels, drawn):
        panel.draw(axes, rounds)
        _legend_above(axes)
    return figure


def _figure(title: str, num_panels: int, runs: Sequence[History], shared: bool = True) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    height = 5.6 if num_panels == 1 else 1.6 + (2.8 if shared else 3.0) * num_panels
    figure = Figure(figsize=(9, height), dpi=130, layout="constrained")
    names = runs[0].shown_folder if len(runs) == 1 else ", ".join(run.name for run in runs)
    figure.suptitle(f"{title} of {names}", fontsize=13, wrap=True)
    panels = figure.subplots(num_panels, 1, sharex=shared, squeeze=False)[:, 0]
    for axes in panels:
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1))
    figure.align_ylabels(panels)
    return figure, list(panels)


def _style(history: History) -> str:
    return "-" if len(history.steps) > 1 else "o"


def _colours(runs: Sequence[History]) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(len(runs))]


def _engineering() -> Any:
    from matplotlib.ticker import FuncFormatter

    def shorten(value: float, _position: int) -> str:
        for size, ending in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:g}{ending}"
        return f"{value:g}"

    return FuncFormatter(shorten)


def _save(figure: Any, path: Path) -> Path:
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, format="png")
    return path
