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
from matplotlib.image import imread

from llm_parallel.metrics import plots
from llm_parallel.metrics.history import read_history
from llm_parallel.metrics.plots import compare_runs, plot_run, smooth


def write_run(run_dir: Path, num_steps: int, skipped: tuple[int, ...] = (), ramp: int = 1) -> Path:
    run_dir.mkdir(parents=True)
    records: list[dict[str, Any]] = [{"event": "run_start", "step": 0, "is_cuda": False}]
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
            }
        )
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
    held_out = drawn[f"held out (last {run.evals[-1]['eval/loss']:.3f})"]
    tokens_at = dict(zip(run.column("step"), run.column("train/tokens")))
    assert held_out.get_xdata().tolist() == [tokens_at[step] for step in (10, 20, 30, 40)]
    assert drawn["training: 2 skipped"].get_xdata().tolist() == [tokens_at[5], tokens_at[6]]
    assert set(drawn["unigram entropy 6.500"].get_ydata()) == {6.5}
    assert axes.get_xlabel() == "tokens"
    assert axes.get_ylabel() == "loss (nats per token)"
    above = axes.child_axes[0]
    to_steps, to_tokens = above._functions
    assert np.allclose(to_steps(run.column("train/tokens")), run.column("step"))
    assert np.allclose(to_tokens(to_steps(np.array([-5e4, 1.0, 1e5, 1e7]))), [-5e4, 1.0, 1e5, 1e7])


def test_several_runs_are_told_apart(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "first", 30), write_run(tmp_path / "second", 20)
    names = [path.name for path in compare_runs([first, second], first / "plots")]
    assert names == ["compared_loss.png", "compared_throughput.png", "compared_lr_gradnorm.png"]
    labels = [
        text.get_text()
        for text in plots._draw_loss([read_history(first), read_history(second)], None).axes[0].get_legend().get_texts()
    ]
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
