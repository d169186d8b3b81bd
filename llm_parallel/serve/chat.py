"""``/v1/chat/completions``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from llm_parallel.generate.requests import Reason
from llm_parallel.serve.answers import Answers, Service, head
from llm_parallel.serve.errors import wrong
from llm_parallel.serve.fields import Fields
from llm_parallel.serve.messages import read_messages
from llm_parallel.serve.stream import EventStream, event, while_connected
from llm_parallel.serve.wanted import MOST_TOP, Wanted, read_wanted
from llm_parallel.serve.writer import Piece

LIMITS = ("max_completion_tokens", "max_tokens")
FINISH = {Reason.STOP: "stop", Reason.LENGTH: "length"}


async def chat_completion(http: HttpRequest, fields: Fields, service: Service, headers: dict[str, str]) -> Response:
    """Answers a conversation. Raises ApiError."""
    served = service.served
    served.adapter(fields.text("model"))
    messages = read_messages(fields)
    log_probs = fields.flag("logprobs")
    top = fields.whole("top_logprobs", 0, 0, MOST_TOP)
    if top and not log_probs:
        raise wrong("top_logprobs is given and logprobs is not true; set logprobs to true", "top_logprobs")
    wanted = read_wanted(fields, served, served.chat_ends, top, LIMITS)
    if wanted.limit == 0:
        raise wrong(f"{wanted.limit_name} is 0; it must be at least 1", wanted.limit_name)
    prompt = await asyncio.to_thread(served.conversation_tokens, messages)
    length = served.most_new_tokens(prompt, wanted.limit, "messages")
    answers = service.ask([wanted.request(prompt, length)], wanted.stream)
    model = fields.text("model") or served.names[0]
    if wanted.stream:
        start = head("chat.completion.chunk", "chatcmpl", model)
        chunks = _chunks(answers, wanted, start, log_probs)
        return EventStream(chunks, answers.batch, lambda error: event(error.body()), headers)
    pieces = await while_connected(http.receive, answers.batch, answers.whole())
    choices = [
        {
            "index": sample,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": _log_probs(answers, piece) if log_probs else None,
            "finish_reason": FINISH[piece.reason],
        }
        for (_, sample), piece in sorted(pieces.items())
        if piece.reason is not None
    ]
    whole = {**head("chat.completion", "chatcmpl", model), "choices": choices, "usage": answers.usage()}
    return JSONResponse(whole, headers=headers)


def _log_probs(answers: Answers, piece: Piece) -> dict[str, Any]:
    return {"content": [answers.entry(choice) for choice in piece.choices], "refusal": None}


async def _chunks(answers: Answers, wanted: Wanted, start: dict[str, Any], log_probs: bool) -> AsyncIterator[bytes]:
    usage = {"usage": None} if wanted.usage_in_stream else {}

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None, entries: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": entries, "finish_reason": reason}
        return event({**start, "choices": [choice], **usage})

    for index in range(wanted.n):
        yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
    async for _, sample, piece in answers.pieces():
        entries = _log_probs(answers, piece) if log_probs and piece.choices else None
        if piece.text or entries:
            yield chunk(sample, {"content": piece.text}, None, entries)
        if piece.reason is not None:
            yield chunk(sample, {}, FINISH[piece.reason])
    if wanted.usage_in_stream:
        yield event({**start, "choices": [], "usage": answers.usage()})
    yield event("[DONE]")
