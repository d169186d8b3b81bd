"""What a model is going to see of its conversations: samples token by token, lengths, and how full samples are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llm_parallel.data.chat_data import ChatData, ChatSamples
from llm_parallel.data.chat_tokens import ChatTokenizer
from llm_parallel.data.group_data import GroupSamples

WINDOW = 6
"""Tokens before a token that are decoded with it, so that its leading blank and its part of a character are known."""
QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
BINS = 24


@dataclass(frozen=True)
class Piece:
    """Some tokens that make up whole characters: their text and ids, their weight as labels, and whether they are one
    special token, whose name the text is."""

    text: str
    ids: tuple[int, ...]
    weight: float
    special: bool = False


@dataclass(frozen=True)
class Shown:
    """One conversation of a sample: where it comes from, and its tokens."""

    source: str
    line: int
    pieces: list[Piece]
    tokens: int
    trained: int


@dataclass(frozen=True)
class Row:
    """One sample: its number, its conversations, and how many of its positions are padding."""

    number: int
    conversations: list[Shown]
    padding: int


@dataclass(frozen=True)
class Packing:
    """Samples of one epoch, tokens in them, conversations in the fullest and on average, and the share of positions
    that hold a conversation."""

    samples: int
    conversations: int
    most: int
    fill: float


def packing_of(samples: ChatSamples | GroupSamples, seq_length: int, lengths: NDArray[np.int64]) -> Packing:
    """How the conversations, of so many tokens, fill the samples of their first epoch."""
    plan = samples.packer.plan(0)
    per_sample = np.diff(plan.starts)
    used = int((lengths[plan.items] - 1).sum())
    fill = used / max(len(plan) * seq_length, 1)
    return Packing(len(plan), len(plan.items), int(per_sample.max(initial=0)), fill)


def quantiles(lengths: NDArray[np.int64]) -> list[int]:
    """Shortest, median, 90 %, 99 % and longest."""
    return [int(number) for number in np.quantile(lengths, QUANTILES, method="higher")]


def histogram(lengths: NDArray[np.int64], most: int) -> list[tuple[int, int, int]]:
    """(first length, last length, conversations) of bins of one width up to ``most`` tokens."""
    edges = np.unique(np.linspace(0, most, BINS + 1).round().astype(int))
    counts, _ = np.histogram(lengths, np.append(edges[:-1] + 1, edges[-1] + 1))
    return [(int(a) + 1, int(b), int(count)) for a, b, count in zip(edges, edges[1:], counts)]


def rows_of(data: ChatData, seed: int, count: int) -> Iterator[Row]:
    """The first samples of training."""
    samples = data.training(seed)
    for number in range(min(count, data.rows_per_epoch)):
        conversations = [shown(data, conversation) for conversation in samples.conversations(number)]
        used = sum(one.tokens - 1 for one in conversations)
        yield Row(number, conversations, data.report["seq_length"] - used)


def shown(data: ChatData, number: int) -> Shown:
    """A conversation as it is trained on."""
    ids, weights = data.conversation(number)
    weights = np.array(weights)
    weights[:1] = 0.0
    source = int(data.sources[number])
    return Shown(
        data.report["paths"][source],
        int(data.lines[number]) + 1,
        list(pieces_of(data.encoder.tokenizer, ids.tolist(), weights.tolist())),
        len(ids),
        int(np.count_nonzero(weights)),
    )


def pieces_of(tokenizer: ChatTokenizer, ids: list[int], weights: list[float]) -> Iterator[Piece]:
    """The text of each token, or of several of one weight that make up a character together."""
    begin = at = 0
    held: list[int] = []
    for place, number in enumerate(ids):
        name = tokenizer.name_of(number)
        if name is not None:
            if held:
                yield Piece(_text(tokenizer, ids, begin, at, place), tuple(held), weights[at])
            yield Piece(name, (number,), weights[place], special=True)
            held, begin, at = [], place + 1, place + 1
            continue
        if held and weights[place] != weights[at]:
            yield Piece(_text(tokenizer, ids, begin, at, place), tuple(held), weights[at])
            held, at = [], place
        held.append(number)
        text = _text(tokenizer, ids, begin, at, place + 1)
        if text and not text.endswith("\ufffd"):
            yield Piece(text, tuple(held), weights[at])
            held, at = [], place + 1
    if held:
        yield Piece(_text(tokenizer, ids, begin, at, len(ids)), tuple(held), weights[at])


def _text(tokenizer: ChatTokenizer, ids: list[int], begin: int, start: int, end: int) -> str:
    """Text of the tokens [start, end), of a part that begins at ``begin`` and has no special token."""
    first = max(begin, start - WINDOW)
    decode = tokenizer.tokenizer.decode
    before = decode(ids[first:start]) if start > first else ""
    return decode(ids[first:end])[len(before) :]
