"""``/v1/completions``: texts or tokens that are written on from, with the prompt's own log-probabilities if wanted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from llm_parallel.generate.draw import Choice
from llm_parallel.generate.requests import Request, mean_log_prob
from llm_parallel.serve.answers import Answers, Service, head
from llm_parallel.serve.chat import FINISH
from llm_parallel.serve.errors import shown, wrong
from llm_parallel.serve.fields import Fields, checked_text
from llm_parallel.serve.models import Served
from llm_parallel.serve.stream import EventStream, event, while_connected
from llm_parallel.serve.wanted import MOST_ANSWERS, MOST_TOP, Wanted, read_wanted, token_ids
from llm_parallel.serve.writer import Piece

DEFAULT_TOKENS = 16
"""OpenAI's default of ``max_tokens`` on this route."""
MOST_PROMPTS = 2048


@dataclass(frozen=True)
class Options:
    """log_probs: whether they are wanted; echo: whether the prompt stands before the answer; best_of: answers that are
    made, of which the ``wanted.n`` likeliest are given; answers: whether anything is to be written at all."""

    wanted: Wanted
    log_probs: bool
    top: int
    echo: bool
    best_of: int
    answers: bool

    def request(self, prompt: Sequence[int], served: Served) -> Request:
        """The generator's request for one prompt. For ``max_tokens`` 0 it writes one token, which is not given."""
        length = served.most_new_tokens(prompt, self.wanted.limit, "prompt", DEFAULT_TOKENS) if self.answers else 1
        scores = self.top if self.echo and self.log_probs else None
        return self.wanted.request(prompt, length, n=self.best_of, prompt_log_probs=scores)


async def completion(http: HttpRequest, fields: Fields, service: Service, headers: dict[str, str]) -> Response:
    """Writes on from prompts. Raises ApiError."""
    served = service.served
    served.adapter(fields.text("model"))
    options = _read_options(fields, served)
    prompts = await asyncio.to_thread(read_prompts, fields, "prompt", served)
    answers = await service.ask([options.request(prompt, served) for prompt in prompts], options.wanted.stream)
    start = head("text_completion", "cmpl", fields.text("model") or served.names[0])
    if options.wanted.stream:
        return EventStream(_chunks(answers, options, start), answers.batch, lambda error: event(error.body()), headers)
    pieces = await while_connected(http.receive, answers.batch, answers.whole())
    choices = []
    for place in range(len(prompts)):
        own = [piece for (at, _), piece in sorted(pieces.items()) if at == place]
        if options.best_of > options.wanted.n:
            own = sorted(own, key=_likelihood, reverse=True)[: options.wanted.n]
        for sample, piece in enumerate(own):
            choices.append(_choice(answers, options, place, sample, piece))
    usage = answers.usage(options.answers)
    return JSONResponse({**start, "choices": choices, "usage": usage}, headers=headers)


def _read_options(fields: Fields, served: Served) -> Options:
    log_probs = fields.raw("logprobs")
    off = log_probs is None or log_probs is False
    top = 0 if off else 1 if log_probs is True else fields.whole("logprobs", 0, 0, MOST_TOP)
    wanted = read_wanted(fields, served, served.ends, top, ("max_tokens", "max_completion_tokens"))
    echo = fields.flag("echo")
    if fields.has("suffix") and fields.text("suffix"):
        raise wrong("suffix is given, and this model writes only at the end of a text; leave it out", "suffix")
    if wanted.limit == 0 and not echo:
        raise wrong("max_tokens is 0 and echo is not true; ask for at least 1 token", "max_tokens")
    best_of = fields.whole("best_of", wanted.n, 1, MOST_ANSWERS)
    if best_of < wanted.n:
        raise wrong(f"best_of is {best_of} and n is {wanted.n}; it must be at least n", "best_of")
    if wanted.stream and echo and not off:
        raise wrong("echo, logprobs and stream are given together; leave one of them out", "echo")
    if wanted.stream and best_of > wanted.n:
        raise wrong(f"best_of is {best_of} and stream is true; the best is known only at the end", "best_of")
    return Options(wanted, not off, top, echo, best_of, wanted.limit != 0)


