"""What a generator is asked for, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from llm_parallel.errors import UserError
from llm_parallel.generate.sampling import GREEDY, Sampling
from llm_parallel.generate.structure import Structure


@dataclass(frozen=True)
class Request:
    """One prompt, to be answered ``n`` times.

    number: the request's name, different from those of all other requests in work; prompt: token ids; ends: tokens that
    end an answer and belong to it; stop: texts that end an answer with the token that completes them; priority: higher
    ones go first and may interrupt lower ones; stream: the number that draws depend on beside the seed, ``number`` if
    not given; structure: the form that answers have, which ends where it is complete (by one of ``ends``, or by the
    tokenizer's end-of-document token if there are none); prompt_log_probs: how many of the likeliest tokens are wanted
    at each place of the prompt, with the log-probabilities of its own tokens, None for none of it; scores_from: the
    first place of the prompt where they are wanted, before which pages are shared; candidates: tokens whose
    log-probabilities as the one after the prompt are wanted, with ``max_new_tokens`` 1 (the likeliest token is the
    answer); embeds: whether the mean of the prompt's hidden states is wanted; adapter: the adapters on the model that
    answer, by their name, None for the model without any; best_of: answers that are made, of which the ``n`` with the
    highest mean log-probability are given, the best first; ``n`` if not given.
    """

    number: int
    prompt: tuple[int, ...]
    sampling: Sampling = GREEDY
    ends: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    n: int = 1
    priority: int = 0
    stream: int | None = None
    structure: Structure | None = None
    prompt_log_probs: int | None = None
    scores_from: int = 1
    candidates: tuple[int, ...] = ()
    embeds: bool = False
    adapter: str | None = None
    best_of: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UserError(f"prompt {self.number} is empty; give at least one token")
        if self.n < 1:
            raise UserError(f"n of prompt {self.number} is {self.n}; it must be at least 1")
        if self.best_of is not None and self.best_of < self.n:
            raise UserError(
                f"best_of of prompt {self.number} is {self.best_of} and n is {self.n}; it must be at least n"
            )
        if "" in self.stop:
            raise UserError(f"stop of prompt {self.number} has an empty text; leave it out")
        assert self.scores_from >= 1, "nothing predicts the first token"
        assert not self.candidates or self.sampling.max_new_tokens == self.n == 1

    @property
    def num_made(self) -> int:
        """Answers that are made."""
        return self.n if self.best_of is None else self.best_of

    @property
    def looks_at_prompt(self) -> bool:
        """Whether something is wanted of the prompt itself, whose part from ``first_row`` on then is computed."""
        return self.prompt_log_probs is not None or self.embeds or bool(self.candidates)

    @property
    def first_row(self) -> int:
        """The first place of the prompt whose output is needed."""
        if self.embeds:
            return 0
        last = len(self.prompt) - 1
        return last if self.prompt_log_probs is None else min(self.scores_from - 1, last)

    @property
    def draw_stream(self) -> int:
        """The number that draws depend on beside the seed."""
        return self.number if self.stream is None else self.stream


class Reason(str, Enum):
    """Why an answer ended. ``structure``: no token of the vocabulary continues the structure that was asked for, or the
    library that enforces it gave up."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    STRUCTURE = "structure"


TopTokens = tuple[tuple[int, float], ...]
"""Token ids and their log-probabilities, likeliest first."""


@dataclass(frozen=True)
class Finished:
    """One answer.

    number, sample: the request, and which of its answers this is; tokens: with the one that ended the answer;
    log_probs: of each token, under the distribution that it was drawn from (for temperature 0, the model's); top: for
    each token the ``Sampling.top_log_probs`` likeliest ones of that distribution; prompt_scores: if they were wanted,
    of each token of the prompt from ``Request.scores_from`` on its log-probability and the likeliest tokens in its
    place, of the model's distribution (with the first sample of a request alone), and then those of the candidates;
    embedding: the mean of the prompt's hidden states after the last norm, if it was wanted.
    """

    number: int
    sample: int
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    top: tuple[TopTokens, ...]
    reason: Reason
    prompt_scores: tuple[tuple[float, TopTokens], ...] = ()
    embedding: tuple[float, ...] = ()

    @property
    def truncated(self) -> bool:
        """Whether the answer was cut off and so has no end."""
        return self.reason is not Reason.STOP


def mean_log_prob(log_probs: Sequence[float]) -> float:
    """Mean log-probability of an answer's tokens; that of an answer without any is the lowest."""
    return sum(log_probs) / len(log_probs) if log_probs else -math.inf


def best_answers(made: Sequence[Finished], n: int) -> list[Finished]:
    """The ``n`` best of the answers to one request, the best first and numbered anew; of equal ones the first, and one
    that was cancelled only where there are not enough others. What is known of the prompt stays with the first."""

    def rank(answer: Finished) -> tuple[bool, float, int]:
        return answer.reason is Reason.CANCELLED, -mean_log_prob(answer.log_probs), answer.sample

    (looked,) = (answer for answer in made if answer.sample == 0)
    chosen = [replace(one, sample=place) for place, one in enumerate(sorted(made, key=rank)[:n])]
    first = replace(chosen[0], prompt_scores=looked.prompt_scores, embedding=looked.embedding)
    return [first, *(replace(one, prompt_scores=(), embedding=()) for one in chosen[1:])]


def check_fits(request: Request, context: int, cache_tokens: int, vocabulary: int) -> None:
    """Raises UserError for a request that the model or the cache has no room for, or whose tokens do not exist."""
    # The token after candidates is chosen, but never computed.
    length, wanted = len(request.prompt), 0 if request.candidates else request.sampling.max_new_tokens
    for limit, what in ((context, "model.max_seq_length_tokens"), (cache_tokens, "the tokens that the cache holds,")):
        if length + wanted > limit:
            raise UserError(
                f"prompt {request.number} has {length} tokens and max_new_tokens is {wanted}, over {what} {limit}; "
                "shorten one of them"
            )
    _check_tokens(request, request.prompt, "prompt", vocabulary)
    _check_tokens(request, request.candidates, "candidates", vocabulary)
    _check_tokens(request, [token for token, _ in request.sampling.logit_bias], "logit_bias", vocabulary)


def _check_tokens(request: Request, tokens: Sequence[int], what: str, vocabulary: int) -> None:
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
        wrong = next(token for token in tokens if not 0 <= token < vocabulary)
        raise UserError(
            f"{what} of request {request.number} has token {wrong}, and the model's vocabulary is 0 to {vocabulary - 1}"
        )
