"""``/v1/responses``: one answer as a list of items, each of which is a message or a call. Nothing is stored."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from llm_parallel.generate.requests import Reason
from llm_parallel.generate.tool_calls import ArgumentsPiece, CallBegins, CallEnds, TextPiece
from llm_parallel.serve.answers import Answers, Service
from llm_parallel.serve.errors import ApiError, wrong
from llm_parallel.serve.fields import Fields
from llm_parallel.serve.models import Served
from llm_parallel.serve.response_items import read_input
from llm_parallel.serve.stream import EventStream, event, while_connected
from llm_parallel.serve.turns import Event as TurnEvent
from llm_parallel.serve.turns import Offer, Turn, read_offer
from llm_parallel.serve.wanted import MOST_TOP, Wanted, read_wanted
from llm_parallel.serve.writer import Piece

LOG_PROBS = "message.output_text.logprobs"


async def response(http: HttpRequest, fields: Fields, service: Service, headers: dict[str, str]) -> Response:
    """Answers. Raises ApiError."""
    served = service.served
    served.adapter(fields.text("model"))
    for name in ("previous_response_id", "conversation", "background"):
        if fields.raw(name):
            raise wrong(f"{name} is given, and this server stores nothing; send the whole conversation as input", name)
    messages = read_input(fields)
    wanted, offer = _read(fields, served)
    prompt = await asyncio.to_thread(served.conversation_tokens, messages, offer.tools)
    length = served.most_new_tokens(prompt, wanted.limit, "input")
    answers = await service.ask([wanted.request(prompt, length)], wanted.stream, names=offer.marked)
    log_probs = LOG_PROBS in fields.items("include")
    made = _Response(answers, Turn(offer), _frame(fields, wanted, served), log_probs)
    if wanted.stream:
        return EventStream(_events(answers, made), answers.batch, made.failed, headers)
    whole = await while_connected(http.receive, answers.batch, answers.whole())
    for _ in made.take(whole[0, 0]):
        pass
    return JSONResponse(made.body(), headers=headers)


def _read(fields: Fields, served: Served) -> tuple[Wanted, Offer]:
    top = fields.whole("top_logprobs", 0, 0, MOST_TOP)
    wanted = read_wanted(fields, served, served.chat_ends, top, ("max_output_tokens",))
    if wanted.n != 1:
        raise wrong(f"n is {wanted.n}; a response is one answer, so leave n out", "n")
    offer = read_offer(fields, served)
    return replace(wanted, structure=offer.structure(wanted.structure)), offer


def _frame(fields: Fields, wanted: Wanted, served: Served) -> dict[str, Any]:
    """What a response says of its request."""
    text = fields.raw("text")
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "background": False,
        "error": None,
        "instructions": fields.raw("instructions"),
        "max_output_tokens": wanted.limit,
        "metadata": fields.raw("metadata") or {},
        "model": fields.text("model") or served.names[0],
        "parallel_tool_calls": fields.flag("parallel_tool_calls", True),
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": wanted.sampling.temperature,
        "text": text if isinstance(text, dict) and text.get("format") else {"format": {"type": "text"}},
        "tool_choice": fields.raw("tool_choice") or "auto",
        "tools": fields.items("tools"),
        "top_logprobs": wanted.sampling.top_log_probs,
        "top_p": wanted.sampling.top_p,
        "truncation": "disabled",
        "user": None,
    }


async def _events(answers: Answers, made: _Response) -> AsyncIterator[bytes]:
    for one in made.begin():
        yield one
    async for _, _, piece in answers.pieces():
        for one in made.take(piece):
            yield one


@dataclass
class _Response:
    """A response in the making, and its events."""

    answers: Answers
    turn: Turn
    frame: dict[str, Any]
    log_probs: bool
    output: list[dict[str, Any]] = field(default_factory=list)
    reason: Reason | None = None
    number: int = 0
    entries: list[dict[str, Any]] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """The response as it is so far."""
        status = {None: "in_progress", Reason.STOP: "completed"}.get(self.reason, "incomplete")
        why = {"reason": "max_output_tokens"} if status == "incomplete" else None
        usage = None
        if self.reason is not None:
            counted = self.answers.usage()
            usage = {
                "input_tokens": counted["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": counted["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counted["total_tokens"],
            }
        made = {**self.frame, "status": status, "incomplete_details": why, "output": self.output, "usage": usage}
        return made

    def begin(self) -> Iterator[bytes]:
        """The events before the answer."""
        yield self._event("response.created", response=self.body())
        yield self._event("response.in_progress", response=self.body())

    def take(self, piece: Piece) -> Iterator[bytes]:
        """The events of a piece of the answer, and after its last one those that end the response."""
        self.entries += [self.answers.entry(choice) for choice in piece.choices] if self.log_probs else []
        for one in self.turn.take(piece):
            yield from self._of_turn(one)
        if piece.reason is None:
            return
        if not self.output:
            yield from self._begin_message()
        if self.output[-1]["type"] == "message":
            yield from self._end_message()
        self.reason = piece.reason
        name = "response.completed" if piece.reason is Reason.STOP else "response.incomplete"
        yield self._event(name, response=self.body())

    def failed(self, error: ApiError) -> bytes:
        """The event that tells of an error in the middle."""
        told = {**self.body(), "status": "failed", "error": {"code": "server_error", "message": error.message}}
        return self._event("response.failed", response=told)

    def _event(self, kind: str, **content: Any) -> bytes:
        made = event({"type": kind, "sequence_number": self.number, **content}, kind)
        self.number += 1
        return made

    @property
    def _at(self) -> dict[str, Any]:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}

    def _of_turn(self, what: TurnEvent) -> Iterator[bytes]:
        if isinstance(what, TextPiece):
            if not self.output or self.output[-1]["type"] != "message":
                yield from self._begin_message()
            self.output[-1]["content"][0]["text"] += what.text
            taken, self.entries = self.entries, []
            self.output[-1]["content"][0]["logprobs"] += taken
            delta = {**self._at, "content_index": 0, "delta": what.text, "logprobs": taken}
            yield self._event("response.output_text.delta", **delta)
        elif isinstance(what, CallBegins):
            if self.output and self.output[-1]["type"] == "message":
                yield from self._end_message()
            call = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "status": "in_progress"}
            call |= {"call_id": self.turn.calls[what.index].identity, "name": what.name, "arguments": ""}
            yield from self._begin_item(call)
        elif isinstance(what, ArgumentsPiece):
            self.output[-1]["arguments"] += what.text
            yield self._event("response.function_call_arguments.delta", **self._at, delta=what.text)
        elif isinstance(what, CallEnds):
            item = self.output[-1]
            item["status"] = "completed" if what.problem is None else "incomplete"
            ended = {**self._at, "name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **ended)
            yield self._event("response.output_item.done", output_index=len(self.output) - 1, item=item)

    def _begin_item(self, item: dict[str, Any]) -> Iterator[bytes]:
        self.output.append(item)
        yield self._event("response.output_item.added", output_index=len(self.output) - 1, item=item)

    def _begin_message(self) -> Iterator[bytes]:
        item = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "status": "in_progress"}
        yield from self._begin_item({**item, "content": []})
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self.output[-1]["content"].append(part)
        yield self._event("response.content_part.added", **self._at, content_index=0, part=part)

    def _end_message(self) -> Iterator[bytes]:
        item = self.output[-1]
        part, item["status"] = item["content"][0], "completed"
        ended = {**self._at, "content_index": 0}
        yield self._event("response.output_text.done", **ended, text=part["text"], logprobs=part["logprobs"])
        yield self._event("response.content_part.done", **ended, part=part)
        yield self._event("response.output_item.done", output_index=len(self.output) - 1, item=item)
