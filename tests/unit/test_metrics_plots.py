"""Plots are files that an image reader opens, and show what the records say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from llm_parallel.metrics import plots
from llm_parallel.metrics.history import read_history
from llm_parallel.metrics.plots import compare_runs, plot_run, smooth

OTHER = "TP 1 x PP 2 (1F1B) x DP 1"


def write_run(
    run_dir: Path,
    num_steps: int,
    skipped: tuple[int, ...] = (),
    ramp: int = 1,
    restarts: tuple[tuple[int, str], ...] = (),
    more: dict[str, float] | None = None,
) -> Path:
    """``restarts``: after which steps the run was started again, and in which layout; ``more``: further numbers of
    every step."""
    run_dir.mkdir(parents=True)
    start: dict[str, Any] = {"event": "run_start", "step": 0, "is_cuda": False, "layout": "TP 2 + SP x DP 1"}
    records = [start]
    tokens = 0
    for step in range(1, num_steps + 1):
        tokens += 1024 * (1 + step // ramp)
        loss = 3 + 5 * math.exp(-step / 10)
        records.append(
            {
                "step": step,
                "train/loss": None if step in skipped else loss,
                "train/grad_norm": None if step in skipped else 40.0 / step,
                "train/lr": 3e-4,
                "train/tokens": tokens,
                "train/skipped": int(step in skipped),
                "perf/tokens_per_s_per_gpu": 500.0 + step,
                "perf/tflops": 0.02,
                "perf/step_time": 1.0,
                "perf/forward_backward_time": 0.7,
                "perf/optimizer_time": 0.1,
                "perf/data_time": 0.1,
                **(more or {}),
            }
        )
        records += [{**start, "step": step, "layout": layout} for after, layout in restarts if after == step]
        if step % 10 == 0:
            records.append({"step": step, "eval/loss": loss + 0.1})
    text = "".join(json.dumps(record) + "\n" for record in records)
    (run_dir / "metrics.jsonl").write_text(text + '{"step": 99, "train/lo')
    return run_dir


@pytest.mark.parametrize("num_steps", [1, 2, 60])
def test_files_are_images_with_something_in_them(tmp_path: Path, num_steps: int) -> None:
    run_dir = write_run(tmp_path / "run", num_steps, skipped=(2,) if num_steps > 2 else ())
    paths = plot_run(run_dir, unigram_entropy=6.5)
    assert [path.relative_to(run_dir).as_posix() for path in paths] == [
        "plots/loss.png",
        "plots/throughput.png",
        "plots/lr_gradnorm.png",
    ]
    for path in paths:
        pixels = imread(path)
        assert min(pixels.shape[:2]) > 500
        assert pixels[..., :3].std() > 0.02, "not blank"
    assert sorted(path.name for path in (run_dir / "plots").iterdir()) == sorted(path.name for path in paths)


def test_loss_figure_shows_training_held_out_skipped_and_unigram(tmp_path: Path) -> None:
    run = read_history(write_run(tmp_path / "run", 40, skipped=(5, 6), ramp=3))
    axes = plots._draw_loss([run], 6.5).axes[0]
    drawn = {line.get_label(): line for line in axes.get_lines()}
    raw = axes.get_lines()[0]
    assert np.array_equal(raw.get_ydata(), run.column("train/loss"), equal_nan=True)
    assert np.array_equal(raw.get_xdata(), run.column("train/tokens"))
    held_out = drawn[f"held out (last {run.evals[-1]['eval/loss']:.4f})"]
    tokens_at = dict(zip(run.column("step"), run.column("train/tokens")))
    assert held_out.get_xdata().tolist() == [tokens_at[step] for step in (10, 20, 30, 40)]
    assert drawn["2 skipped steps"].get_xdata().tolist() == [tokens_at[5], tokens_at[6]]
    assert set(drawn["unigram entropy 6.500"].get_ydata()) == {6.5}
    assert axes.get_xlabel() == "tokens"
    assert axes.get_ylabel() == "loss (nats per token)"
    above = axes.child_axes[0]
    to_steps, to_tokens = above._functions
    assert np.allclose(to_steps(run.column("train/tokens")), run.column("step"))
    assert np.allclose(to_tokens(to_steps(np.array([-5e4, 1.0, 1e5, 1e7]))), [-5e4, 1.0, 1e5, 1e7])


def test_restarts_changes_of_layout_and_the_clip_limit_are_drawn(tmp_path: Path) -> None:
    """By hand: gradient norms are 40 / step, of which those of steps 1 to 15 lie over 2.5; the batch has 1024 tokens
    times 1 + step // 1 at each step."""
    folder = write_run(
        tmp_path / "run", 40, skipped=(7,), restarts=((10, "TP 2 + SP x DP 1"), (20, OTHER), (30, OTHER))
    )
    (folder / "config.yaml").write_text("optim: {clip_grad: 2.5}\n")
    run = read_history(folder)
    tokens = {step: 1024 * sum(1 + number for number in range(1, step + 1)) for step in (7, 10, 20, 30)}
    assert [(mark.kind, mark.step, mark.tokens) for mark in run.marks()] == [
        *(("restart", 10, tokens[10]), ("layout", 20, tokens[20]), ("restart", 30, tokens[30]), ("skip", 7, tokens[7]))
    ]
    assert run.marks()[1].text == "restart after step 20: TP 2 + SP x DP 1 → TP 1 x PP 2 x DP 1"
    figure = plots._draw_schedule([run])
    rate, norm = figure.axes
    lines = {line.get_label(): line for line in rate.get_lines()}
    assert set(lines["2 restarts"].get_xdata()) == {10} and "1 skipped step" in lines
    assert set(lines[run.marks()[1].text].get_xdata()) == {20}
    limit = next(line for line in norm.get_lines() if "clip_grad" in str(line.get_label()))
    assert set(limit.get_ydata()) == {2.5} and limit.get_label() == "optim.clip_grad 2.5, exceeded by 14 steps"
    for axes in (rate, norm):
        assert {10, 20, 30} <= {float(line.get_xdata()[0]) for line in axes.get_lines() if len(line.get_xdata()) == 2}


