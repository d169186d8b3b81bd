"""Turns the tokens of one answer into text and log-probabilities as they come, the same whether streamed or whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from llm_parallel.data.tokenizer import Tokenizer
from llm_parallel.generate.answer import Answer
from llm_parallel.generate.draw import Choice
from llm_parallel.generate.requests import Finished, Reason, Request


@dataclass(frozen=True)
class Piece:
    """What an answer has more since the last piece. choices: its tokens, without the one that ended it; reason: why it
    ended, None while it goes on."""

    text: str
    choices: tuple[Choice, ...] = ()
    reason: Reason | None = None


@dataclass
class Writer:
    """One answer. A stop string, or the beginning of one, is never part of a piece.
    names: control tokens are shown by their names."""

    tokenizer: Tokenizer
    request: Request
    names: bool = False
    _answer: Answer = field(init=False)
    _shown: int = 0
    _taken: int = 0
    _choices: list[Choice] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._answer = Answer(self.tokenizer, self.request.prompt, self.request.stop, self.names)

    @property
    def num_tokens(self) -> int:
        """Tokens so far, with the one that ended the answer."""
        return self._taken

    def take(self, what: Choice | Finished) -> Piece | None:
        """The next piece, None while there is nothing to show."""
        if isinstance(what, Choice):
            self._add(what)
            text = self._answer.certain()
            return self._piece(text, None) if len(text) > self._shown else None
        top = what.top or ((),) * len(what.tokens)
        for token, log_prob, likeliest in list(zip(what.tokens, what.log_probs, top))[self._taken :]:
            self._add(Choice(token, log_prob, likeliest))
        return self._piece(self._answer.text(), what.reason)

    def _add(self, choice: Choice) -> None:
        self._taken += 1
        if choice.token not in self.request.ends:
            self._answer.add(choice.token)
            self._choices.append(choice)

    def _piece(self, text: str, reason: Reason | None) -> Piece:
        piece = Piece(text[self._shown :], tuple(self._choices), reason)
        self._shown = max(len(text), self._shown)
        self._choices.clear()
        return piece
