"""Judgements as the records that training reads: pairs, labels, scored answers and conversations."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from llm_parallel.annotate.board import Judgement, Task
from llm_parallel.annotate.items import Item
from llm_parallel.data.chat_counts import some
from llm_parallel.data.groups import Answer, Group, pairs_of, rankings_of, singles_of
from llm_parallel.files import atomic_write

KINDS = {"dpo": "pairs", "kto": "labelled answers", "rrhf": "prompts with scored answers", "sft": "conversations"}
"""What each file holds; its ending is its kind."""


@dataclass
class Verdict:
    """What all annotators together said of an item: for each answer the sum and the number of comparisons, of which a
    win counts 1, a tie 0 and a loss -1; good counts 1 and bad 0."""

    item: Item
    sums: list[float]
    counts: list[int]
    pairs: list[tuple[int, int, float]] = field(default_factory=list)
    """Two answers that were compared by themselves, and by how many more the first was preferred."""

    @property
    def scores(self) -> list[float | None]:
        """The mean of each answer; None for one of which nothing was said."""
        return [total / count if count else None for total, count in zip(self.sums, self.counts)]


@dataclass
class Exported:
    """Records by kind, and how many items gave none and why."""

    records: dict[str, list[dict[str, Any]]]
    judged: int = 0
    skipped: int = 0
    ties: int = 0


def verdicts(
    items: Sequence[Item], tasks: Mapping[str, Task], judgements: Sequence[Judgement], mode: str
) -> dict[str, Verdict]:
    """What was said of each item that was judged, by its id."""
    found: dict[str, Verdict] = {}
    votes: dict[str, float] = {}
    for judgement in judgements:
        task, ranks = tasks.get(judgement.task), judgement.ranks
        if task is None or ranks is None:
            continue
        size = len(task.item.answers)
        verdict = found.setdefault(task.item.id, Verdict(task.item, [0.0] * size, [0] * size))
        if mode == "good-bad":
            _count(verdict, task.answers[0], float(ranks[0] == 1))
            continue
        for one, other in combinations(range(len(ranks)), 2):
            if mode == "best" and ranks[one] == ranks[other] == 2:
                continue  # nobody has compared these two
            won = float((ranks[other] > ranks[one]) - (ranks[other] < ranks[one]))
            _count(verdict, task.answers[one], won)
            _count(verdict, task.answers[other], -won)
            if mode == "pair":
                votes[task.id] = votes.get(task.id, 0.0) + won
    for task_id, won in votes.items():
        one, other = tasks[task_id].answers
        found[tasks[task_id].item.id].pairs.append((one, other, won))
    return {item.id: found[item.id] for item in items if item.id in found}


def _count(verdict: Verdict, place: int, value: float) -> None:
    verdict.sums[place] += value
    verdict.counts[place] += 1


def exported(items: Sequence[Item], tasks: Mapping[str, Task], judgements: Sequence[Judgement], mode: str) -> Exported:
    """Records for every method. An item whose answers are all equally good gives none but labels, and is counted."""
    found = Exported({kind: [] for kind in KINDS})
    found.skipped = len({one.task for one in judgements if one.ranks is None})
    for verdict in verdicts(items, tasks, judgements, mode).values():
        found.judged += 1
        group = _group(verdict, mode)
        made = {
            "dpo": list(_pairs(verdict, group, mode)),
            "kto": list(_labels(verdict, group, mode)),
            "rrhf": list(_ranking(group)),
            "sft": list(_best(group, mode)),
        }
        found.ties += not made["dpo"] and len(group.answers) > 1
        for kind, records in made.items():
            found.records[kind] += records
    return found


def _group(verdict: Verdict, mode: str) -> Group:
    """The answers of which something was said, with their scores."""
    item = verdict.item
    answers = tuple(Answer(answer, score) for answer, score in zip(item.answers, verdict.scores) if score is not None)
    return Group(item.prompt, answers, item.tools, labelled=mode == "good-bad")


def _with_tools(record: dict[str, Any], tools: list[Any] | None) -> dict[str, Any]:
    return record | ({"tools": tools} if tools else {})


def _pairs(verdict: Verdict, group: Group, mode: str) -> Iterator[dict[str, Any]]:
    item = verdict.item
    if mode == "pair":
        chosen = [
            (item.answers[one], item.answers[other]) if won > 0 else (item.answers[other], item.answers[one])
            for one, other, won in verdict.pairs
            if won
        ]
    else:
        chosen = [(pair.answers[0].messages, pair.answers[1].messages) for pair in pairs_of(group)]
    for better, worse in chosen:
        record = {"prompt": list(item.prompt), "chosen": list(better), "rejected": list(worse)}
        yield _with_tools(record, item.tools)


def _labels(verdict: Verdict, group: Group, mode: str) -> Iterator[dict[str, Any]]:
    """Each answer, liked or not; one of which as many said good as bad, or which is neither better nor worse than the
    others, is left out."""
    scores = [answer.score for answer in group.answers]
    if mode == "good-bad":
        group = Group(group.prompt, tuple(one for one in group.answers if one.score != 0.5), group.tools, True)
    elif min(scores) == max(scores):
        return
    for single in singles_of(group) if group.answers else ():
        (answer,) = single.answers
        record = {"prompt": list(group.prompt), "completion": list(answer.messages), "label": bool(answer.score)}
        yield _with_tools(record, group.tools)


def _ranking(group: Group) -> Iterator[dict[str, Any]]:
    for one in rankings_of(group):
        texts = [_plain(answer.messages) for answer in one.answers]
        record = {"prompt": list(one.prompt), "responses": texts, "scores": [answer.score for answer in one.answers]}
        yield _with_tools(record, one.tools)


def _best(group: Group, mode: str) -> Iterator[dict[str, Any]]:
    """The best answer, if one is; of answers that were judged by themselves, every good one."""
    if mode == "good-bad":
        best = [answer for answer in group.answers if answer.score > 0.5]
    else:
        highest = max(answer.score for answer in group.answers)
        best = [answer for answer in group.answers if answer.score == highest]
        best = best if len(best) == 1 else []
    for answer in best:
        # Only the answer is trained, not the assistant's earlier turns.
        asked = [{**one, "train": False} if one["role"] == "assistant" else one for one in group.prompt]
        yield _with_tools({"messages": [*asked, *answer.messages]}, group.tools)


def _plain(messages: Sequence[dict[str, Any]]) -> Any:
    """A text where an answer is nothing else."""
    plain = len(messages) == 1 and messages[0].keys() == {"role", "content"}
    return messages[0]["content"] if plain else list(messages)


def write_files(found: Exported, out: Path) -> list[Path]:
    """Writes a file for each kind that has records beside the file of judgements, each whole or not at all; one of
    before that would have none is removed. Raises OSError."""
    written = []
    for kind, records in found.records.items():
        path = out.with_suffix(f".{kind}.jsonl")
        if not records:
            path.unlink(missing_ok=True)
            continue
        with atomic_write(path) as handle:
            handle.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        written.append(path)
    return written


def said(found: Exported, items: int) -> list[str]:
    """Sentences about what was written and what was not."""
    lines = [f"{some(found.judged, 'prompt')} of {items:,} judged, {some(found.skipped, 'task')} skipped"]
    if found.ties:
        lines.append(
            f"{some(found.ties, 'prompt')} without an answer that is better than another: ties, or as many said one "
            "as the other; no pair, ranking or best answer is made of them"
        )
    return lines


def wins_of(found: Mapping[str, Verdict]) -> list[str]:
    """How often what each model wrote was preferred, where the records name models."""
    sums: dict[str, list[float]] = {}
    for verdict in found.values():
        for name, score in zip(verdict.item.models, verdict.scores):
            if name is not None and score is not None and not name.startswith("round "):
                sums.setdefault(name, []).append(score)
    if len(sums) < 2:
        return []
    means = sorted(((math.fsum(values) / len(values), name) for name, values in sums.items()), reverse=True)
    return [f"{name}: mean score {mean:+.2f} over {len(sums[name]):,} answers" for mean, name in means]
