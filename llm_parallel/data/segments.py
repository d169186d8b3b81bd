"""The settings under which a run's samples were drawn, one after the other: where each source stands follows from them.

A run whose data section is changed goes on in a new segment: sample n belongs to the last segment that begins at or
before n, and a source that an earlier segment read goes on where that left it. Checkpoints hold the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from llm_parallel.config.tree import DataConfig


@dataclass(frozen=True)
class SourceUse:
    """A source of a segment. Its file is known by its path and its numbers of documents and tokens, which are None
    where a checkpoint did not say them."""

    path: str
    weight: float
    documents: int | None = None
    tokens: int | None = None

    def same_file(self, other: SourceUse) -> bool:
        """Whether both read one file, as far as is known."""
        known = None not in (self.tokens, other.tokens)
        return self.path == other.path and (not known or self.counts == other.counts)

    def moved_from(self, other: SourceUse) -> bool:
        """Whether the other may have been the same file in another folder."""
        names = self.path.rsplit("/", 1)[-1], other.path.rsplit("/", 1)[-1]
        return self.tokens is not None and self.counts == other.counts and names[0] == names[1]

    @property
    def counts(self) -> tuple[int | None, int | None]:
        """Documents and tokens."""
        return self.documents, self.tokens


@dataclass(frozen=True)
class Segment:
    """Settings of the samples from number ``first`` on; held_out: share of the documents that training leaves out."""

    first: int
    seed: int
    seq_length_tokens: int
    held_out: float
    sources: tuple[SourceUse, ...]

    @classmethod
    def of(cls, data: DataConfig, seed: int, first: int = 0) -> Segment:
        """The segment that a configuration describes."""
        sources = tuple(SourceUse(source.path, source.weight) for source in data.train)
        return cls(first, seed, data.seq_length_tokens, 0.0 if data.eval else data.eval_fraction, sources)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Segment:
        """What ``record`` is. Raises KeyError and TypeError if it is damaged."""
        return cls(**{**record, "sources": tuple(SourceUse(*source) for source in record["sources"])})

    @cached_property
    def record(self) -> dict[str, Any]:
        """For JSON; short and made once, since a run may have thousands of sources and copies this after every step."""
        sources = [[use.path, use.weight, use.documents, use.tokens] for use in self.sources]
        return {**{item.name: getattr(self, item.name) for item in fields(self)}, "sources": sources}

    def same_samples(self, other: Segment) -> bool:
        """Whether samples are drawn in the same way from both."""
        mine, theirs = (replace(segment, first=0, sources=()) for segment in (self, other))
        if mine != theirs or len(self.sources) != len(other.sources):
            return False
        pairs = list(zip(self.sources, other.sources))
        return all(one.weight == two.weight and (one.same_file(two) or one.moved_from(two)) for one, two in pairs)


def tokens_read(history: Sequence[Segment], consumed: int) -> int:
    """Tokens of the first ``consumed`` samples."""
    ends = [*(segment.first for segment in history[1:]), consumed]
    return sum((end - one.first) * one.seq_length_tokens for one, end in zip(history, ends))


def continued(history: Sequence[Segment], now: Segment) -> tuple[Segment, ...]:
    """``history`` for a run that draws its samples from number ``now.first`` on as ``now`` says."""
    kept = [segment for segment in history if segment.first < now.first]
    if not kept:
        return (replace(now, first=0),)
    return (*kept[:-1], replace(now, first=kept[-1].first)) if now.same_samples(kept[-1]) else (*kept, now)


def identities(history: Sequence[Segment]) -> list[list[int]]:
    """A number for each source of each segment that is the same where they read the same file. A file that is listed
    twice has two numbers, in the order of the lists. A file that is in another folder is known by its name and counts.
    """
    known: list[SourceUse] = []
    found: list[list[int]] = []
    for segment in history:
        free = list(range(len(known)))
        numbers = [-1] * len(segment.sources)
        for same in (SourceUse.same_file, SourceUse.moved_from):
            for place, source in enumerate(segment.sources):
                match = next((number for number in free if same(source, known[number])), None)
                if numbers[place] < 0 and match is not None:
                    numbers[place] = match
                    free.remove(match)
        for place, source in enumerate(segment.sources):
            if numbers[place] < 0:
                numbers[place] = len(known)
                known.append(source)
            known[numbers[place]] = source
        found.append(numbers)
    return found
