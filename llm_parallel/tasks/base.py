"""What a judge is: it gives a number to an answer. The same judges reward training and measure models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llm_parallel.errors import UserError


class JudgeFailed(UserError):
    """A judge raised, gave no number, or cannot judge a record. An answer that could not be judged has no score; it
    never counts as a bad one."""


@dataclass(frozen=True)
class Asked:
    """What an answer answers. messages: the prompt; fields: the whole record, which may hold the right answer; where:
    the record's file and line, for sentences about it."""

    messages: Sequence[Mapping[str, Any]]
    fields: Mapping[str, Any]
    where: str = "the record"

    def field(self, name: str, why: str) -> Any:
        """A field of the record. Raises JudgeFailed if it has none of this name."""
        value = self.fields.get(name)
        if value is None:
            raise JudgeFailed(
                f"{where_of(self)} has no field {name!r}, which {why}; its fields are "
                f"{', '.join(map(repr, self.fields)) or 'none'}"
            )
        return value


def where_of(asked: Asked) -> str:
    """How a sentence names a record."""
    return asked.where


@dataclass(frozen=True)
class Given:
    """An answer. text: without control tokens; tokens: how many there are; complete: whether the model ended it;
    values: what the reward models of a run say of it, by the number of the judge."""

    text: str
    tokens: int
    complete: bool = True
    values: Mapping[int, float] = field(default_factory=dict)


class Judge(Protocol):
    """Gives an answer a number, of which more is better. Raises JudgeFailed."""

    def __call__(self, asked: Asked, given: Given) -> float: ...
