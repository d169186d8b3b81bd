"""``/v1/completions``: texts or tokens that are written on from, with the prompt's own log-probabilities if wanted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from llm_parallel.generate.draw import Choice
from llm_parallel.serve.answers import Answers, Service, head
from llm_parallel.serve.chat import FINISH
from llm_parallel.serve.errors import shown, wrong
from llm_parallel.serve.fields import Fields, checked_text
from llm_parallel.serve.models import Served
from llm_parallel.serve.stream import EventStream, event, while_connected
from llm_parallel.serve.wanted import MOST_TOP, Wanted, read_wanted, token_ids

DEFAULT_TOKENS = 16
"""OpenAI's default of ``max_tokens`` on this route."""
MOST_PROMPTS = 2048


async def completion(http: HttpRequest, fields: Fields, service: Service, headers: dict[str, str]) -> Response:
    """Writes on from prompts. Raises ApiError."""
    served = service.served
    served.adapter(fields.text("model"))
    log_probs = fields.raw("logprobs")
    top = 0 if log_probs in (None, False) else 1 if log_probs is True else fields.whole("logprobs", 0, 0, MOST_TOP)
    wanted = read_wanted(fields, served, served.ends, top, ("max_tokens", "max_completion_tokens"))
    if fields.has("suffix") and fields.text("suffix"):
        raise wrong("suffix is given, and this model writes only at the end of a text; leave it out", "suffix")
    if wanted.limit == 0:
        raise wrong("max_tokens is 0; it must be at least 1", "max_tokens")
    prompts = await asyncio.to_thread(read_prompts, fields, "prompt", served)
    requests = [
        wanted.request(prompt, served.most_new_tokens(prompt, wanted.limit, "prompt", DEFAULT_TOKENS))
        for prompt in prompts
    ]
    answers = service.ask(requests, wanted.stream)
    model = fields.text("model") or served.names[0]
    start = head("text_completion", "cmpl", model)
    with_log_probs = log_probs not in (None, False)
    if wanted.stream:
        chunks = _chunks(answers, wanted, start, with_log_probs)
        return EventStream(chunks, answers.batch, lambda error: event(error.body()), headers)
    pieces = await while_connected(http.receive, answers.batch, answers.whole())
    choices = [
        {
            "index": place * wanted.n + sample,
            "text": piece.text,
            "logprobs": _log_probs(answers, piece.choices) if with_log_probs else None,
            "finish_reason": FINISH[piece.reason],
        }
        for (place, sample), piece in sorted(pieces.items())
        if piece.reason is not None
    ]
    return JSONResponse({**start, "choices": choices, "usage": answers.usage()}, headers=headers)


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


def _log_probs(answers: Answers, choices: Sequence[Choice], offset: int = 0) -> dict[str, Any]:
    tokens, offsets = [], []
    for choice in choices:
        text = answers.names.of(choice.token)[0]
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
    tops = [{answers.names.of(token)[0]: log_prob for token, log_prob in choice.top} for choice in choices]
    return {
        "tokens": tokens,
        "token_logprobs": [choice.log_prob for choice in choices],
        "top_logprobs": tops if any(tops) else None,
        "text_offset": offsets,
    }


async def _chunks(answers: Answers, wanted: Wanted, start: dict[str, Any], log_probs: bool) -> AsyncIterator[bytes]:
    usage = {"usage": None} if wanted.usage_in_stream else {}
    offsets: dict[int, int] = {}
    async for place, sample, piece in answers.pieces():
        index = place * wanted.n + sample
        entries = _log_probs(answers, piece.choices, offsets.get(index, 0)) if log_probs and piece.choices else None
        offsets[index] = offsets.get(index, 0) + len(piece.text)
        choice = {"index": index, "text": piece.text, "logprobs": entries, "finish_reason": None}
        if piece.text or entries:
            yield event({**start, "choices": [choice], **usage})
        if piece.reason is not None:
            ended = {**choice, "text": "", "logprobs": None, "finish_reason": FINISH[piece.reason]}
            yield event({**start, "choices": [ended], **usage})
    if wanted.usage_in_stream:
        yield event({**start, "choices": [], "usage": answers.usage()})
    yield event("[DONE]")