def _likelihood(piece: Piece) -> float:
    return mean_log_prob([choice.log_prob for choice in piece.choices])


def read_prompts(fields: Fields, name: str, served: Served) -> list[list[int]]:
    """Tokens of the prompts in a field: a text, token ids, or a list of either. Raises ApiError."""
    given = fields.raw(name)
    if given is None:
        raise wrong(f"{name} is missing; give a text, token ids, or a list of either", name)
    if isinstance(given, list) and given and all(type(one) is int for one in given):
        return [token_ids(given, name, served.limits.vocabulary)]
    several = given if isinstance(given, list) else [given]
    if not several or len(several) > MOST_PROMPTS:
        raise wrong(f"{name} has {len(several)} prompts; it must have 1 to {MOST_PROMPTS}", name)
    return [_prompt(one, name if len(several) == 1 else f"{name}[{n}]", served) for n, one in enumerate(several)]


def _prompt(given: Any, name: str, served: Served) -> list[int]:
    if isinstance(given, list):
        return token_ids(given, name, served.limits.vocabulary)
    if not isinstance(given, str):
        raise wrong(f"{name} is {shown(given)}; it must be a text or a list of token ids", name)
    tokens = served.text_tokens(checked_text(given, name))
    if not tokens:
        raise wrong(f"{name} is empty, and the model begins no text with a token; give a text", name)
    return tokens


def _choice(answers: Answers, options: Options, place: int, sample: int, piece: Piece) -> dict[str, Any]:
    assert piece.reason is not None
    text, choices = (piece.text, piece.choices) if options.answers else ("", ())
    entries = None
    if options.echo:
        text = answers.prompt_text(place) + text
    if options.log_probs:
        prompt = answers.prompt_choices(place) if options.echo else ()
        entries = _log_probs(answers, [*prompt, *choices], first_is_certain=bool(prompt))
    reason = FINISH[piece.reason] if options.answers else "length"
    index = place * options.wanted.n + sample
    return {"index": index, "text": text, "logprobs": entries, "finish_reason": reason}


def _log_probs(
    answers: Answers, choices: Sequence[Choice], offset: int = 0, first_is_certain: bool = False
) -> dict[str, Any]:
    """OpenAI's older form. ``first_is_certain``: nothing stands before the first token, which has no probability."""
    tokens, offsets = [], []
    for choice in choices:
        text = answers.names.of(choice.token)[0]
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
    values: list[Any] = [choice.log_prob for choice in choices]
    tops: list[Any] = [{answers.names.of(token)[0]: log_prob for token, log_prob in choice.top} for choice in choices]
    if first_is_certain:
        values[0] = tops[0] = None
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops if any(tops) else None,
        "text_offset": offsets,
    }


async def _chunks(answers: Answers, options: Options, start: dict[str, Any]) -> AsyncIterator[bytes]:
    usage = {"usage": None} if options.wanted.usage_in_stream else {}
    offsets: dict[int, int] = {}

    def chunk(index: int, text: str, reason: str | None = None, entries: Any = None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": entries, "finish_reason": reason}
        return event({**start, "choices": [choice], **usage})

    async for place, sample, piece in answers.pieces():
        index = place * options.wanted.n + sample
        text, choices = (piece.text, piece.choices) if options.answers else ("", ())
        if options.echo and index not in offsets:
            text = answers.prompt_text(place) + text
        entries = _log_probs(answers, choices, offsets.get(index, 0)) if options.log_probs and choices else None
        offsets[index] = offsets.get(index, 0) + len(text)
        if text or entries:
            yield chunk(index, text, None, entries)
        if piece.reason is not None:
            yield chunk(index, "", FINISH[piece.reason] if options.answers else "length")
    if options.wanted.usage_in_stream:
        yield event({**start, "choices": [], "usage": answers.usage(options.answers)})
    yield event("[DONE]")
