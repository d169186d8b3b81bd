"""Records of preferences as tokens: every answer of a group with its prompt, and what became of all records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_parallel.config.tree import RunConfig
from llm_parallel.data.chat import ChatEncoder, ChatTokens, heads_of, holds_private
from llm_parallel.data.chat_counts import Counts, records_of, some, unreadable
from llm_parallel.data.chat_rows import refuse_stop
from llm_parallel.data.dataset_info import Opened
from llm_parallel.data.formats import BadRecord, Conversation
from llm_parallel.data.groups import FORMS, Group
from llm_parallel.data.preference import PreferenceReader
from llm_parallel.data.readers import Row
from llm_parallel.data.template import Refused
from llm_parallel.errors import UserError


@dataclass
class GroupCounts(Counts):
    """Counts of one source of preferences: ``kept`` answers in ``groups`` (pairs, rankings or single answers), records
    of which the method can make nothing (``uncompared``), such as answers that are equally good, and groups whose
    answers are the same tokens once the template has written them (``alike``)."""

    groups: int = 0
    uncompared: int = 0
    alike: int = 0

    def why_empty(self, seq_length: int) -> str:
        """The end of a sentence about a source of which nothing is kept."""
        if not self.records or self.unreadable == self.records:
            return super().why_empty(seq_length).replace("conversations", "preferences")
        reasons = []
        if self.unreadable:
            reasons.append(f"{self.unreadable} cannot be read ({' '.join(self.first[0])})")
        if self.uncompared:
            kto = "; method.kind=kto learns from labels" if "answers with a label" in self.formats else ""
            reasons.append(f"{self.uncompared} have no answer that is better than another{kto}")
        if self.alike:
            reasons.append(f"{self.alike} have answers that are the same tokens once the template has written them")
        if self.too_long:
            reasons.append(f"{self.too_long} do not fit data.seq_length_tokens = {seq_length}")
        return f"has nothing to train on: of {self.records} records {', '.join(reasons)}"


@dataclass(frozen=True)
class GroupTokens:
    """Tokens of a group's answers, each after the prompt, with weights on the answer only; the answers' scores, and the
    group's margin."""

    answers: tuple[ChatTokens, ...]
    scores: tuple[float, ...]
    margin: float


@dataclass
class GroupBlock:
    """Number in the source and tokens of each group that is kept, and what became of all records."""

    kept: list[tuple[int, GroupTokens]] = field(default_factory=list)
    counts: Counts = field(default_factory=GroupCounts)


def encode_groups(source: Opened, config: RunConfig, encoder: ChatEncoder, block: Sequence[tuple[int, Row]]) -> Any:
    """Encodes some records as the run's method needs them. Raises UserError on one that the template refuses."""
    reader = PreferenceReader(source.format, source.columns, source.roles)
    found, form = GroupBlock(), FORMS[config.trains]
    counts = found.counts
    assert isinstance(counts, GroupCounts)
    for number, row in block:
        counts.records += 1
        try:
            record = reader.read(row.value)
            if any(holds_private(one) for one in record.conversations()):
                raise BadRecord("holds characters of Unicode's last private range (U+100000 to U+10FFFF)")
        except BadRecord as error:
            counts.broken(row.where, str(error))
            continue
        groups = list(form(record))
        counts.uncompared += not groups
        for group in groups:
            try:
                tokens = encode_group(group, config, encoder)
            except Refused as error:
                raise UserError(
                    f"the chat template ({encoder.template.origin}) refuses {row.where}: {error}; mend or remove that "
                    "record, or give another chat.template"
                ) from None
            if tokens is None:
                counts.too_long += 1
                continue
            if are_alike(tokens):
                counts.alike += 1
                continue
            counts.groups += 1
            for answer, conversation in zip(tokens.answers, group.conversations()):
                counts.add(answer, conversation, encoder)
                if int(answer.ids[-1]) not in encoder.stops:
                    refuse_stop(encoder, answer, row.where)
            found.kept.append((number, tokens))
    counts.formats = reader.found
    return found


