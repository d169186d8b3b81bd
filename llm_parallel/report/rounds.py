"""The section of a report about runs in rounds: what was rewarded, what it cost, and answers before and after."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from llm_parallel.errors import UserError
from llm_parallel.metrics.round_plots import panels_of
from llm_parallel.metrics.rounds import DIVERGENCES, RoundHistory, read_rounds
from llm_parallel.report.figures import Picture, new_figure
from llm_parallel.report.page import Beside, Section, Told
from llm_parallel.report.runs import Run
from llm_parallel.report.text import count, written
from llm_parallel.tune.round_texts import Answers, RoundAnswer, kept_rounds, read_round

MOST_PROMPTS = 6
"""Most prompts of a run whose answers are shown side by side."""
MOST_COLUMNS = 4
"""Most rounds of which answers to one prompt are shown: the first, the last, and some between."""
COLUMNS = {
    "reward": ("reward", ".3g"),
    "reward_std": ("spread", ".3g"),
    "reward_median": ("median", ".3g"),
    "reward_best": ("best", ".3g"),
    "held_out/reward": ("held out", ".3g"),
    "frac_reward_zero_std": ("all the same", ".0%"),
    "completions/mean_length": ("tokens", ".1f"),
    "completions/max_length": ("longest", ",.0f"),
    "completions/clipped_ratio": ("cut", ".1%"),
    "kl_to_reference": ("KL, nats a token", ".3g"),
    "objective/kl": ("KL, nats an answer", ".3g"),
    "objective/entropy": ("entropy, nats an answer", ".3g"),
    "val/explained_variance": ("critic explains", ".0%"),
    "sampling/sampling_logp_difference/mean": ("sampling against training, mean", ".1e"),
    "sampling/sampling_logp_difference/max": ("largest", ".1e"),
    "kept": ("kept", ",.0f"),
}
"""Numbers of a round in the table: heading and form."""


def rounds_section(runs: Sequence[Run], pictures: list[Picture]) -> Section | None:
    """Curves over rounds, the same as a table, and answers side by side; None if no run is in rounds. Figures are added
    to ``pictures``."""
    histories = [(run, read_rounds(run.history)) for run in runs]
    found = [(run, rounds) for run, rounds in histories if rounds]
    if not found:
        return None
    section = Section("rounds", "Rounds")
    every = [rounds for _, rounds in found]
    drawn = []
    for panel in panels_of(every):
        figure, axes = new_figure(3.6)
        if panel.name != "reward":
            figure.set_size_inches(6.4, 3.6)  # half as wide on a large page, with text of the same size
        panel.draw(axes, every)
        if axes.get_legend_handles_labels()[1]:
            figure.legend(frameon=False, loc="outside lower center", ncols=3, fontsize=9)
        drawn.append(Picture(f"rounds_{panel.name}", panel.title, figure, wide=panel.name == "reward"))
    section.charts(drawn)
    pictures += drawn
    if not any(rounds.divergence for rounds in every):
        section.text(
            "No divergence from a reference was recorded: the runs hold their models to none (kl_weight is 0, or the "
            "method has none).",
            "faint",
        )
    for run, rounds in found:
        if len(found) > 1:
            section.heading(run.name)
        section.text(_sentence(rounds))
        section.details(f"All {count(len(rounds.records), 'round')}", *_table(rounds))
        _answers(section, run, rounds)
    return section


def _sentence(rounds: RoundHistory) -> str:
    """The first and the last round in words."""
    first, last = rounds.records[0], rounds.records[-1]
    text = (
        f"Round {last['number']:,} has a mean reward of {last['reward']:.3g}, round {first['number']:,} had "
        f"{first['reward']:.3g}; answers have {last['completions/mean_length']:.3g} tokens, and had "
        f"{first['completions/mean_length']:.3g}; {last['completions/clipped_ratio']:.1%} are cut, and "
        f"{last['frac_reward_zero_std']:.0%} of the prompts have answers that all score the same."
    )
    if rounds.divergence is not None:
        value = rounds.column(rounds.divergence)[-1]
        text += f" The policy is {written(float(value), '.3g')} {DIVERGENCES[rounds.divergence]} from its reference."
    return text


def _table(rounds: RoundHistory) -> tuple[Sequence[str], list[Sequence[str]]]:
    names = [name for name in COLUMNS if rounds.has(name)]
    head = ("round", "after step", *(COLUMNS[name][0] for name in names))
    rows: list[Sequence[str]] = []
    for place, record in enumerate(rounds.records):
        values = [written(float(rounds.column(name)[place]), COLUMNS[name][1]) for name in names]
        rows.append((f"{record['number']:,}", f"{record['step']:,}", *values))
    return head, rows


def _answers(section: Section, run: Run, rounds: RoundHistory) -> None:
    """Answers before and after: to held-out prompts that were answered several times, and those in the records of
    rounds that the run still has."""
    repeated = list(_repeated(run, rounds))
    if repeated:
        section.text(
            "Prompts whose answers were recorded before several rounds; held-out ones are answered greedily:", "faint"
        )
        section.beside(repeated[:MOST_PROMPTS])
    try:
        kept = [(number, read_round(run.folder, number)) for number in _ends(kept_rounds(run.folder), 2)]
    except UserError as error:
        section.text(f"{error}.", "faint")
        return
    shown = list(_of_records(kept))[:MOST_PROMPTS]
    if shown:
        section.text(
            "From the records of rounds that the run folder still has, the best and the worst answer:", "faint"
        )
        section.beside(shown)


def _ends(values: Sequence[Any], most: int) -> list[Any]:
    """The first and the last of the values, and others evenly between them."""
    if len(values) <= most:
        return list(values)
    return [values[round(place * (len(values) - 1) / (most - 1))] for place in range(most)]


def _repeated(run: Run, rounds: RoundHistory) -> Iterator[Beside]:
    """Prompts that the metrics have several answers to, as columns by the steps after which they were given."""
    by_prompt: dict[str, dict[int, dict[str, Any]]] = {}
    for record in run.history.answers:
        by_prompt.setdefault(str(record.get("prompt")), {})[record["step"]] = record
    names = {int(record["step"]): f"before round {record['number']:,}" for record in rounds.records}
    for prompt, by_step in by_prompt.items():
        if len(by_step) > 1:
            columns = [
                Told(
                    names.get(step, f"after step {step:,}"),
                    str(by_step[step].get("answer")),
                    "" if by_step[step].get("stopped", True) else "cut at its longest length",
                )
                for step in _ends(sorted(by_step), MOST_COLUMNS)
            ]
            yield Beside(prompt, columns)


def _of_records(kept: Sequence[tuple[int, list[Answers]]]) -> Iterator[Beside]:
    """Prompts that two kept rounds have both asked, side by side; then some of each."""
    if not kept:
        return
    by_number = [(number, {_key(one): one for one in answers}) for number, answers in kept]
    (first, before), (last, after) = by_number[0], by_number[-1]
    shared = [key for key in before if key in after] if first != last else []
    for key in shared:
        yield Beside(_prompt(after[key]), [*_ends_of(first, before[key]), *_ends_of(last, after[key])])
    for number, answers in by_number:
        others = [one for key, one in answers.items() if key not in shared]
        for one in others[: max(0, MOST_PROMPTS - len(shared)) // len(by_number)]:
            yield Beside(_prompt(one), _ends_of(number, one))


def _key(one: Answers) -> str:
    return repr([(message["role"], message.get("content")) for message in one.prompt.messages])


def _prompt(one: Answers) -> str:
    return "\n\n".join(str(message.get("content") or "") for message in one.prompt.messages)


def _ends_of(number: int, one: Answers) -> list[Told]:
    """The best and the worst answer of a round to a prompt; one if all have the same score."""
    scores = [answer.score if answer.score is not None else -math.inf for answer in one.answers]
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    same = f"one of {len(scores)} with the same score"
    chosen = [("best", best), ("worst", worst)] if scores[best] > scores[worst] else [(same, best)]
    return [_told(f"round {number:,}, {name}", one.answers[place]) for name, place in chosen]


def _told(title: str, answer: RoundAnswer) -> Told:
    score = "not judged" if answer.score is None else f"score {answer.score:.4g}"
    ending = "" if answer.complete else ", cut"
    return Told(title, answer.text, f"{score}, {count(answer.tokens, 'token')}{ending}")
