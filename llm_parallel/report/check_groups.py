"""``llm-parallel check`` of preferences: the answers of a prompt side by side, as their model will see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llm_parallel.data.check import Piece, shown
from llm_parallel.data.group_data import GroupData
from llm_parallel.screen import show as tell

LEAST_WIDTH = 24
"""Columns of a terminal that an answer needs to stand beside others."""


@dataclass(frozen=True)
class ShownAnswer:
    """One answer to a prompt: what it is called, and its tokens."""

    name: str
    pieces: list[Piece]
    tokens: int


@dataclass(frozen=True)
class ShownGroup:
    """One prompt with its answers, the best first: where it comes from, in which sample, and the prompt's tokens."""

    source: str
    line: int
    sample: int
    prompt: list[Piece]
    answers: list[ShownAnswer]


def groups_of(data: GroupData, seed: int, count: int) -> Iterator[ShownGroup]:
    """The groups of the first ``count`` samples of training."""
    samples = data.training(seed)
    for number in range(min(count, samples.packer.samples_of(0))):
        by_group: dict[int, list[int]] = {}
        for answer in samples.answers(number):
            by_group.setdefault(int(data.groups[answer]), []).append(answer)
        for answers in by_group.values():
            yield _shown(data, number, answers)


def _shown(data: GroupData, sample: int, answers: list[int]) -> ShownGroup:
    ordered = sorted(answers, key=lambda answer: -float(data.scores[answer]))
    found = [shown(data.chat, answer) for answer in ordered]
    begins = [next(place for place, piece in enumerate(one.pieces) if piece.weight) for one in found]
    names = [_name(data, answer, len(ordered)) for answer in ordered]
    beside = [
        ShownAnswer(name, one.pieces[begin:], sum(len(piece.ids) for piece in one.pieces[begin:]))
        for name, one, begin in zip(names, found, begins)
    ]
    return ShownGroup(found[0].source, found[0].line, sample, found[0].pieces[: begins[0]], beside)


def _name(data: GroupData, answer: int, of: int) -> str:
    """What an answer is called: by the label that it has, or by its score."""
    score = float(data.scores[answer])
    if data.method == "rrhf" or score not in (0.0, 1.0):
        return f"score {score:g}"
    if of == 1:
        return "liked" if score else "not liked"
    return "chosen" if score else "rejected"


def show_groups(
    groups: Sequence[ShownGroup], noun: str, console: Console, coloured: Callable[[Sequence[Piece], bool], Text]
) -> None:
    """Prints prompts, and their answers in columns where a terminal is wide enough, else one after the other."""
    colours = console.is_terminal
    for group in groups:
        tell(f"\nsample {group.sample}: {group.source} record {group.line}, {noun}", console)
        console.print(coloured(group.prompt, colours), soft_wrap=not colours)
        if colours and console.width >= LEAST_WIDTH * len(group.answers) and len(group.answers) > 1:
            table = Table(expand=True, show_lines=False, pad_edge=False)
            for answer in group.answers:
                table.add_column(f"{answer.name}, {answer.tokens} tokens", ratio=1, overflow="fold")
            table.add_row(*(coloured(answer.pieces, colours) for answer in group.answers))
            console.print(table)
            continue
        for answer in group.answers:
            tell(f"{answer.name}, {answer.tokens} tokens:", console)
            console.print(coloured(answer.pieces, colours), soft_wrap=not colours)
