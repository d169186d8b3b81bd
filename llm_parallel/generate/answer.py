"""The text of an answer while its tokens come, and the stop strings that end it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from llm_parallel.data.tokenizer import Tokenizer
from llm_parallel.errors import UserError
from llm_parallel.generate.scheduler import Draft

HALF = "\ufffd"
"""What a tokenizer shows for a part of a character; the next token brings the rest."""
WINDOW = 32
"""Tokens that are decoded again with each new one. A tokenizer joins the bytes of a character over a few tokens, and
drops the space before the first token that it decodes; it looks no further."""


class _Text:
    """The text of tokens after a prompt. Decoding all of them for every token would take time that grows with the
    square of the length: what stands before a window is settled. ends: characters after each token."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], control: bool) -> None:
        self._tokenizer, self._control = tokenizer, control
        start = max(len(prompt) - WINDOW, 0)
        while start and self._decoded(prompt[start : start + WINDOW]).startswith(HALF):
            start -= 1  # it must not begin in the middle of a character
        self._context = list(prompt[start:])
        self._skipped = len(self._decoded(self._context))
        self._settled, self._window = "", list[int]()
        self.text, self.ends = "", list[int]()

    def _decoded(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), self._control)

    def add(self, tokens: Sequence[int]) -> None:
        """Takes further tokens, all in one if nobody asks where each of them ends."""
        self._window += tokens
        self.text = self._settled + self._decoded([*self._context, *self._window])[self._skipped :]
        self.ends += [len(self.text)] * len(tokens)
        if len(self._window) >= WINDOW and not self.text.endswith(HALF):
            self._settled, self._context, self._window = self.text, self._window, []
            self._skipped = len(self._decoded(self._context))

    def after(self, count: int) -> str:
        """The text of the first tokens."""
        return self.text[: self.ends[count - 1]] if count else ""


class Answer:
    """The tokens after one prompt and their text, which ends before the first stop string in it.

    A stop string is looked for twice: in the text as it is shown, and with the names of control tokens in it, so that
    ``<|im_end|>`` is found as well as a text that a control token interrupts. It is not looked for in the prompt.
    ``names``: control tokens are shown by their names. Raises UserError for an empty stop string.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = (), names: bool = False
    ) -> None:
        if not all(stops):
            raise UserError("a stop string is empty, which every answer would end at; give at least one character")
        self.tokens: list[int] = []
        self._stops = tuple(stops)
        self._shown = _Text(tokenizer, prompt, names)
        self._named = _Text(tokenizer, prompt, True) if stops else self._shown
        self._cut: str | None = None

    def add(self, token: int) -> bool:
        """Appends a token. Returns whether the answer has ended with it."""
        self.tokens.append(token)
        if not self._stops:
            return False
        self._shown.add([token])
        self._named.add([token])
        found = [self._shown.text[:place] for place in self._places(self._shown)]
        found += [self._before(place) for place in self._places(self._named)]
        self._cut = min(found, key=len, default=None)
        return self._cut is not None

    def _places(self, of: _Text) -> list[int]:
        """Where stop strings begin in a text. Before the last token none was complete."""
        longest = max(map(len, self._stops))
        start = max((of.ends[-2] if len(of.ends) > 1 else 0) - longest - WINDOW, 0)
        return [place for place in (of.text.find(stop, start) for stop in self._stops) if place >= 0]

    def _before(self, place: int) -> str:
        """The shown text before a place in the text with names of control tokens."""
        count = len(self._named.ends)
        while count and self._named.ends[count - 1] > place:
            count -= 1
        start = self._named.ends[count - 1] if count else 0
        return self._shown.after(count) + self._named.text[start:place]

    def text(self) -> str:
        """The whole text of the answer."""
        if self._cut is not None:
            return self._cut
        missing = self.tokens[len(self._shown.ends) :]
        if missing:
            self._shown.add(missing)
        return self._shown.text

    def certain(self) -> str:
        """The beginning of the text that no later token changes: without half of a character at its end, and without
        what may be the beginning of a stop string."""
        text = self.text()
        if self._cut is not None:
            return text
        if not self._stops:
            return text.rstrip(HALF)
        text, named = text.rstrip(HALF), self._named.text.rstrip(HALF)
        in_text, in_named = (max(_overlap(where, stop) for stop in self._stops) for where in (text, named))
        return min(text[: len(text) - in_text], self._before(len(named) - in_named), key=len).rstrip(HALF)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text with which a stop string begins."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


class StopStrings:
    """Says of an answer under way whether its last token completed one of its request's stop strings.

    tokenizer: None if no request has any.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._texts: weakref.WeakKeyDictionary[Draft, Answer] = weakref.WeakKeyDictionary()

    def __call__(self, draft: Draft) -> bool:
        assert self._tokenizer is not None
        text = self._texts.get(draft)
        if text is None:
            text = self._texts[draft] = Answer(self._tokenizer, draft.request.prompt, draft.request.stop)
        return text.add(draft.tokens[-1])
