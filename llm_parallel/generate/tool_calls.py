"""Calls of tools in the text of an answer: whole, or while the text comes.

The text must hold the names of the control tokens that mark calls (``ToolFormat.marks``), which decoding usually
drops; ``Tokenizer.decode(ids, control=True)`` keeps them. A call that is not well formed stays text, and is said.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.DOTALL
)
"""The beginning of a call up to its arguments, in the order that models are taught."""
NAMED = re.compile(r"\s*(?P<name>[\w.-]+)(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?=\{)")
"""The same in Mistral's newer form, ``name[ARGS]{…}``."""
NAME_SO_FAR = re.compile(r"[\w.-]+(\[[A-Z_]*\]?\w*)*")
PYTHON = re.compile(r"\s*(?P<name>\w+)\.call\((?P<arguments>.*)\)\s*", re.DOTALL)
"""A call of Llama's built-in tools, ``brave_search.call(query="…")``."""


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes calls.

    kind: ``hermes`` (``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, of Hermes, Qwen and our ChatML),
    ``llama`` (``{"name": …, "parameters": {…}}`` as the whole answer or after ``<|python_tag|>``) or ``mistral``
    (``[TOOL_CALLS]`` and a list of objects, or ``name[ARGS]{…}``); named: whether that newer form is the model's."""

    kind: Literal["hermes", "llama", "mistral"]
    named: bool = False

    @property
    def begin(self) -> str:
        """What marks a call's beginning."""
        return {"hermes": "<tool_call>", "llama": "<|python_tag|>", "mistral": "[TOOL_CALLS]"}[self.kind]

    @property
    def end(self) -> str:
        """What marks its end; empty where nothing does."""
        return "</tool_call>" if self.kind == "hermes" else ""

    @property
    def marks(self) -> tuple[str, ...]:
        """All names of tokens that a parser must see."""
        return {"mistral": (self.begin, "[ARGS]", "[CALL_ID]")}.get(
            self.kind, tuple(filter(None, (self.begin, self.end)))
        )


def tool_format(template: str) -> ToolFormat | None:
    """The format that a chat template (its Jinja source) teaches; None if it is none of these, or it has no tools."""
    if "<tool_call>" in template:
        # Qwen3-Coder and others write XML between the same marks.
        return None if re.search(r"<function=|<arg_key>", template) else ToolFormat("hermes")
    if "[TOOL_CALLS]" in template:
        return ToolFormat("mistral", named="[ARGS]" in template)
    if "<|python_tag|>" in template or ('"parameters": ' in template and "ipython" in template):
        return ToolFormat("llama")
    return None


@dataclass(frozen=True)
class TextPiece:
    """Text of the answer, the next piece."""

    text: str


@dataclass(frozen=True)
class CallBegins:
    """A call of the function ``name``; ``index`` counts the answer's calls from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class ArgumentsPiece:
    """The next piece of a call's arguments, which together are a JSON object, as the model wrote it."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnds:
    """A call is complete. ``problem`` says why it is not well formed, if that was seen only after its name had been
    passed on; the arguments are then no JSON object."""

    index: int
    problem: str | None = None


@dataclass(frozen=True)
class Malformed:
    """What looked like a call is none, for the reason ``problem``; its text follows as ``TextPiece``."""

    problem: str


Event = TextPiece | CallBegins | ArgumentsPiece | CallEnds | Malformed


