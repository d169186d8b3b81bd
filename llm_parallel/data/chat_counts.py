"""What became of the records of conversations: counted while they are prepared, and said afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from llm_parallel.data.chat import ChatEncoder, ChatTokens
from llm_parallel.data.formats import Conversation

SHOWN = 5
HELP = "give a chat.template that writes them, such as chatml"


@dataclass
class Counts:
    """Counts of one source: ``records`` that it has, conversations that are ``kept``, and of these the ones whose
    earliest turns (``shortened``, with ``turns_cut`` messages in all) or whose last answer's end (``answers_cut``) were
    left out, with turns that were joined since the template refuses two of a role (``merged``), with an answer of
    nothing (``empty_answers``), and with calls of tools (``calls_unwritten``) or tools (``tools_unwritten``) that the
    template does not write; ``others_weighted``: turns that are not the assistant's and ask to be trained. Left out are
    ``unreadable`` records (``first`` says why of five), those with ``nothing_trained``, those that are ``too_long``,
    and those whose label says that the answer was ``disliked``."""

    records: int = 0
    kept: int = 0
    tokens: int = 0
    trained: int = 0
    shortened: int = 0
    turns_cut: int = 0
    answers_cut: int = 0
    merged: int = 0
    empty_answers: int = 0
    calls_unwritten: int = 0
    tools_unwritten: int = 0
    others_weighted: int = 0
    unreadable: int = 0
    nothing_trained: int = 0
    too_long: int = 0
    disliked: int = 0
    first: list[tuple[str, str]] = field(default_factory=list)
    formats: dict[str, int] = field(default_factory=dict)

    def broken(self, where: str, reason: str) -> None:
        """Counts a record that is no conversation; ``reason`` goes on a sentence that begins with ``where``."""
        self.unreadable += 1
        if len(self.first) < SHOWN:
            self.first.append((where, reason))

    def add(self, tokens: ChatTokens | None, conversation: Conversation, encoder: ChatEncoder) -> bool:
        """Counts a conversation by what was made of it; whether it is kept."""
        if tokens is None:
            if any(conversation.weights):
                self.too_long += 1
            else:
                self.nothing_trained += 1
            return False
        self.kept += 1
        self.tokens += len(tokens.ids)
        self.trained += int(np.count_nonzero(tokens.weights))
        self.shortened += bool(tokens.turns_cut)
        self.turns_cut += tokens.turns_cut
        self.answers_cut += tokens.answer_cut
        self.merged += bool(tokens.merged)
        self.empty_answers += any(
            message["role"] == "assistant" and not message.get("content") and not message.get("tool_calls")
            for message in conversation.messages
        )
        called = any(message.get("tool_calls") for message in conversation.messages)
        self.calls_unwritten += called and not encoder.writes_calls
        self.tools_unwritten += bool(conversation.tools) and not encoder.writes_tools
        return True

    def merge(self, other: Counts) -> None:
        """Adds what was counted of later records."""
        for one in fields(other):
            held, more = getattr(self, one.name), getattr(other, one.name)
            if isinstance(held, dict):
                for name, count in more.items():
                    held[name] = held.get(name, 0) + count
            elif isinstance(held, list):
                held += more[: SHOWN - len(held)]
            else:
                setattr(self, one.name, held + more)

    def as_dict(self) -> dict[str, Any]:
        """For ``report.json``."""
        return asdict(self)

    def why_empty(self, seq_length: int) -> str:
        """The end of a sentence about a source of which nothing is kept."""
        if not self.records:
            return "holds no records"
        if self.unreadable == self.records:
            return f"holds no conversations: none of its {self.records} records can be read; {' '.join(self.first[0])}"
        reasons = []
        if self.unreadable:
            reasons.append(f"{self.unreadable} cannot be read ({' '.join(self.first[0])})")
        if self.disliked:
            reasons.append(f"{self.disliked} have a label which says that the answer was not liked")
        if self.nothing_trained:
            reasons.append(f"{self.nothing_trained} have no answer of the assistant that is trained")
        if self.too_long:
            reasons.append(f"{self.too_long} do not fit data.seq_length_tokens = {seq_length}")
        return f"has no conversation to train on: of {self.records} records {', '.join(reasons)}"


def some(count: int, one: str, many: str | None = None) -> str:
    """A count with its noun: 1 record, 2 records."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def described(report: dict[str, Any]) -> Iterator[str]:
    """Sentences about prepared conversations, each complete in itself."""
    stop = report["stop_names"][0]
    yield f"conversations are written by {report['template_origin']}; answers end with {stop}"
    yield from report["remarks"]
    for number, (path, counts) in enumerate(zip(report["paths"], report["counts"])):
        yield (
            f"{path}: {some(counts['kept'], 'conversation')} of {records_of(report, number)}, "
            f"{some(counts['tokens'], 'token')}, of which {counts['trained']:,} are trained"
        )
        yield from (f"{path}: {text}" for text in _left_out(counts, report))


