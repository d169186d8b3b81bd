"""Reports and plots of runs in rounds show the numbers that the rounds recorded, and answers side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from llm_parallel.metrics.history import read_history
from llm_parallel.metrics.plots import plot_run
from llm_parallel.metrics.round_plots import panels_of
from llm_parallel.metrics.rounds import expected_order_statistics, read_rounds
from llm_parallel.report.command import report_command
from llm_parallel.report.request import ReportRequest
from tests.support.report_helpers import at, write_lines, write_run
from tests.support.round_records import write_rounds

SCORES = st.integers(1, 6).flatmap(
    lambda n: st.lists(st.lists(st.integers(-3, 3), min_size=n, max_size=n), min_size=1, max_size=3)
)


@given(SCORES)
def test_the_best_of_k_is_the_mean_over_all_choices(scores: list[list[int]]) -> None:
    largest, median = expected_order_statistics(np.array(scores, float))
    for k in range(1, len(scores[0]) + 1):
        chosen = [choice for row in scores for choice in combinations(row, k)]
        assert largest[k - 1] == pytest.approx(np.mean([max(choice) for choice in chosen]))
        assert median[k - 1] == pytest.approx(np.mean([np.median(choice) for choice in chosen]))


def numbers(number: int, **more: Any) -> dict[str, Any]:
    """What a round records."""
    return {
        "reward": 0.25 + number / 10, "reward_std": 0.125, "reward_best": 0.75, "reward_median": 0.25,
        "frac_reward_zero_std": 0.5, "completions/mean_length": 5.0 + number, "completions/max_length": 9.0,
        "completions/clipped_ratio": 0.0625, "reward_max_by_k": [0.25, 0.75 + number / 100],
        "reward_median_by_k": [0.25, 0.25 + number / 100], **more,
    }  # fmt: skip


def round_event(number: int, step: int, **more: Any) -> dict[str, Any]:
    return {"event": "round", "number": number, "step": step, "time": at(step), **numbers(number, **more)}


def run_of_rounds(folder: Path, rounds: Sequence[dict[str, Any]] | None = None, divergence: bool = True) -> Path:
    """Ten steps in five rounds; the second was made twice, and the last event is of steps that were not made again."""
    events = rounds or [
        round_event(0, 0), round_event(1, 2, reward=-9.0), round_event(1, 2),
        *(round_event(n, 2 * n, **({"held_out/reward": 0.5} if n == 2 else {})) for n in (2, 3, 4)),
        round_event(9, 18),
    ]  # fmt: skip
    write_run(folder, step_s=[0.1] * 10, events=events)
    path = folder / "metrics.jsonl"

    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record.get("train/loss") is not None:
            number, within = divmod(record["step"] - 1, 2)
            record |= {"train/round": number, "train/policy/clip_fraction": 0.1}
            if not within:
                record |= {"train/reward": 0.25, "train/frac_reward_zero_std": 0.5}
                record |= {"train/kl_to_reference": number / 8} if divergence else {}
    write_lines(path, records)
    return folder


def test_rounds_are_read_as_they_were_made_last(tmp_path: Path) -> None:
    history = read_history(run_of_rounds(tmp_path / "run"))
    rounds = read_rounds(history)
    assert rounds.numbers.tolist() == [0, 1, 2, 3, 4]
    assert rounds.column("reward") == pytest.approx([0.25, 0.35, 0.45, 0.55, 0.65])
    assert rounds.column("kl_to_reference").tolist() == [0.0, 0.125, 0.25, 0.375, 0.5]
    assert rounds.divergence == "kl_to_reference" and [one.round for one in rounds.by_number()] == [0, 1, 2, 3, 4]
    assert list(history.statistics()) == ["policy"], "numbers of rounds are no curves over steps"
    assert not read_rounds(read_history(write_run(tmp_path / "other")))


def drawn(name: str, rounds: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Lines with a name of a panel: their points."""
    axes = Figure().subplots()
    next(panel for panel in panels_of([rounds]) if panel.name == name).draw(axes, [rounds])
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


