"""Draws one run, or several in the same figures, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_parallel.files import atomic_write
from llm_parallel.metrics.history import History, read_history

# matplotlib takes 0.4 s to import, so it is imported where a figure is made.
# Colours of Okabe and Ito, which colour-blind people can distinguish.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_TIME_PARTS = (
    ("perf/forward_backward_time", "forward and backward", "#56B4E9"),
    ("perf/optimizer_time", "optimizer", "#E69F00"),
    ("perf/data_time", "waiting for data", "#D55E00"),
)


def plot_run(run_dir: str | Path, *, unigram_entropy: float | None = None) -> list[Path]:
    """Draws ``loss.png``, ``throughput.png`` and ``lr_gradnorm.png`` into ``run_dir/plots`` and returns their paths.

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
    return [
        _save(_draw_loss(runs, unigram_entropy), folder / f"{prefix}loss.png"),
        _save(_draw_throughput(runs), folder / f"{prefix}throughput.png"),
        _save(_draw_schedule(runs), folder / f"{prefix}lr_gradnorm.png"),
    ]


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


def _draw_loss(runs: Sequence[History], unigram_entropy: float | None) -> Any:
    figure, (axes,) = _figure("Training loss", 1, runs)
    for history, colour in zip(runs, _colours(runs)):
        tokens, loss = history.column("train/tokens"), history.column("train/loss")
        label = "training" if len(runs) == 1 else history.name
        axes.plot(tokens, loss, _style(history), color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(
            tokens, smooth(loss, max(1, len(loss) // 20)), color=colour, linewidth=1.8, label=f"{label} (smoothed)"
        )
        _mark_evals(axes, history, colour, label)
        skipped = tokens[history.column("train/skipped") > 0]
        if len(skipped):
            at_the_bottom = np.full(len(skipped), 0.015)
            axes.plot(
                *(skipped, at_the_bottom, "x"),
                color=colour,
                markersize=5,
                transform=axes.get_xaxis_transform(),
                label=f"{label}: {len(skipped)} skipped",
            )
    if unigram_entropy is not None:
        axes.axhline(
            unigram_entropy, color="0.35", linestyle="--", linewidth=1.2, label=f"unigram entropy {unigram_entropy:.3f}"
        )
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(_engineering())
    axes.legend(loc="upper right")
    if len(runs) == 1:
        _add_step_axis(axes, runs[0])
    return figure


def _mark_evals(axes: Any, history: History, colour: str, label: str) -> None:
    if not history.evals:
        return
    tokens = np.interp(history.eval_column("step"), history.column("step"), history.column("train/tokens"))
    loss = history.eval_column("eval/loss")
    axes.plot(
        *(tokens, loss, "o-"),
        color="#D55E00" if label == "training" else colour,
        markersize=5,
        markeredgecolor="white",
        linewidth=0.8,
        label=f"{'held out' if label == 'training' else label + ' held out'} (last {loss[-1]:.3f})",
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
            label=f"{history.name}: {_rates(history)}",
        )
    rate.set_ylabel(f"tokens/s/{unit}")
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter(_engineering())
    rate.legend(loc="lower right")
    if len(runs) == 1:
        _stack_times(split, runs[0])
    else:
        for history, colour in zip(runs, _colours(runs)):
            split.plot(history.column("step"), history.column("perf/step_time"), color=colour, label=history.name)
    # The first steps are slow (allocation, page faults) and must not decide the scale of the axis.
    typical = max(float(np.nanpercentile(history.column("perf/step_time"), 98)) for history in runs)
    split.set_ylim(0, 1.25 * typical)
    split.set_ylabel("seconds per step")
    split.set_xlabel("steps")
    split.legend(loc="lower right")
    return figure


def _rates(history: History) -> str:
    tokens = np.nanmedian(history.column("perf/tokens_per_s_per_gpu"))
    tflops = np.nanmedian(history.column("perf/tflops"))
    text = f"median {tokens:,.0f} tokens/s/{history.unit}, {tflops:.3g} TFLOP/s/{history.unit}"
    mfu = history.column("perf/mfu")
    return text + (f", MFU {np.nanmedian(mfu):.1%}" if np.isfinite(mfu).any() else "")


def _stack_times(axes: Any, history: History) -> None:
    steps, whole = history.column("step"), history.column("perf/step_time")
    num_points = max(2, len(steps))
    if len(steps) == 1:  # An area needs two points.
        steps = steps[0] + np.array([-0.5, 0.5])
    bottom = np.zeros(num_points)
    for name, label, colour in _TIME_PARTS:
        part = np.broadcast_to(np.nan_to_num(history.column(name)), num_points)
        axes.fill_between(steps, bottom, bottom + part, color=colour, linewidth=0, label=label)
        bottom = bottom + part
    axes.fill_between(steps, bottom, np.maximum(whole, bottom), color="0.75", linewidth=0, label="other")


def _draw_schedule(runs: Sequence[History]) -> Any:
    figure, (rate, norm) = _figure("Learning rate and gradient norm", 2, runs)
    for history, colour in zip(runs, _colours(runs)):
        steps = history.column("step")
        rate.plot(steps, history.column("train/lr"), _style(history), color=colour, linewidth=1.5, label=history.name)
        norm.plot(
            steps, history.column("train/grad_norm"), _style(history), color=colour, linewidth=0.9, label=history.name
        )
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    norms = np.concatenate([history.column("train/grad_norm") for history in runs])
    norms = norms[np.isfinite(norms) & (norms > 0)]
    if len(norms) and norms.max() > 20 * norms.min():
        norm.set_yscale("log")
    norm.set_ylabel("gradient norm before clipping")
    norm.set_xlabel("steps")
    if len(runs) > 1:
        rate.legend(loc="upper right")
    return figure


def _figure(title: str, num_panels: int, runs: Sequence[History]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 5.2 if num_panels == 1 else 7), dpi=130, layout="constrained")
    figure.suptitle(f"{title} of {runs[0].name}" if len(runs) == 1 else title, fontsize=13)
    panels = figure.subplots(num_panels, 1, sharex=True, squeeze=False)[:, 0]
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
