"""What the assistant says and calls, for the routes that speak in conversations."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from llm_parallel.errors import UserError
from llm_parallel.generate.structure import Structure
from llm_parallel.generate.tool_calls import (
    ArgumentsPiece,
    CallBegins,
    CallEnds,
    TextPiece,
    ToolCallParser,
    ToolFormat,
    tool_format,
)
from llm_parallel.generate.tool_choice import functions_of, tool_structure
from llm_parallel.serve.errors import wrong
from llm_parallel.serve.fields import Fields
from llm_parallel.serve.messages import read_tools
from llm_parallel.serve.models import Served
from llm_parallel.serve.writer import Piece

Event = TextPiece | CallBegins | ArgumentsPiece | CallEnds


@dataclass(frozen=True)
class Offer:
    """The functions that an answer may call. form: how the model writes calls, None if there is nothing to call;
    forced: the structure that makes it call; marked: whether calls are marked by control tokens, whose names the text
    then needs."""

    tools: list[dict[str, Any]] = field(default_factory=list)
    form: ToolFormat | None = None
    names: frozenset[str] = frozenset()
    forced: Structure | None = None
    marked: bool = False

    def structure(self, asked: Structure | None) -> Structure | None:
        """The one structure of an answer. Raises ApiError if a call and another form are both asked for."""
        if asked is not None and self.forced is not None:
            raise wrong("tool_choice asks for a call, and another form of the answer is asked for too", "tool_choice")
        return asked or self.forced


def read_offer(fields: Fields, served: Served) -> Offer:
    """``tools``, ``tool_choice`` and ``parallel_tool_calls``. Raises ApiError."""
    tools, choice = read_tools(fields), fields.raw("tool_choice")
    parallel = fields.flag("parallel_tool_calls", True)
    encoder = served.chat
    form = tool_format(encoder.template.source) if encoder.writes_tools else None
    try:
        if not tools:
            if choice not in (None, "none", "auto"):
                raise UserError("tool_choice asks for a call and tools is empty; give tools, or leave tool_choice out")
            return Offer()
        names = frozenset(functions_of(tools))
        if choice == "none":
            return Offer()
        if form is None:
            raise UserError("tools is given, and the model's chat template says nothing of calls; leave tools out")
        forced = tool_structure(form, served.tokenizer, tools, choice, parallel)
    except UserError as error:
        raise wrong(str(error), "tools") from None
    return Offer(tools, form, names, forced, any(mark in encoder.tokenizer.special for mark in form.marks))


@dataclass
class Call:
    """A call of a function. identity: what its result will be known by."""

    name: str
    identity: str
    arguments: str = ""


class Turn:
    """One answer, divided into text and calls."""

    def __init__(self, offer: Offer) -> None:
        self._parser = None if offer.form is None else ToolCallParser(offer.form, offer.names)
        self.text = ""
        self.calls: list[Call] = []

    def take(self, piece: Piece) -> list[Event]:
        """What a piece of the answer brings; a call that is not well formed is text."""
        if self._parser is None:
            found: list[Any] = [TextPiece(piece.text)] if piece.text else []
        else:
            found = self._parser.feed(piece.text) if piece.text else []
            found += self._parser.close() if piece.reason is not None else []
        events: list[Event] = [one for one in found if isinstance(one, Event)]
        for one in events:
            if isinstance(one, TextPiece):
                self.text += one.text
            elif isinstance(one, CallBegins):
                self.calls.append(Call(one.name, f"call_{uuid.uuid4().hex[:24]}"))
            elif isinstance(one, ArgumentsPiece):
                self.calls[one.index].arguments += one.text
        return events
