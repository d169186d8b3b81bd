"""From prompts to answers, for the routes that generate."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_parallel.errors import UserError
from llm_parallel.generate.draw import Choice
from llm_parallel.generate.requests import Finished, Reason, Request, TopTokens
from llm_parallel.serve.driver import Batch, Driver
from llm_parallel.serve.errors import ApiError, wrong
from llm_parallel.serve.models import Names, Served
from llm_parallel.serve.writer import Piece, Writer


@dataclass
class Answers:
    """The answers to one HTTP request. writers: by number of the prompt and of the sample; scores, embeddings: what was
    wanted of the prompts themselves, by their numbers; names_in_text: texts show control tokens by their names."""

    batch: Batch
    served: Served
    names: Names
    names_in_text: bool = False
    writers: dict[tuple[int, int], Writer] = field(init=False)
    scores: dict[int, tuple[tuple[float, TopTokens], ...]] = field(default_factory=dict)
    embeddings: dict[int, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        requests = enumerate(self.batch.requests)
        self.writers = {
            (place, sample): Writer(self.served.tokenizer, request, self.names_in_text)
            for place, request in requests
            for sample in range(request.n)
        }

    async def pieces(self) -> AsyncIterator[tuple[int, int, Piece]]:
        """Number of the prompt and of the sample, and what the answer has more. Raises ApiError if the server fails or
        ends before all are complete."""
        while self.batch.left:
            place, sample, what = await self.batch.next()
            if isinstance(what, ApiError):
                raise what
            if not isinstance(what, Choice) and what.reason is Reason.CANCELLED:
                raise ApiError(503, "the server is ending and has given up the answer; ask again", code="server_ending")
            if isinstance(what, Finished) and sample == 0:
                self.scores[place], self.embeddings[place] = what.prompt_scores, what.embedding
            piece = self.writers[place, sample].take(what)
            if piece is not None:
                yield place, sample, piece

    async def whole(self) -> dict[tuple[int, int], Piece]:
        """All answers, each in one piece."""
        found: dict[tuple[int, int], Piece] = {}
        async for place, sample, piece in self.pieces():
            before = found.get((place, sample), Piece(""))
            joined = Piece(before.text + piece.text, before.choices + piece.choices, piece.reason)
            found[place, sample] = joined
        return found

    def prompt_text(self, place: int) -> str:
        """The text of a prompt."""
        return self.served.tokenizer.decode(list(self.batch.requests[place].prompt))

    def prompt_choices(self, place: int) -> list[Choice]:
        """The tokens of a prompt with their log-probabilities, for which it has asked; 0 for the first."""
        prompt, scores = self.batch.requests[place].prompt, self.scores[place]
        return [Choice(prompt[0], 0.0), *(Choice(token, *score) for token, score in zip(prompt[1:], scores))]

    def usage(self, with_answers: bool = True) -> dict[str, Any]:
        """Tokens of all prompts and answers so far."""
        prompt = sum(len(request.prompt) for request in self.batch.requests)
        written = sum(writer.num_tokens for writer in self.writers.values()) if with_answers else 0
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def entry(self, choice: Choice) -> dict[str, Any]:
        """A token with its log-probability, and the likeliest ones, as conversations give them."""
        tops = [self._named(token, log_prob) for token, log_prob in choice.top]
        return {**self._named(choice.token, choice.log_prob), "top_logprobs": tops}

    def _named(self, token: int, log_prob: float) -> dict[str, Any]:
        text, held = self.names.of(token)
        return {"token": text, "logprob": max(log_prob, -9999.0), "bytes": held}


@dataclass(frozen=True)
class Service:
    """What the routes stand on."""

    served: Served
    driver: Driver
    names: Names

    async def ask(self, requests: Sequence[Request], streams: bool, names: bool = False) -> Answers:
        """Hands requests to the generator. Raises ApiError if the queue is full, or for a structure that cannot be
        enforced. ``names``: texts show control tokens by their names."""
        requests = await asyncio.to_thread(self._checked, requests)
        return Answers(self.driver.submit(requests, streams), self.served, self.names, names)

    def _checked(self, requests: Sequence[Request]) -> list[Request]:
        """Refused here, since the generator's thread has nobody to tell; a grammar may take seconds to compile."""
        try:
            return [self.driver.generator.checked(request) for request in requests]
        except UserError as error:
            raise wrong(str(error)) from None


def head(kind: str, prefix: str, model: str) -> dict[str, Any]:
    """What every answer and every chunk of it begins with."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
