"""``llm-parallel evaluate --compare A.json B.json``: what changed between two evaluations, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from llm_parallel.errors import UserError
from llm_parallel.evaluate.causes import causes
from llm_parallel.evaluate.pairs import Pair, answers_of, log_probs_of, pairs_of
from llm_parallel.evaluate.results import read_results
from llm_parallel.evaluate.stats import Paired, paired
from llm_parallel.lines import say
from llm_parallel.screen import say_next, show_table

HEADS = ("task", "metric", "documents", "same prompts", "first", "second", "difference", "95 % interval", "better",
         "worse", "p")  # fmt: skip
SHOWN = 5
LONGEST = 70


def compare_command(first: Path, second: Path) -> int:
    """Prints the comparison; returns the exit status. Raises UserError for files that cannot be compared."""
    one, other = read_results(first), read_results(second)
    pairs = pairs_of(one, other)
    if not any(pairs.values()):
        tasks = ", ".join(sorted(set(one["samples"]) & set(other["samples"])))
        raise UserError(
            f"{first} and {second} have no document in common" + (f" in {tasks}" if tasks else ", and no task either")
        )
    say(f"First: {first}\nSecond: {second}")
    _say_uncommon(one, other, pairs)
    compared = {
        (task, metric): paired(*zip(*values))  # type: ignore[arg-type]
        for task, of_task in pairs.items()
        for metric, values in metric_values(of_task).items()
    }
    rows = [table_row(task, metric, pairs[task], found) for (task, metric), found in compared.items()]
    show_table("Comparison (shares in percent)", HEADS, rows)
    _show_groups(one, compared)
    _show_changed(pairs)
    found = causes(one, other, pairs)
    if found:
        show_table("Why they differ", ("cause", "evidence"), [(cause.name, cause.evidence) for cause in found])
    else:
        say("Nothing that was asked differs, and no number beyond rounding.")
    say_next(f"llm-parallel evaluate --compare {quote(str(second))} {quote(str(first))}")
    return 0


def metric_values(pairs: Sequence[Pair]) -> dict[str, list[tuple[float, float]]]:
    """Both values of each metric and filter over the documents of a task."""
    found: dict[str, list[tuple[float, float]]] = {}
    for pair in pairs:
        filtered = pair.first.get("filter", "none")
        for name in pair.metrics:
            values = pair.values(name)
            if values is not None:
                shown = name if filtered in ("none", "remove_whitespace", "create_test") else f"{name} ({filtered})"
                found.setdefault(shown, []).append(values)
    return found


def table_row(task: str, metric: str, pairs: Sequence[Pair], found: Paired) -> tuple[str, ...]:
    """A row under ``HEADS``."""
    same = len({pair.document for pair in pairs if pair.same_prompt})
    interval = f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
    p = "" if found.p is None else f"{found.p:.2g}"
    return (
        task, metric, str(found.count), str(same), f"{100 * found.first:.1f}", f"{100 * found.second:.1f}",
        f"{100 * found.difference:+.1f}", interval, str(found.better), str(found.worse), p,
    )  # fmt: skip


def _say_uncommon(one: Mapping[str, Any], other: Mapping[str, Any], pairs: Mapping[str, Sequence[Pair]]) -> None:
    for name, here, there in (("first", one, other), ("second", other, one)):
        alone = sorted(set(here["samples"]) - set(there["samples"]))
        if alone:
            say(f"Only the {name} has {', '.join(alone)}.")
    for task, of_task in pairs.items():
        counts = [len(results["samples"][task]) for results in (one, other)]
        if len(of_task) < max(counts):
            say(f"{task}: {len(of_task)} samples are in both, of {counts[0]} and {counts[1]}.")


def contributions(
    members: Sequence[str], compared: Mapping[tuple[str, str], Paired], metric: str
) -> list[tuple[str, float]]:
    """How much each task adds to the difference of its group, whose tasks count by their documents; the most first."""
    found = {task: compared[task, metric] for task in members if (task, metric) in compared}
    total = sum(one.count for one in found.values())
    parts = [(task, one.difference * one.count / total) for task, one in found.items()]
    return sorted(parts, key=lambda part: -abs(part[1]))


def leaves(results: Mapping[str, Any], group: str) -> list[str]:
    """Tasks of a group, those of the groups in it among them."""
    members = results.get("group_subtasks", {}).get(group)
    return [group] if not members else [task for member in members for task in leaves(results, member)]


def _show_groups(results: Mapping[str, Any], compared: Mapping[tuple[str, str], Paired]) -> None:
    for group in results.get("groups", {}):
        members = leaves(results, group)
        for metric in dict.fromkeys(name for task, name in compared if task in members):
            parts = [part for part in contributions(members, compared, metric) if part[1]]
            if parts:
                total = sum(part for _, part in parts)
                rows = [(task, f"{100 * part:+.2f}") for task, part in parts[:SHOWN]]
                show_table(f"{group}: {100 * total:+.1f} points of {metric}, most of it from", ("task", "points"), rows)


def _show_changed(pairs: Mapping[str, Sequence[Pair]]) -> None:
    """Documents whose score changed: their numbers, and some of them with their answers."""
    rows = []
    for task, of_task in pairs.items():
        changed = list({pair.document: pair for pair in of_task if _changed(pair)}.values())
        if changed:
            numbers = ", ".join(str(pair.first.get("doc_id")) for pair in changed[:20])
            say(f"{task}: {len(changed)} documents have another score: {numbers}{', …' if len(changed) > 20 else ''}")
        rows += [(task, str(pair.first.get("doc_id")), _told(pair.first), _told(pair.second)) for pair in changed[:2]]
    if rows:
        show_table("Some of them", ("task", "document", "first", "second"), rows[: 2 * SHOWN])


def _changed(pair: Pair) -> bool:
    return any((values := pair.values(name)) is not None and values[0] != values[1] for name in pair.metrics)


def _told(sample: Mapping[str, Any]) -> str:
    """An answer in short: its text, or the choice that was likeliest with its log-probability."""
    numbers = log_probs_of(sample)
    if numbers:
        best = max(range(len(numbers)), key=numbers.__getitem__)
        return f"choice {best} ({numbers[best]:.3f})"
    text = (answers_of(sample) or [""])[0].strip().replace("\n", " ")
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
