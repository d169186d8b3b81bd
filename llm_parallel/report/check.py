"""``llm-parallel check``: conversations, preferences or prompts as the model of a run will see them, as text and as a
page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from rich.console import Console
from rich.text import Text

from llm_parallel.config.load import load_config
from llm_parallel.data.chat_counts import some
from llm_parallel.data.chat_data import ChatData
from llm_parallel.data.chat_files import prepare_conversations
from llm_parallel.data.check import Packing, Piece, Row, histogram, packing_of, quantiles, rows_of
from llm_parallel.data.group_data import GroupData
from llm_parallel.data.group_files import prepare_groups
from llm_parallel.data.group_rows import UNITS
from llm_parallel.data.prompts import prepare_prompts
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write
from llm_parallel.lines import say
from llm_parallel.report.check_groups import ShownGroup, groups_of, show_groups
from llm_parallel.report.check_prompts import CheckedPrompts, ShownPrompt, checked_prompts, show_prompts
from llm_parallel.screen import show as tell
from llm_parallel.train.inherit import inherited

TRAINED, SPECIAL, ASKED = "bold green", "cyan", "dim"
BEGIN, END = "⟦", "⟧"
"""Around what is trained, where there are no colours."""
BAR = 40


@dataclass(frozen=True)
class Checked:
    """All that the command shows."""

    data: ChatData
    notices: list[str]
    sources: list[tuple[str, ...]]
    lengths: list[int]
    bins: list[tuple[int, int, int]]
    packing: Packing
    held_out: int
    rows: list[Row]
    head: Sequence[str]
    noun: str = "conversation"
    groups: list[ShownGroup] = field(default_factory=list)
    title: str = "Conversations"
    measured: str = "a conversation"
    prompts: Sequence[ShownPrompt] = ()

    @property
    def report(self) -> dict[str, Any]:
        """What the prepared data say of themselves."""
        return self.data.report

    @property
    def facts(self) -> list[tuple[str, str, str]]:
        """Label, value and note of the numbers that matter most."""
        report, packing = self.data.report, self.packing
        total = sum(counts["tokens"] for counts in report["counts"])
        trained = sum(counts["trained"] for counts in report["counts"])
        tokenizer = self.data.encoder.tokenizer
        stops = [f"{tokenizer.name_of(n) or ''} {n}".strip() for n in self.data.stops]
        each = packing.conversations / max(packing.samples, 1)
        return [
            (f"{self.noun}s", f"{packing.conversations:,}", f"in one epoch; {self.held_out:,} are held out"),
            ("tokens", f"{total:,}", f"{trained / total:.1%} are trained"),
            ("samples of an epoch", f"{packing.samples:,}", f"of {report['seq_length']:,} tokens"),
            ("filled", f"{packing.fill:.1%}", f"{each:.1f} {self.noun}s in a sample, at most {packing.most}"),
            ("stops", ", ".join(stops), "the first of them ends the answers here"),
        ]


def check_command(run_file: str, overrides: Sequence[str], html: str | None, samples: int) -> str:
    """Prepares the conversations, preferences or prompts of a run file, prints what the model will see of them, and
    writes it as a page if ``html`` names a file. Returns the command that trains on them. Raises UserError."""
    if samples < 0:
        raise UserError(f"--samples is {samples}; give 0 or more")
    notices: list[str] = []
    config = inherited(load_config(run_file, overrides, notice=notices.append), notices.append)
    checked: Checked | CheckedPrompts
    if config.collects:
        checked = checked_prompts(config, prepare_prompts(config, notices.append), samples, notices)
    elif config.prefers:
        checked = checked_groups(prepare_groups(config, notices.append), config.seed, samples, notices)
    else:
        checked = checked_data(prepare_conversations(config, notices.append), config.seed, samples, notices)
    show(checked, Console())
    if html is not None:
        try:
            with atomic_write(html) as handle:
                handle.write(page(checked))
        except OSError as error:
            raise UserError(f"--html {html} cannot be written: {error.strerror or error}") from None
        say(f"wrote {html}")
    return "prefer" if config.prefers or config.collects else "sft"


def checked_data(data: ChatData, seed: int, samples: int, notices: list[str]) -> Checked:
    """What there is to say about prepared conversations, with the first ``samples`` samples of training."""
    lengths = data.tokens.document_lengths.astype(np.int64)
    training = data.training(seed)
    return Checked(
        data,
        notices,
        list(_sources(data)),
        quantiles(lengths),
        histogram(lengths, data.report["seq_length"] + 1),
        packing_of(training, data.report["seq_length"], lengths[data.numbers("train")]),
        len(data.numbers("eval")),
        list(rows_of(data, seed, samples)),
        HEAD,
    )


def checked_groups(data: GroupData, seed: int, samples: int, notices: list[str]) -> Checked:
    """The same about prepared preferences."""
    lengths = data.chat.tokens.document_lengths.astype(np.int64)
    by_group = np.add.reduceat(lengths - 1, data.firsts[:-1]) + 1
    return Checked(
        data.chat,
        notices,
        list(_sources(data.chat, GROUP_COUNTS)),
        quantiles(lengths),
        histogram(lengths, data.report["seq_length"] + 1),
        packing_of(data.training(seed), data.report["seq_length"], by_group[data.numbers("train")]),
        len(data.numbers("eval")),
        [],
        ("source", "weight", "records", f"{UNITS[data.method]}s", *GROUP_HEAD),
        UNITS[data.method],
        list(groups_of(data, seed, samples)),
        "Preferences",
        "a prompt with one answer",
    )


HEAD = ("source", "weight", "records", "kept", "no conversation", "nothing trained", "too long", "turns cut",
        "answers cut", "tokens", "trained")  # fmt: skip
COUNTS = ("records", "kept", "unreadable", "nothing_trained", "too_long", "turns_cut", "answers_cut", "tokens",
          "trained")  # fmt: skip
GROUP_HEAD = ("no preference", "none better", "too long", "turns cut", "tokens", "trained")
GROUP_COUNTS = ("records", "groups", "unreadable", "uncompared", "too_long", "turns_cut", "tokens", "trained")


def _sources(data: ChatData, names: Sequence[str] = COUNTS) -> Iterator[tuple[str, ...]]:
    weights = data.report["weights"]
    for place, (path, counts) in enumerate(zip(data.report["paths"], data.report["counts"])):
        numbers = [counts[name] for name in names]
        weight = f"{weights[place]:g}" if place < len(weights) else "held out"
        yield path, weight, *(f"{number:,}" for number in numbers)


def show(checked: Checked | CheckedPrompts, console: Console) -> None:
    """Prints it: trained tokens in green, or between marks where there are no colours."""
    for notice in checked.notices:
        tell(notice, console)
    for label, value, note in checked.facts:
        tell(f"{label}: {value} ({note})", console)
    shortest, median, nine, most, longest = checked.lengths
    tell(
        f"tokens of {checked.measured}: {shortest} to {longest}, median {median}, 90 % up to {nine}, 99 % up to {most}",
        console,
    )
    highest = max((count for _, _, count in checked.bins), default=1) or 1
    bar = min(BAR, console.width - 30)  # what stands before and after it
    for first, last, count in checked.bins:
        if count:
            tell(f"{first:>7} to {last:<7} {'█' * max(1, round(bar * count / highest))} {count:,}", console)
    if checked.rows or checked.groups:
        how = "in green" if console.is_terminal else f"between {BEGIN} and {END}"
        tell(f"\nsamples as the model sees them, trained tokens {how}:", console)
    show_groups(checked.groups, checked.noun, console, coloured)
    show_prompts(checked.prompts, console, coloured)
    for sample in checked.rows:
        for shown in sample.conversations:
            place = f"{shown.source} record {shown.line}, {shown.tokens} tokens, {shown.trained} trained"
            tell(f"\nsample {sample.number}: {place}", console)
            console.print(coloured(shown.pieces, console.is_terminal), soft_wrap=not console.is_terminal)
        if sample.padding:
            console.print(Text(f"and {some(sample.padding, 'token')} of padding", style=ASKED))


def coloured(pieces: Sequence[Piece], colours: bool) -> Text:
    """The text of tokens, with what is trained marked."""
    text, trained = Text(), False
    for piece in pieces:
        if not colours and bool(piece.weight) != trained:
            text.append(END if trained else BEGIN)
            trained = not trained
        style = TRAINED if piece.weight else SPECIAL if piece.special else ASKED
        text.append(piece.text, style)
    return text.append(END) if trained else text


def page(checked: Checked | CheckedPrompts) -> str:
    """One HTML page that needs no network."""
    environment = Environment(loader=PackageLoader("llm_parallel.report", "."), autoescape=True)
    style = environment.get_template("page.css").render()
    highest = max((count for _, _, count in checked.bins), default=1) or 1
    values: dict[str, Any] = {
        "style": style,
        "title": checked.title,
        "head": checked.head,
        "highest": highest,
        "checked": checked,
        "report": checked.report,
    }
    return environment.get_template("check.html.j2").render(**values)
