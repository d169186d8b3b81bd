"""What preferences are recorded of: a prompt with its answers, and how good each of them is.

Every record of preferences becomes a ``Group``: a pair of a chosen and a rejected answer, one answer that a person
liked or not, answers in the order in which they were ranked, or answers with scores. ``FORMS`` says what each
method makes of them, so that the same records serve all methods.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_parallel.data.formats import BadRecord, Conversation

GOOD, BAD = 1.0, 0.0
"""Scores of answers that were chosen or liked, and of those that were not."""
Messages = tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Answer:
    """What the assistant answered: ``messages`` (usually one of the role ``assistant``; with calls of tools, several),
    and its ``score``, of which more is better: ``GOOD`` or ``BAD`` where the record says no more."""

    messages: Messages
    score: float


@dataclass(frozen=True)
class Group:
    """One prompt and at least one answer to it.

    prompt: the messages before the answers, of which nothing is trained, also not the assistant's earlier turns;
    answers: in the order of the record, their scores comparable within the group; tools: what the assistant may call;
    labelled: whether scores are ``GOOD`` and ``BAD`` as a record said of each answer by itself, or of a chosen and a
    rejected one; facts: other numbers of the record by name, such as ``margin``."""

    prompt: Messages
    answers: tuple[Answer, ...]
    tools: list[Any] | None = None
    labelled: bool = True
    facts: Mapping[str, float] = field(default_factory=dict)

    def conversations(self) -> Iterator[Conversation]:
        """The prompt with each answer; only the answer's messages of the role ``assistant`` are trained."""
        for answer in self.answers:
            trained = [float(message["role"] == "assistant") for message in answer.messages]
            yield Conversation([*self.prompt, *answer.messages], [0.0] * len(self.prompt) + trained, self.tools)


def common_messages(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Number of messages that two conversations begin with alike, the last of each left aside."""
    count = 0
    for mine, theirs in zip(one[:-1], other[:-1]):
        if mine != theirs:
            break
        count += 1
    return count


def check_group(group: Group) -> None:
    """Raises BadRecord for a group of which nothing can be learned."""
    if not group.prompt:
        raise BadRecord("has no prompt before its answers")
    if not group.answers:
        raise BadRecord("has no answers")
    for answer in group.answers:
        if not any(message["role"] == "assistant" for message in answer.messages):
            raise BadRecord("has an answer without a turn of the assistant")
        if not math.isfinite(answer.score):
            raise BadRecord(f"has an answer with the score {answer.score}")
    texts = [answer.messages for answer in group.answers]
    if len(group.answers) > 1 and all(text == texts[0] for text in texts):
        raise BadRecord("has answers that are all the same, of which nothing can be learned")


def pairs_of(group: Group) -> Iterator[Group]:
    """Pairs of a better and a worse answer of a group, the better one first: the best with the worst, the second best
    with the second worst, and so on, as long as the scores differ. Answers with the same score keep their order."""
    order = sorted(range(len(group.answers)), key=lambda number: -group.answers[number].score)
    for better, worse in zip(order, reversed(order)):
        one, other = group.answers[better], group.answers[worse]
        if one.score > other.score and one.messages != other.messages:
            yield Group(group.prompt, (one, other), group.tools, group.labelled, group.facts)


def singles_of(group: Group) -> Iterator[Group]:
    """Every answer of a group by itself, liked or not: as its record said, and where answers have scores of another
    kind, liked if it is above their mean; an answer at the mean is neither, and left out."""
    mean = sum(answer.score for answer in group.answers) / len(group.answers)
    for answer in group.answers:
        if group.labelled:
            liked = answer.score > (GOOD + BAD) / 2
        elif answer.score == mean:
            continue
        else:
            liked = answer.score > mean
        yield Group(group.prompt, (Answer(answer.messages, GOOD if liked else BAD),), group.tools, True, group.facts)


def rankings_of(group: Group) -> Iterator[Group]:
    """The group itself, if some answers are better than others."""
    scores = [answer.score for answer in group.answers]
    if min(scores) < max(scores):
        yield group


FORMS = {"dpo": pairs_of, "reward": pairs_of, "kto": singles_of, "rrhf": rankings_of}
"""What a method makes of a group."""