def records_of(report: dict[str, Any], number: int) -> str:
    """How many records of a source were read, and as what."""
    counts = report["counts"][number]
    first = "the first " if counts["records"] == report.get("limits", {number: None})[number] else ""
    formats = ", ".join(f"{count:,} as {name}" for name, count in counts["formats"].items())
    return f"{first}{some(counts['records'], 'record')} ({formats})"


def _likewise(places: list[str]) -> str:
    return f" (and so {', '.join(places)})" if places else ""


def unreadable(counts: dict[str, Any]) -> str:
    """The first records of a source that cannot be read, and why, each reason once."""
    reasons: dict[str, list[str]] = {}
    for where, reason in counts["first"]:
        reasons.setdefault(reason, []).append(where)
    said = [f"{places[0]} {reason}{_likewise(places[1:])}" for reason, places in reasons.items()]
    return "; ".join(said) + ("; …" if counts["unreadable"] > len(counts["first"]) else "")


def _left_out(counts: dict[str, Any], report: dict[str, Any]) -> Iterator[str]:
    limit = f"data.seq_length_tokens = {report['seq_length']}"
    if count := counts["unreadable"]:
        yield f"{some(count, 'record is no conversation', 'records are no conversations')}: {unreadable(counts)}"
    if count := counts["disliked"]:
        yield (
            f"left out {some(count, 'conversation')} whose label says that the answer was not liked; `llm-parallel "
            "prefer` with method.kind=kto learns from these too"
        )
    if count := counts["nothing_trained"]:
        yield f"left out {some(count, 'conversation')} without an answer that is trained"
    if count := counts["too_long"]:
        yield f"left out {some(count, 'conversation')} that {'does' if count == 1 else 'do'} not fit {limit}"
    if count := counts["shortened"]:
        turns = some(counts["turns_cut"], "message")
        yield f"left out {turns} at the beginning of {some(count, 'conversation')} to fit {limit}"
    if count := counts["answers_cut"]:
        yield f"cut {some(count, 'answer')} at {limit}, where no stop is learned"
    if count := counts["merged"]:
        yield f"joined turns of the same role in {some(count, 'conversation')}, since the template refuses them"
    if count := counts["empty_answers"]:
        yield f"{some(count, 'conversation')} with an answer of nothing, which is trained to stop at once"
    if count := counts.get("others_weighted"):  # of a folder that an earlier version wrote there is none
        turns = some(count, "turn that is", "turns that are")
        yield f"{turns} not the assistant's and have a weight: only the assistant's are trained"
    if count := counts["calls_unwritten"]:
        what = some(count, "conversation has", "conversations have")
        yield f"{what} calls of tools, which the template does not write, so that the answer there is nothing; {HELP}"
    if count := counts["tools_unwritten"]:
        what = some(count, "conversation has", "conversations have")
        yield f"{what} a list of tools, which the template does not write; {HELP}"