def encode_group(group: Group, config: RunConfig, encoder: ChatEncoder) -> GroupTokens | None:
    """Tokens of a group. Where they do not fit a sample together, the prompt's earliest turns are left out, of all
    answers alike, if ``chat.too_long`` is ``cut``; answers are never cut, since where they end is part of what is
    compared. None if nothing fits. Raises Refused."""
    size, last = config.data.seq_length_tokens, int(config.trains == "reward")
    heads = heads_of(group.prompt) if config.chat.too_long == "cut" else [0]
    first = heads[0]
    for head in heads:
        shorter = [conversation.without(first, head) for conversation in group.conversations()]
        tokens = [_whole(encoder, conversation, head - first) for conversation in shorter]
        kept = tuple(one for one in tokens if one is not None)
        if len(kept) == len(tokens) and sum(len(one.ids) - 1 + last for one in kept) <= size:
            scores = tuple(answer.score for answer in group.answers)
            return GroupTokens(kept, scores, float(group.facts.get("margin", 0.0)))
    return None


def are_alike(group: GroupTokens) -> bool:
    """Whether all answers that are compared are the same tokens: a template may leave out what they differ in, such as
    blanks at an answer's end."""
    first = group.answers[0].ids
    return len(group.answers) > 1 and all(np.array_equal(first, one.ids) for one in group.answers[1:])


def _whole(encoder: ChatEncoder, conversation: Conversation, cut: int) -> ChatTokens | None:
    tokens = encoder.encode_within(conversation, np.iinfo(np.int32).max, cut=False)
    return None if tokens is None else ChatTokens(tokens.ids, tokens.weights, cut, merged=tokens.merged)


def prompt_length(weights: NDArray[np.float32]) -> int:
    """Number of tokens before the first one that is trained."""
    return int(np.argmax(weights != 0))


def described_groups(report: dict[str, Any]) -> Iterator[str]:
    """Sentences about prepared preferences, each complete in itself."""
    stop, unit = report["stop_names"][0], UNITS[report["method"]]
    yield f"conversations are written by {report['template_origin']}; answers end with {stop}"
    yield from report["remarks"]
    for number, (path, counts) in enumerate(zip(report["paths"], report["counts"])):
        yield (
            f"{path}: {some(counts['groups'], unit)} of {records_of(report, number)}, "
            f"{some(counts['tokens'], 'token')}, of which {counts['trained']:,} are those of answers"
        )
        yield from (f"{path}: {text}" for text in _left_out(counts, report, unit))


UNITS = {"dpo": "pair", "reward": "pair", "kto": "answer", "rrhf": "ranking"}
"""What a group is, by method."""


def _left_out(counts: dict[str, Any], report: dict[str, Any], unit: str) -> Iterator[str]:
    limit = f"data.seq_length_tokens = {report['seq_length']}"
    if count := counts["unreadable"]:
        yield f"{some(count, 'record is no preference', 'records are no preferences')}: {unreadable(counts)}"
    if count := counts["uncompared"]:
        yield f"left out {some(count, 'record')} in which no answer is better than another"
    if count := counts["alike"]:
        yield f"left out {some(count, unit)} whose answers are the same tokens once the template has written them"
    if count := counts["too_long"]:
        yield f"left out {some(count, unit)} that {'does' if count == 1 else 'do'} not fit {limit}"
    if count := counts["shortened"]:
        turns = some(counts["turns_cut"], "message")
        yield f"left out {turns} at the beginning of the prompts of {some(count, 'answer')} to fit {limit}"
    if count := counts["merged"]:
        yield f"joined turns of the same role in {some(count, 'conversation')}, since the template refuses them"
    if count := counts["empty_answers"]:
        yield f"{some(count, 'answer')} of nothing but the token that stops it"
