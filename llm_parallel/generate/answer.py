"""The text of an answer while its tokens come, and the stop strings that end it."""

from __future__ import annotations

from collections.abc import Sequence

from llm_parallel.data.tokenizer import Tokenizer
from llm_parallel.errors import UserError

HALF = "\ufffd"
"""What a tokenizer shows for a part of a character; the next token brings the rest."""


class Answer:
    """The tokens after one prompt and their text, which ends before the first stop string in it.

    A stop string is looked for twice: in the text as it is shown, and with the names of control tokens in it, so that
    ``<|im_end|>`` is found as well as a text that a control token interrupts. It is not looked for in the prompt.
    Raises UserError for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        if not all(stops):
            raise UserError("a stop string is empty, which every answer would end at; give at least one character")
        self.tokens: list[int] = []
        self._tokenizer, self._prompt, self._stops = tokenizer, list(prompt), tuple(stops)
        self._skipped = {control: len(self._decoded(0, control)) for control in (False, True)}
        self._cut: str | None = None

    def _decoded(self, count: int, control: bool) -> str:
        return self._tokenizer.decode([*self._prompt, *self.tokens[:count]], control)

    def _text(self, count: int, control: bool = False) -> str:
        """Text of the first ``count`` tokens. A tokenizer drops the space before the first token that it decodes, so
        the prompt is decoded with them."""
        return self._decoded(count, control)[self._skipped[control] :]

    def add(self, token: int) -> bool:
        """Appends a token. Returns whether the answer has ended with it."""
        self.tokens.append(token)
        if not self._stops:
            return False
        shown, named = self._text(len(self.tokens)), self._text(len(self.tokens), control=True)
        found = [shown[:place] for place in self._places(shown)] + [
            self._before(place) for place in self._places(named)
        ]
        self._cut = min(found, key=len, default=None)
        return self._cut is not None

    def _places(self, text: str) -> list[int]:
        """Where stop strings begin in a text."""
        return [place for place in map(text.find, self._stops) if place >= 0]

    def _before(self, place: int) -> str:
        """The shown text before a place in the text with names of control tokens."""
        count = len(self.tokens)
        while count and len(self._text(count, control=True)) > place:
            count -= 1
        within = self._text(count + 1, control=True)[len(self._text(count, control=True)) : place]
        return self._text(count) + within

    def text(self) -> str:
        """The whole text of the answer."""
        return self._text(len(self.tokens)) if self._cut is None else self._cut

    def certain(self) -> str:
        """The beginning of the text that no later token changes: without half of a character at its end, and without
        what may be the beginning of a stop string."""
        text = self.text()
        if self._cut is not None:
            return text
        if self._stops:
            named = self._text(len(self.tokens), control=True)
            in_text, in_named = (max(_overlap(where, stop) for stop in self._stops) for where in (text, named))
            text = min(text[: len(text) - in_text], self._before(len(named) - in_named), key=len)
        return text.rstrip(HALF) if text.endswith(HALF) else text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text with which a stop string begins."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
