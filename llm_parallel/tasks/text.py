"""Judges that compare an answer's text with what the record says is right."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from llm_parallel.tasks.base import Asked, Given, JudgeFailed, where_of

MINUS = "\u2212"
NUMBER = re.compile(r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+\u2212]?\.\d+")


def last_number(text: str) -> Decimal | None:
    """The last number of a text, with commas between thousands left out; None if it has none."""
    found = NUMBER.findall(text)
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", "").replace(MINUS, "-"))
    except InvalidOperation:
        return None


def right_ones(asked: Asked, field: str) -> list[str]:
    """The right answers as texts."""
    value = asked.field(field, "holds the right answer")
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not values or any(isinstance(one, (dict, list)) or one is None for one in values):
        raise JudgeFailed(f"{where_of(asked)} has {field} = {value!r}; it must be a text, a number or a list of these")
    return [str(one) for one in values]


@dataclass(frozen=True)
class Exact:
    """1 if the answer is one of the right ones, without blanks around it."""

    field: str

    def __call__(self, asked: Asked, given: Given) -> float:
        """See ``Judge``."""
        return float(given.text.strip() in [one.strip() for one in right_ones(asked, self.field)])


@dataclass(frozen=True)
class Contains:
    """1 if one of the right answers occurs in the answer."""

    field: str

    def __call__(self, asked: Asked, given: Given) -> float:
        """See ``Judge``."""
        return float(any(one.strip() in given.text for one in right_ones(asked, self.field)))


@dataclass(frozen=True)
class Number:
    """1 if the last number of the answer is the last one of a right answer, as numbers and not as texts."""

    field: str

    def __call__(self, asked: Asked, given: Given) -> float:
        """See ``Judge``."""
        wanted = [last_number(one) for one in right_ones(asked, self.field)]
        if None in wanted:
            raise JudgeFailed(f"{where_of(asked)} has {self.field} = {asked.fields[self.field]!r}, which has no number")
        return float(last_number(given.text) in wanted)


@dataclass(frozen=True)
class Regex:
    """1 if a regular expression is found in the answer. {name} stands for that field of the record as it is written."""

    pattern: str

    def __call__(self, asked: Asked, given: Given) -> float:
        """See ``Judge``."""
        return float(re.search(self.filled(asked), given.text) is not None)

    def filled(self, asked: Asked) -> str:
        """The expression with the record's fields in it. Raises JudgeFailed."""

        def value(found: re.Match[str]) -> str:
            return re.escape(str(asked.field(found[1], "the pattern names")))

        return re.sub(r"\{([A-Za-z_]\w*)\}", value, self.pattern)


@dataclass(frozen=True)
class FitsSchema:
    """1 if the answer, or what stands in a fenced block of it, is JSON that fits the record's schema."""

    field: str

    def __call__(self, asked: Asked, given: Given) -> float:
        """See ``Judge``."""
        import jsonschema

        schema = asked.field(self.field, "holds the JSON schema")
        if isinstance(schema, str):
            schema = _parsed_schema(schema, asked, self.field)
        found = re.search(r"```(?:json)?\s*\n(.*?)```", given.text, re.DOTALL)
        try:
            value: Any = json.loads(found[1] if found else given.text)
        except ValueError:
            return 0.0
        try:
            validator = jsonschema.validators.validator_for(schema)
            validator.check_schema(schema)
            return float(validator(schema).is_valid(value))
        except jsonschema.SchemaError as error:
            raise JudgeFailed(
                f"{where_of(asked)} has a field {self.field} that is no JSON schema: {error.message}"
            ) from None


def _parsed_schema(text: str, asked: Asked, field: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise JudgeFailed(f"{where_of(asked)} has a field {field} that is no JSON") from None


@dataclass(frozen=True)
class Length:
    """Minus the tokens over a limit, divided by it."""

    limit: int

    def __call__(self, asked: Asked, given: Given) -> float:
        """See ``Judge``."""
        return -max(given.tokens - self.limit, 0) / self.limit
