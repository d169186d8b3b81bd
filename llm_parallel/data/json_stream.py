"""JSON values out of a stream of text: arrays, and objects that follow each other, without the whole in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from llm_parallel.data.containers import Damaged

MAX_VALUE_CHARACTERS = 256 << 20
MARGIN = 12
"""A value that is cut off fails this near the end of the text at most (``-Infinity`` is the longest literal)."""
BETWEEN = re.compile(r"[\s,\x1e]*")
"""What may stand between two values: white space, commas, and the record separator of JSON text sequences."""
DIGITS = re.compile(r"[-+.eE0-9]*")
DECODER = json.JSONDecoder()


def repeated(pairs: list[tuple[str, Any]]) -> str | None:
    """What is wrong with the fields of a JSON object if two of one name have different values, else None: which of them
    is meant is not known, and ``json`` takes the last."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found and found[name] != value:
            return f"has the field {name!r} twice, with different values"
        found[name] = value
    return None


def is_cut(error: json.JSONDecodeError, text: str) -> bool:
    """Whether a value failed to parse because ``text`` ends within it."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - MARGIN


class JsonStream:
    """Iterates over (place, value) of the records in a stream of UTF-8: every value, and for an array at the top each
    of its elements. Bytes that are not UTF-8 become lone surrogates, so that only their record is lost. ``bad`` is
    called with the place and the reason of a record in which a field is repeated.

    Raises Damaged at the first place that is not JSON: where the next record begins is not known from there on.
    """

    def __init__(self, content: Iterator[bytes], bad: Callable[[str, str], None]) -> None:
        self._content, self._bad = content, bad
        self._wrong: str | None = None
        self._json = json.JSONDecoder(object_pairs_hook=self._object)
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text, self._at, self._line, self._ended = "", 0, 1, False

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        record, in_array = 0, False
        while True:
            self._skip()
            if self._at == len(self._text):
                if in_array:
                    reason = f"ends within a JSON array of which {record:,} elements were read"
                    raise Damaged(reason, f"line {self._line}")
                return
            mark = self._text[self._at]
            if mark == "[" and not in_array:
                in_array = True
                self._at += 1
            elif mark == "]" and in_array:
                in_array = False
                self._at += 1
            else:
                record += 1
                place = f"line {self._line} (record {record})"
                value = self._value(record)
                if self._wrong is None:
                    yield place, value
                else:
                    self._bad(place, self._wrong)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs) and self._wrong is None:
            self._wrong = repeated(pairs)
        return found

    def _skip(self) -> None:
        """Goes on to the next value, reading as much as that takes."""
        while True:
            end = BETWEEN.match(self._text, self._at).end()  # type: ignore[union-attr]
            self._advance(end)
            if end < len(self._text) or not self._read(1):
                return

    def _value(self, record: int) -> Any:
        while True:
            self._wrong = None
            try:
                value, end = self._json.raw_decode(self._text, self._at)
                # A number at the end of the text may go on: "1." may become "1.5".
                if DIGITS.match(self._text, end).end() < len(self._text) or not self._read(1):  # type: ignore[union-attr]
                    self._advance(end)
                    return value
            except json.JSONDecodeError as error:
                held = len(self._text) - self._at
                if is_cut(error, self._text) and held < MAX_VALUE_CHARACTERS and self._read(held):
                    continue
                line = self._line + self._text.count("\n", self._at, error.pos)
                what = "is over 256 MiB large" if held >= MAX_VALUE_CHARACTERS else f"is not JSON ({error.msg})"
                raise Damaged(f"{what}; nothing after it was read", f"line {line} (record {record})") from None
            except (RecursionError, ValueError) as error:
                what = (
                    "is nested too deeply"
                    if isinstance(error, RecursionError)
                    else f"is not read ({str(error).partition(';')[0]})"
                )
                place = f"line {self._line} (record {record})"
                raise Damaged(f"{what}; nothing after it was read", place) from None

    def _advance(self, end: int) -> None:
        self._line += self._text.count("\n", self._at, end)
        self._at = end

    def _read(self, least: int) -> bool:
        """Appends ``least`` characters or more, unless the stream ends first, and forgets what was read. Returns
        whether there was anything. Reading as much again as is held keeps the work linear in a value's length."""
        parts = [self._text[self._at :]]
        more = 0
        while more < least and not self._ended:
            block = next(self._content, None)
            self._ended = block is None
            parts.append(self._decoder.decode(block or b"", final=self._ended))
            more += len(parts[-1])
        self._text, self._at = "".join(parts), 0
        return more > 0