@dataclass(frozen=True)
class ToolCall:
    """The name of a function and its arguments, a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ParsedAnswer:
    """An answer without its calls, the calls, and what was wrong with others."""

    text: str
    calls: tuple[ToolCall, ...]
    problems: tuple[str, ...]


def parse_tool_calls(text: str, form: ToolFormat, names: Collection[str] | None = None) -> ParsedAnswer:
    """The calls in a whole answer. names: the functions that there are, if only those may be called."""
    parser = ToolCallParser(form, names, whole=True)
    events = [*parser.feed(text), *parser.close()]
    begun = [event for event in events if isinstance(event, CallBegins)]
    arguments = {call.index: "" for call in begun}
    for event in events:
        if isinstance(event, ArgumentsPiece):
            arguments[event.index] += event.text
    return ParsedAnswer(
        "".join(event.text for event in events if isinstance(event, TextPiece)),
        tuple(ToolCall(call.name, arguments[call.index]) for call in begun),
        tuple(event.problem for event in events if isinstance(event, Malformed)),
    )


class ToolCallParser:
    """Finds calls while the text of an answer comes, in pieces of any length.

    Text before a call is passed on at once, but for blanks at its end, which are dropped if a call follows, and for
    what may be the beginning of a mark. A call's name is passed on when its arguments begin, and then the arguments as
    they come; where a call is written in another order, or ``whole`` is set, all of it when it is complete.

    names: the functions that there are, if only those may be called."""

    def __init__(self, form: ToolFormat, names: Collection[str] | None = None, whole: bool = False) -> None:
        self._form, self._names, self._whole = form, None if names is None else frozenset(names), whole
        self._pending = ""  # text that is not passed on yet
        self._call: _Call | None = None
        self._calls = 0
        self._silent = True  # whether nothing but blanks has come

    def feed(self, text: str) -> list[Event]:
        """What a further piece of text brings."""
        self._pending += text
        return list(self._events(False))

    def close(self) -> list[Event]:
        """What is left at the end of the answer."""
        found = list(self._events(True))
        text, self._pending = self._pending, ""
        if text and (text.strip() or not self._calls):
            found.append(TextPiece(text))
        return found

    def _events(self, at_end: bool) -> Iterator[Event]:
        while True:
            before = (len(self._pending), self._call)
            yield from self._text(at_end) if self._call is None else self._in_call(at_end)
            if before == (len(self._pending), self._call):
                return

    def _text(self, at_end: bool) -> Iterator[Event]:
        form, pending = self._form, self._pending
        place = pending.find(form.begin)
        bare = form.kind == "llama" and (self._silent or self._calls > 0)
        stripped = pending.lstrip("; \n\t" if self._calls else None)
        if bare and stripped.startswith("{"):
            self._call, self._pending = _Call(form, pending[: len(pending) - len(stripped)], self._names), stripped
            self._silent = False
            return
        if place < 0:
            kept = (
                0 if at_end else max((n for n in range(len(form.begin)) if pending.endswith(form.begin[:n])), default=0)
            )
            text = pending[: len(pending) - kept].rstrip()
        else:
            text = pending[:place].rstrip()
        if text.strip("; \n\t" if form.kind == "llama" and self._calls else None):
            self._silent = False
            yield TextPiece(text)
        elif place < 0:
            return  # blanks, which may stand before a call
        self._pending = pending[len(text) :]
        if place >= 0:
            self._silent = False
            mark_ends = place + len(form.begin)
            self._call, self._pending = _Call(form, pending[len(text) : mark_ends], self._names), pending[mark_ends:]

    def _in_call(self, at_end: bool) -> Iterator[Event]:
        call = self._call
        assert call is not None
        used = call.take(self._pending, at_end)
        self._pending = self._pending[used:]
        if call.problem is not None and not call.begun:
            self._call = None
            yield Malformed(call.problem)
            yield TextPiece(call.opening + call.raw)
            return
        if call.name is not None and not call.begun and (call.done or not self._whole):
            call.begun = True
            yield CallBegins(self._calls, call.name)
        if call.begun:
            piece = call.arguments()
            if piece:
                yield ArgumentsPiece(self._calls, piece)
        if call.done or call.problem is not None:
            yield CallEnds(self._calls, call.problem)
            self._calls += 1
            self._call = call.following()


class _Call:
    """One call in the making: ``opening`` is the text before it, with the mark that began it. raw: its text; name: once
    it is known; done: it is complete; begun: its name has been passed on."""

    def __init__(self, form: ToolFormat, opening: str, names: frozenset[str] | None, in_list: bool = False) -> None:
        self.opening, self.raw = opening, ""
        self.problem: str | None = None
        self.name: str | None = None
        self.done = self.begun = False
        self._form, self._names, self._in_list = form, names, in_list
        self._is_code = self._list_goes_on = False
        self._depth, self._in_string, self._escaped = 0, False, False
        self._outside = 1  # depth around the arguments
        self._arguments_begin = self._arguments_end = -1
        self._given: str | None = None  # arguments that are not a part of ``raw``
        self._read_whole = False
        self._shown = 0

    def take(self, text: str, at_end: bool) -> int:
        """Takes what belongs to the call. Returns how many characters."""
        taken = 0
        while taken < len(text) and not self._read_whole and self.problem is None:
            self._take_character(text[taken])
            taken += 1
        if self._read_whole and self.problem is None:
            taken += self._take_tail(text[taken:], at_end)
        if at_end and self._is_code:
            self._read_code()
        elif at_end and not self.done and self.problem is None:
            self.problem = "the answer ends inside a call"
        return taken

    def _take_character(self, character: str) -> None:
        self.raw += character
        if self._is_code:
            return
        if self._in_string:
            ends = character == '"' and not self._escaped
            self._escaped = character == "\\" and not self._escaped
            self._in_string = not ends
        elif self._depth == 0 and character != "{":
            if not character.isspace():
                self._before_object()
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
            if character == "{" and self._arguments_begin < 0:
                self._find_arguments()
        elif character in "}]":
            self._depth -= 1
            if self._depth == self._outside and self._arguments_begin >= 0 and self._arguments_end < 0:
                self._arguments_end = len(self.raw)
            if self._depth == 0:
                self._read_whole = True
                self._read()

    def _before_object(self) -> None:
        """A character that is neither blank nor the beginning of an object."""
        so_far = self.raw.strip()
        if self._form.kind == "llama" and self.opening.endswith(self._form.begin):
            self._is_code = True
        elif self._form.kind == "mistral" and so_far == "[" and not self._in_list:
            self._in_list, self.opening, self.raw = True, self.opening + self.raw, ""
        elif self._form.kind != "mistral" or self._in_list or not NAME_SO_FAR.fullmatch(so_far):
            self.problem = f"a call begins with {so_far[:20]!r}, not with an object"

    def _find_arguments(self) -> None:
        """The name, if the arguments begin with the last character."""
        if self._depth == 1 and self._form.kind == "mistral" and not self._in_list:
            head, self._outside = NAMED.match(self.raw), 0
            if head is None:
                self.problem = "a call has no name before its arguments"
        else:
            head = HEAD.match(self.raw) if self._depth == 2 else None
        if head is not None and head.end() == len(self.raw) - 1:
            self._arguments_begin = head.end()
            try:
                self.name = head["name"] if self._outside == 0 else json.loads(head["name"])
                self._check_name()
            except ValueError:
                self.problem = f"the name {head['name'][:40]} is no JSON"

    def _check_name(self) -> None:
        if self._names is not None and self.name not in self._names:
            self.problem = f"{str(self.name)[:60]!r} is called, which is none of the functions given"

    def _read(self) -> None:
        """What the complete object says."""
        text = self.raw[self._arguments_begin :] if self._outside == 0 else self.raw
        try:
            held = json.loads(text, object_pairs_hook=_without_twins, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            self.problem = f"a call is no JSON: {error}"
            return
        if self._outside == 0:
            return
        name, arguments = held.get("name"), held.get("arguments", held.get("parameters", {}))
        if isinstance(arguments, str):  # JSON in a text
            with suppress(ValueError):
                arguments = json.loads(arguments)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            self.problem = "a call has no name, or its arguments are no object"
            return
        self.name = name
        if self._arguments_begin < 0:
            self._given = json.dumps(arguments, ensure_ascii=False)
        self._check_name()

    def _take_tail(self, text: str, at_end: bool) -> int:
        """What must follow the object."""
        rest = text.lstrip()
        blanks = len(text) - len(rest)
        if self._form.kind == "hermes":
            if rest.startswith(self._form.end):
                self.done = True
                return blanks + len(self._form.end)
            if not self._form.end.startswith(rest):
                self.problem = f"a call is followed by {rest[:20]!r}, not by {self._form.end}"
            elif at_end:
                self.done = not rest  # a model that stops without the mark
            return 0
        if not self._in_list:
            self.done = True
            return 0
        if rest.startswith((",", "]")):
            self.done, self._list_goes_on = True, rest.startswith(",")
            return blanks + 1
        if rest:
            self.problem = f"a call in a list is followed by {rest[:20]!r}"
        return 0

    def _read_code(self) -> None:
        """A call of a built-in tool."""
        found = PYTHON.fullmatch(self.raw)
        try:
            call = ast.parse(f"f({found['arguments']})", mode="eval").body if found else None
            if not found or not isinstance(call, ast.Call) or call.args:
                raise ValueError("no call")
            given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
            self._given = json.dumps(given, ensure_ascii=False)
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            self.problem = f"neither JSON nor a call of a built-in tool follows {self._form.begin}"
            return
        self.name, self.done = found["name"], True
        self._check_name()

    def arguments(self) -> str:
        """The part of the arguments that was not asked for before."""
        text = self._given or ""
        if self._arguments_begin >= 0:
            text = self.raw[self._arguments_begin : self._arguments_end if self._arguments_end >= 0 else None]
        piece, self._shown = text[self._shown :], len(text)
        return piece

    def following(self) -> _Call | None:
        """The next call of the same list."""
        return _Call(self._form, ",", self._names, in_list=True) if self._list_goes_on else None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    held = dict(pairs)
    if len(held) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return held


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