@pytest.mark.parametrize("draw", ["loss", "throughput", "schedule", "statistics"])
def test_no_legend_covers_data_and_the_title_names_the_folder(
    tmp_path: Path, draw: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    layouts = ((10, "TP 2 + SP x DP 1"), (20, OTHER))
    run = read_history(write_run(tmp_path / "runs" / "one", 40, (7,), 1, layouts, {"train/loss/code": 2.0}))
    figure = {
        "loss": lambda: plots._draw_loss([run], 6.5),
        "throughput": lambda: plots._draw_throughput([run]),
        "schedule": lambda: plots._draw_schedule([run]),
        "statistics": lambda: plots.draw_statistics([run]),
    }[draw]()
    FigureCanvasAgg(figure).draw()
    assert "runs/one" in figure.get_suptitle()
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()] + figure.legends
    assert legends
    for legend in legends:
        box = legend.get_window_extent()
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1
        for axes in figure.axes:
            assert not box.shrunk(0.99, 0.98).overlaps(axes.get_window_extent().shrunk(1, 0.98)), draw


def test_bubble_and_communication_are_in_the_time_split(tmp_path: Path) -> None:
    more = {"time/compute_s": 0.5, "time/tp_s": 0.2, "time/bubble_s": 0.2, "time/other_s": 0.1}
    run = read_history(write_run(tmp_path / "run", 5, more=more))
    labels = [text.get_text() for text in plots._draw_throughput([run]).axes[1].get_legend().get_texts()]
    assert labels == ["compute 50%", "tensor parallel 20%", "pipeline bubble 20%", "other 10%"]


def test_numbers_of_an_objective_have_a_picture(tmp_path: Path) -> None:
    """Numbers of one kind share a panel; accuracies, which lie between 0 and 1, have their own; text is no number."""
    more: dict[str, Any] = {"train/loss/code": 2.0, "train/loss/prose": 3.0, "train/rewards/margins": 5.0}
    more |= {"train/rewards/accuracies": 0.5, "train/skip_reason": "norm"}
    folder = write_run(tmp_path / "run", 12, more=more)
    kinds = read_history(folder).statistics()
    assert kinds == {
        "loss": ["train/loss/code", "train/loss/prose"],
        "rewards": ["train/rewards/margins"],
        "rewards/accuracies": ["train/rewards/accuracies"],
    }
    assert [path.name for path in plot_run(folder)][-1] == "statistics.png"


def test_several_runs_are_told_apart(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "first", 30), write_run(tmp_path / "second", 20)
    names = [path.name for path in compare_runs([first, second], first / "plots")]
    assert names == ["compared_loss.png", "compared_throughput.png", "compared_lr_gradnorm.png"]
    (legend,) = plots._draw_loss([read_history(first), read_history(second)], None).legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert any("first" in label for label in labels)
    assert any("second" in label for label in labels)


def test_run_without_a_step_has_no_plots(tmp_path: Path) -> None:
    assert plot_run(write_run(tmp_path / "run", 0)) == []


@given(st.lists(st.floats(-100, 100) | st.just(math.nan), min_size=1, max_size=40), st.integers(1, 15))
def test_smooth_is_the_mean_of_its_neighbours(values: list[float], window: int) -> None:
    half, out = window // 2, smooth(np.array(values), window)
    for i in range(len(values)):
        near = [v for v in values[max(0, i - half) : i + min(half, i) + 1] if not math.isnan(v)]
        if near:
            assert out[i] == pytest.approx(sum(near) / len(near), abs=1e-9)
        else:
            assert math.isnan(out[i])
