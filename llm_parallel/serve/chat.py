"""``/v1/chat/completions``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from llm_parallel.generate.requests import Reason
from llm_parallel.generate.tool_calls import ArgumentsPiece, CallBegins, TextPiece
from llm_parallel.serve.answers import Answers, Service, head
from llm_parallel.serve.errors import wrong
from llm_parallel.serve.fields import Fields
from llm_parallel.serve.messages import read_messages
from llm_parallel.serve.stream import EventStream, event, while_connected
from llm_parallel.serve.turns import Call, Event, Offer, Turn, read_offer
from llm_parallel.serve.wanted import MOST_TOP, Wanted, read_wanted
from llm_parallel.serve.writer import Piece

LIMITS = ("max_completion_tokens", "max_tokens")
FINISH = {Reason.STOP: "stop", Reason.LENGTH: "length", Reason.STRUCTURE: "length"}
"""A structure that no token continues is cut off as an answer that is too long is."""


@dataclass(frozen=True)
class _Asked:
    wanted: Wanted
    offer: Offer
    log_probs: bool


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
    offer = read_offer(fields, served)
    wanted = replace(wanted, structure=offer.structure(wanted.structure))
    prompt = await asyncio.to_thread(served.conversation_tokens, messages, offer.tools)
    length = served.most_new_tokens(prompt, wanted.limit, "messages")
    answers = await service.ask([wanted.request(prompt, length)], wanted.stream, names=offer.marked)
    model = fields.text("model") or served.names[0]
    asked = _Asked(wanted, offer, log_probs)
    if wanted.stream:
        chunks = _chunks(answers, asked, head("chat.completion.chunk", "chatcmpl", model))
        return EventStream(chunks, answers.batch, lambda error: event(error.body()), headers)
    pieces = await while_connected(http.receive, answers.batch, answers.whole())
    choices = [_choice(answers, asked, sample, piece) for (_, sample), piece in sorted(pieces.items())]
    whole = {**head("chat.completion", "chatcmpl", model), "choices": choices, "usage": answers.usage()}
    return JSONResponse(whole, headers=headers)


def _choice(answers: Answers, asked: _Asked, sample: int, piece: Piece) -> dict[str, Any]:
    turn = Turn(asked.offer)
    turn.take(piece)
    message: dict[str, Any] = {"role": "assistant", "content": turn.text, "refusal": None}
    if turn.calls:
        message["content"] = turn.text or None
        message["tool_calls"] = [{"id": call.identity, **_call(call)} for call in turn.calls]
    return {
        "index": sample,
        "message": message,
        "logprobs": _log_probs(answers, piece) if asked.log_probs else None,
        "finish_reason": _reason(piece, turn),
    }


def _call(call: Call) -> dict[str, Any]:
    return {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _reason(piece: Piece, turn: Turn) -> str:
    assert piece.reason is not None
    return "tool_calls" if turn.calls and piece.reason is Reason.STOP else FINISH[piece.reason]


def _log_probs(answers: Answers, piece: Piece) -> dict[str, Any]:
    return {"content": [answers.entry(choice) for choice in piece.choices], "refusal": None}


async def _chunks(answers: Answers, asked: _Asked, start: dict[str, Any]) -> AsyncIterator[bytes]:
    wanted = asked.wanted
    usage = {"usage": None} if wanted.usage_in_stream else {}
    turns = [Turn(asked.offer) for _ in range(wanted.n)]

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None, entries: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": entries, "finish_reason": reason}
        return event({**start, "choices": [choice], **usage})

    for index in range(wanted.n):
        yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
    async for _, sample, piece in answers.pieces():
        turn = turns[sample]
        deltas = [_delta(turn, one) for one in turn.take(piece)]
        entries = _log_probs(answers, piece) if asked.log_probs and piece.choices else None
        if entries and not any(deltas):
            deltas = [{"content": ""}]
        for delta in filter(None, deltas):
            yield chunk(sample, delta, None, entries)
            entries = None
        if piece.reason is not None:
            yield chunk(sample, {}, _reason(piece, turn))
    if wanted.usage_in_stream:
        yield event({**start, "choices": [], "usage": answers.usage()})
    yield event("[DONE]")


def _delta(turn: Turn, what: Event) -> dict[str, Any] | None:
    if isinstance(what, TextPiece):
        return {"content": what.text}
    if isinstance(what, CallBegins):
        call = Call(what.name, turn.calls[what.index].identity)
        return {"tool_calls": [{"index": what.index, "id": call.identity, **_call(call)}]}
    if isinstance(what, ArgumentsPiece):
        return {"tool_calls": [{"index": what.index, "function": {"arguments": what.text}}]}
    return None