def test_panels_show_what_was_recorded(tmp_path: Path) -> None:
    rounds = read_rounds(read_history(run_of_rounds(tmp_path / "run")))
    reward = drawn("reward", rounds)
    assert reward["mean, with the deviation among the answers to a prompt"][1] == pytest.approx(
        [0.25, 0.35, 0.45, 0.55, 0.65]
    )
    assert reward["held-out prompts, greedy"] == ([2], [0.5])
    ((x, y),) = drawn("divergence", rounds).values()
    assert x == [0.0, 0.125, 0.25, 0.375, 0.5] and y == pytest.approx([0.25, 0.35, 0.45, 0.55, 0.65])
    assert drawn("length", rounds)["mean"][1] == [5, 6, 7, 8, 9]
    shares = drawn("shares", rounds)
    assert {tuple(y) for _, y in shares.values()} == {(0.0625,) * 5, (0.5,) * 5}
    by_number = drawn("by_number", rounds)
    assert by_number["round 4, largest"] == ([1, 2], [0.25, 0.79]) and by_number["round 0, median"][1] == [0.25, 0.25]


def test_a_picture_of_rounds_is_plotted(tmp_path: Path) -> None:
    assert "rounds" in [path.stem for path in plot_run(run_of_rounds(tmp_path / "run"))]
    assert "rounds" not in [path.stem for path in plot_run(write_run(tmp_path / "other"))]
    one = run_of_rounds(tmp_path / "short", [round_event(0, 0)], divergence=False)
    assert (one / "plots" / "rounds.png") in plot_run(one)


def page_of(tmp_path: Path, *folders: Path) -> str:
    assert report_command(ReportRequest([str(folder) for folder in folders], out=str(tmp_path / "r.html"))) == 0
    return (tmp_path / "r.html").read_text()


def test_the_report_has_rounds_with_answers_side_by_side(tmp_path: Path) -> None:
    """Prompts that both kept rounds have asked, and held-out prompts that were answered after several steps; what a
    model wrote is text."""
    folder = run_of_rounds(tmp_path / "run")
    answers = [[("11", 0.0), ("22", 1.0)], [("33", 0.5), ("33", 0.5)]]
    write_rounds(folder, {1: answers, 4: [[("44", 0.0), ("55", 0.25)], [("66", 1.0), ("66", 1.0)]]}, ["1+2", "3+4"])
    with (folder / "metrics.jsonl").open("a") as handle:
        for step in (0, 4, 6, 8, 10):
            answer = {"event": "answer", "step": step, "prompt": "<b>held</b>", "answer": f"said {step}"}
            handle.write(json.dumps(answer) + "\n")
    text = page_of(tmp_path, folder)
    for part in (
        "Round 4 has a mean reward of 0.65, round 0 had 0.25", "The policy is 0.5 nats a token from its reference",
        "All 5 rounds", "round 1, best", "round 4, worst", "score 0.25, 2 tokens",
        "round 4, one of 2 with the same score",
        "before round 2", "before round 0", "said 4", "after step 10", "&lt;b&gt;held&lt;/b&gt;",
    ):  # fmt: skip
        assert part in text, part
    assert "<b>held" not in text
    section = text[text.index('<section id="rounds">') :]
    assert section.index("Prompts whose answers were recorded") < section.index("From the records of rounds")
    for name in ("reward", "divergence", "length", "shares", "by_number"):
        assert f'id="figure-rounds_{name}"' in section


def test_runs_without_reference_or_rounds_say_so_or_nothing(tmp_path: Path) -> None:
    folder = run_of_rounds(tmp_path / "run", divergence=False)
    text = page_of(tmp_path, folder, run_of_rounds(tmp_path / "second", divergence=False))
    assert "No divergence from a reference was recorded" in text and "second: mean" in text
    assert '<section id="rounds">' not in page_of(tmp_path, write_run(tmp_path / "other"))


def test_records_that_are_gone_are_said(tmp_path: Path) -> None:
    folder = run_of_rounds(tmp_path / "run")
    write_rounds(folder, {4: [[("1", 1.0)]]}, ["1+2"])
    (folder / "data" / "abc" / "prompts.jsonl").unlink()
    assert f"round 4 of {folder} cannot be read: its prompts are gone or damaged" in page_of(tmp_path, folder)
