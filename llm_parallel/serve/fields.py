"""Reads the fields of a request's body, one kind of value after the other, and knows which were never asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from llm_parallel.serve.errors import shown, wrong


def parse_body(content: bytes) -> dict[str, Any]:
    """The object in a request's body. Raises ApiError for anything else than one JSON object of finite numbers."""
    try:
        body = json.loads(content, parse_constant=_refuse_constant)
    except RecursionError:
        raise wrong("the body is nested too deeply; give a flat JSON object") from None
    except UnicodeDecodeError:
        raise wrong("the body is not UTF-8; send a JSON object in UTF-8") from None
    except ValueError as error:
        raise wrong(f"the body is not JSON ({str(error)[:120]}); send a JSON object") from None
    if not isinstance(body, dict):
        raise wrong(f"the body is {shown(body)}; it must be a JSON object")
    return body


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


class Fields:
    """An object of a request. ``null`` counts as not given. ``within``: what stands before a field's name in errors."""

    def __init__(self, values: dict[str, Any], within: str = "") -> None:
        self._values, self._within = values, within
        self._asked: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether a field is given."""
        self._asked.add(name)
        return self._values.get(name) is not None

    def raw(self, name: str) -> Any:
        """A field as it is, None if it is not given."""
        self._asked.add(name)
        return self._values.get(name)

    def unknown(self, also_known: Sequence[str] = ()) -> list[str]:
        """Names of given fields that nothing has asked for."""
        return [name for name in self._values if name not in self._asked and name not in also_known]

    def named(self, name: str) -> str:
        """A field's name as errors give it."""
        return f"{self._within}{name}"

    def fault(self, name: str, must_be: str) -> Exception:
        """The error of a field whose value is not what it must be."""
        full = self.named(name)
        return wrong(f"{full} is {shown(self._values.get(name))}; it must be {must_be}", full)

    def whole(self, name: str, default: Any, low: int, high: int) -> Any:
        """A whole number from ``low`` to ``high``."""
        if not self.has(name):
            return default
        value = self._values[name]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            raise self.fault(name, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number from ``low`` to ``high``."""
        if not self.has(name):
            return default
        value = self._values[name]
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            raise self.fault(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        if not self.has(name):
            return default
        value = self._values[name]
        if type(value) is not bool:
            raise self.fault(name, "true or false")
        return value

    def text(self, name: str, default: Any = None) -> Any:
        """A text that can be written as UTF-8."""
        if not self.has(name):
            return default
        value = self._values[name]
        if not isinstance(value, str):
            raise self.fault(name, "a text")
        return checked_text(value, self.named(name))

    def choice(self, name: str, default: Any, allowed: Sequence[str]) -> Any:
        """One of a few texts."""
        if not self.has(name):
            return default
        value = self._values[name]
        if value not in allowed:
            raise self.fault(name, f"one of {', '.join(allowed)}")
        return value

    def inner(self, name: str) -> Fields | None:
        """An object within this one."""
        if not self.has(name):
            return None
        value = self._values[name]
        if not isinstance(value, dict):
            raise self.fault(name, "an object")
        return Fields(value, f"{self.named(name)}.")

    def items(self, name: str) -> list[Any]:
        """A list, empty if it is not given."""
        if not self.has(name):
            return []
        value = self._values[name]
        if not isinstance(value, list):
            raise self.fault(name, "a list")
        return value

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A text that is not empty, or a list of such."""
        if not self.has(name):
            return ()
        value = self._values[name]
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or len(found) > most or not all(isinstance(x, str) and x for x in found):
            raise self.fault(name, f"a text or a list of at most {most} texts, none of them empty")
        return tuple(checked_text(text, self.named(name)) for text in found)


def checked_text(text: str, name: str) -> str:
    """A text as it is. Raises ApiError if it holds half of a UTF-16 pair, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise wrong(
            f"{name} has half of a surrogate pair at character {error.start}; send whole characters", name
        ) from None
    return text
