"""Draws what a run in rounds measured: panels that ``plot`` puts into one picture, and the report shows each alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_parallel.metrics.rounds import DIVERGENCES, RoundHistory

# Colours of Okabe and Ito, which colour-blind people can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
Runs = Sequence[RoundHistory]


@dataclass(frozen=True)
class Panel:
    """One panel: what it shows, and the function that draws it on axes."""

    name: str
    title: str
    draw: Callable[[Any, Runs], None]


def panels_of(runs: Runs) -> list[Panel]:
    """The panels for which at least one run has numbers."""
    found = [Panel("reward", "Reward by round: mean, spread and best answer", draw_reward)]
    if any(run.divergence for run in runs):
        found.append(Panel("divergence", "Reward against the divergence from the reference", draw_divergence))
    found.append(Panel("length", "Length of answers by round", draw_lengths))
    found.append(Panel("shares", "Answers that were cut, and prompts that teach nothing, by round", draw_shares))
    if any(run.by_number() for run in runs):
        found.append(Panel("by_number", "Largest and median reward among k answers", draw_by_number))
    return found


def _named(run: RoundHistory, runs: Runs, text: str) -> str:
    return text if len(runs) == 1 else f"{run.name}: {text}"


def draw_reward(axes: Any, runs: Runs) -> None:
    """Mean reward of each round with the spread of a prompt's answers around it, the best answer to each prompt, and
    held-out prompts, which are answered greedily."""
    for run, colour in zip(runs, COLOURS * len(runs)):
        x, mean, spread = run.numbers, run.column("reward"), run.column("reward_std")
        style = "-" if len(x) > 1 else "o"
        label = _named(run, runs, "mean, with the deviation among the answers to a prompt")
        axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
        axes.plot(x, mean, style, color=colour, linewidth=1.8, label=label)
        best = run.column("reward_best")
        axes.plot(x, best, "--" if len(x) > 1 else "^", color=colour, linewidth=1.1,
                  label=_named(run, runs, "best answer to each prompt"))  # fmt: skip
        axes.plot(x, run.column("reward_median"), ":" if len(x) > 1 else "v", color=colour, linewidth=1.1,
                  label=_named(run, runs, "median answer"))  # fmt: skip
        if run.has("held_out/reward"):
            kept = np.isfinite(run.column("held_out/reward"))
            own = "#D55E00" if len(runs) == 1 else colour
            axes.plot(x[kept], run.column("held_out/reward")[kept], "o-", color=own, markersize=4.5, linewidth=0.8,
                      markeredgecolor="white", label=_named(run, runs, "held-out prompts, greedy"))  # fmt: skip
    axes.set_ylabel("reward")
    _by_round(axes)


def draw_divergence(axes: Any, runs: Runs) -> None:
    """One point for each round, from the first to the last: what the reward cost in divergence."""
    units: dict[str, None] = {}
    for run, colour in zip(runs, COLOURS * len(runs)):
        name = run.divergence
        if name is None:
            continue
        units[DIVERGENCES[name]] = None
        x, y = run.column(name), run.column("reward")
        axes.plot(x, y, "-", color=colour, linewidth=0.8, alpha=0.5)
        axes.plot(x, y, "o", color=colour, markersize=4, label=_named(run, runs, f"one point a round, {len(x)} rounds"))
        known = np.nonzero(np.isfinite(x) & np.isfinite(y))[0]
        for place in {int(known[0]), int(known[-1])} if len(known) else ():
            axes.annotate(f"{run.numbers[place]:.0f}", (x[place], y[place]), xytext=(5, 4), textcoords="offset points",
                          fontsize=8, color=colour)  # fmt: skip
    axes.set_xlabel(f"divergence from the reference ({', '.join(units)})")
    axes.set_ylabel("reward")


def draw_lengths(axes: Any, runs: Runs) -> None:
    """Mean and largest number of tokens of an answer."""
    for run, colour in zip(runs, COLOURS * len(runs)):
        style = "-" if len(run.numbers) > 1 else "o"
        axes.plot(run.numbers, run.column("completions/mean_length"), style, color=colour, linewidth=1.8,
                  label=_named(run, runs, "mean"))  # fmt: skip
        axes.plot(run.numbers, run.column("completions/max_length"), ":" if len(run.numbers) > 1 else "^",
                  color=colour, linewidth=1.2, label=_named(run, runs, "longest"))  # fmt: skip
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens of an answer")
    _by_round(axes)


def draw_shares(axes: Any, runs: Runs) -> None:
    """The share of answers that the model did not end, and that of prompts whose answers all have the same score."""
    for run, colour in zip(runs, COLOURS * len(runs)):
        single = len(run.numbers) == 1
        other = COLOURS[1] if len(runs) == 1 else colour
        axes.plot(run.numbers, run.column("completions/clipped_ratio"), "o" if single else "-", color=colour,
                  linewidth=1.6, label=_named(run, runs, "answers that were cut"))  # fmt: skip
        axes.plot(run.numbers, run.column("frac_reward_zero_std"), "^" if single else "--", color=other, linewidth=1.6,
                  label=_named(run, runs, "prompts whose answers all score the same"))  # fmt: skip
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("share")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _by_round(axes)


def draw_by_number(axes: Any, runs: Runs) -> None:
    """What the best of k answers is worth, in a run's first round and in its last (Llama 2, figure 7)."""
    for number, run in enumerate(run for run in runs if run.by_number()):
        curves = run.by_number()
        chosen = [curves[0]] if len(curves) == 1 else [curves[0], curves[-1]]
        for place, one in enumerate(chosen):
            colour = COLOURS[(number * 2 + place) % len(COLOURS)]
            k = np.arange(1, len(one.largest) + 1)
            axes.fill_between(k, one.median, one.largest, color=colour, alpha=0.1, linewidth=0)
            axes.plot(k, one.largest, "o-", color=colour, markersize=3.5, linewidth=1.5,
                      label=_named(run, runs, f"round {one.round}, largest"))  # fmt: skip
            axes.plot(k, one.median, "o--", color=colour, markersize=3.5, linewidth=1.1,
                      label=_named(run, runs, f"round {one.round}, median"))  # fmt: skip
    axes.set_xlabel("k, answers to a prompt")
    axes.set_ylabel("reward")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _by_round(axes: Any) -> None:
    axes.set_xlabel("round")
    axes.xaxis.get_major_locator().set_params(integer=True)
