"""Chat templates: Jinja programs that write a conversation as text, and which part of the text is whose turn.

A template is compiled with marks at the beginning and end of every loop's body. Where the loop goes over messages, the
marks say which characters of the text belong to which message, however the template changes a message's content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llm_parallel.errors import UserError
from llm_parallel.files import read_json, refuse_outside

Message = dict[str, Any]
DATE = date(2026, 1, 1)
OPEN, CLOSE, ANSWER, ANSWER_END, STOP = "\U0010fff0", "\U0010fff1", "\U0010fff2", "\U0010fff3", "\U0010fff4"
MARK = re.compile(f"{OPEN}([0-9]+),([0-9]+){STOP}|{CLOSE}([0-9]+){STOP}|([{ANSWER}{ANSWER_END}])")
TURN_BEGINS, TURN_ENDS, ANSWER_BEGINS, ANSWER_ENDS = "_turn_begins", "_turn_ends", "_answer_begins", "_answer_ends"
TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
MORE_TEMPLATES = "additional_chat_templates"
"""The folder of templates with other names, one in each file."""


class Refused(ValueError):
    """A template cannot write a conversation; the message is the end of a sentence."""


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation. turns: characters [begin, end) that the template writes for each message, None where
    it writes none or no loop over messages writes them; answers: what stands in ``{% generation %}``."""

    text: str
    turns: list[tuple[int, int] | None]
    answers: list[tuple[int, int]]


class _Generation(Extension):
    """``{% generation %} … {% endgeneration %}``: what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [_emit(ANSWER_BEGINS, [], line), *body, _emit(ANSWER_ENDS, [], line)]


class ChatTemplate:
    """A template's ``source``; ``origin`` says where it comes from, ``variables`` are the names of special tokens that
    it may use, and ``day`` is the date that it is told.

    Raises UserError if it is no Jinja template."""

    def __init__(self, source: str, origin: str, variables: dict[str, str], day: date = DATE) -> None:
        self.source, self.origin, self.variables = source, origin, dict(variables)
        environment = _environment(day)
        try:
            tree = environment.parse(source)
            self.literals = _literals(tree)
            self.has_generation = "{%" in source and bool(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source))
            _mark_loops(tree)
            code = environment.compile(tree, name="chat template")
            self._compiled = jinja2.Template.from_code(environment, code, environment.make_globals(None))
        except TemplateError as error:
            line = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise UserError(f"{origin} is no Jinja template that can be used: {error.message}{line}") from None

    def text(self, messages: Sequence[Message], tools: Any = None, generation_prompt: bool = False, **more: Any) -> str:
        """The text of a conversation; with ``generation_prompt`` up to where the assistant answers. Raises Refused."""
        silent = dict.fromkeys((TURN_BEGINS, TURN_ENDS, ANSWER_BEGINS, ANSWER_ENDS), _nothing)
        return self._render(messages, tools, generation_prompt, {**silent, **more})

    def render(self, messages: Sequence[Message], tools: Any = None) -> Rendered:
        """The text of a conversation, and whose turn each part of it is. Raises Refused."""
        numbers = {id(message): number for number, message in enumerate(messages)}

        def begins(loop: int, *targets: Any) -> str:
            found = next((numbers[id(target)] for target in targets if id(target) in numbers), None)
            return "" if found is None else f"{OPEN}{loop},{found}{STOP}"

        marks: dict[str, Callable[..., str]] = {
            TURN_BEGINS: begins,
            TURN_ENDS: lambda loop: f"{CLOSE}{loop}{STOP}",
            ANSWER_BEGINS: lambda: ANSWER,
            ANSWER_ENDS: lambda: ANSWER_END,
        }
        return _without_marks(self._render(messages, tools, False, marks), len(messages))

    @cached_property
    def thinks(self) -> bool:
        """Whether the template can be told not to think."""
        return "enable_thinking" in self.source

    def _render(self, messages: Sequence[Message], tools: Any, prompt: bool, more: dict[str, Any]) -> str:
        try:
            return self._compiled.render(
                messages=list(messages),
                tools=tools or None,
                documents=None,
                add_generation_prompt=prompt,
                **{**self.variables, **more},
            )
        except TemplateError as error:
            raise Refused(str(error.message or error)) from None
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
            raise Refused(f"{type(error).__name__}: {error}") from None


def own_template(folder: Path) -> tuple[str, str] | None:
    """The template in a Hugging Face folder and the file that holds it, or None. Raises UserError on a damaged file."""
    path = folder / TEMPLATE_FILE
    for name in (TEMPLATE_FILE, CONFIG_FILE):
        refuse_outside(folder / name, folder)
    try:
        if path.is_file():
            others = [repr(one.stem) for one in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))]
            return path.read_text(encoding="utf-8"), _the_default(path, others)
        path = folder / CONFIG_FILE
        config = read_json(path) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}), so the tokenizer's chat template is not known") from None
    found = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(found, list):
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
    if isinstance(found, dict):
        if "default" not in found:
            raise UserError(
                f"{path} has the chat templates {', '.join(map(repr, found))} and none named 'default'; write one of "
                "them to a file and name it in chat.template"
            )
        others = [repr(name) for name in found if name != "default"]
        return str(found["default"]), _the_default(path, others)
    return None if found is None else (str(found), str(path))


def _the_default(path: Path, others: list[str]) -> str:
    """How a template is called that stands beside others."""
    return f"{path} (the one named 'default', not {' or '.join(others)})" if others else str(path)


def chatml(begin: str, end: str) -> str:
    """The ChatML template with the tokens that begin and end a turn."""
    quoted = [json.dumps(token, ensure_ascii=False) for token in (begin, end)]
    begins, ends = quoted
    return (
        "{% for message in messages %}"
        "{% if tools and loop.first and message['role'] != 'system' %}"
        f"{{{{ {begins} + 'system\\n' }}}}{{{{ offer() }}}}{{{{ {ends} + '\\n' }}}}"
        "{% endif %}"
        f"{{{{ {begins} + message['role'] + '\\n' }}}}"
        "{% if message['reasoning_content'] %}"
        "{{ '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' }}"
        "{% endif %}"
        "{{ message['content'] or '' }}"
        "{% if tools and loop.first and message['role'] == 'system' %}{{ '\\n\\n' }}{{ offer() }}{% endif %}"
        "{% for call in message['tool_calls'] or [] %}"
        "{{ ('' if loop.first and not message['content'] else '\\n') + '<tool_call>\\n' }}"
        "{{ (call['function'] or call) | tojson }}"
        "{{ '\\n</tool_call>' }}"
        "{% endfor %}"
        f"{{{{ {ends} + '\\n' }}}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {begins} + 'assistant\\n' }}}}{{% endif %}}"
    ).replace("{{ offer() }}", _OFFER)


_OFFER = (
    "{{ 'Functions that you may call, each on a line; to call one, write its name and arguments as JSON between "
    "<tool_call> and </tool_call>.' }}"
    "{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}"
)


def _environment(day: date) -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up: the same functions, filters and blank lines."""

    def raise_exception(message: str) -> None:
        raise TemplateError(str(message))

    def strftime_now(form: str) -> str:
        return datetime(day.year, day.month, day.day).strftime(form)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
        sort_keys: bool = False,
    ) -> str:  # fmt: skip
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _nothing(*_: Any) -> str:
    return ""


def _literals(tree: nodes.Template) -> str:
    """What the template itself writes, or compares with, piece by piece."""
    pieces = [node.data for node in tree.find_all(nodes.TemplateData)]
    pieces += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join(pieces)


def _mark_loops(tree: nodes.Template) -> None:
    for number, loop in enumerate(list(tree.find_all(nodes.For))):
        targets = [loop.target] if isinstance(loop.target, nodes.Name) else getattr(loop.target, "items", [])
        names: list[nodes.Expr] = [nodes.Name(t.name, "load") for t in targets if isinstance(t, nodes.Name)]
        line, place = loop.lineno, nodes.Const(number)
        loop.body.insert(0, _emit(TURN_BEGINS, [place, *names], line))
        loop.body.append(_emit(TURN_ENDS, [nodes.Const(number)], line))


def _emit(function: str, arguments: list[nodes.Expr], line: int) -> nodes.Output:
    call = nodes.Call(nodes.Name(function, "load"), arguments, [], None, None)
    return nodes.Output([call], lineno=line).set_lineno(line)  # type: ignore[return-value]


def _without_marks(marked: str, count: int) -> Rendered:
    turns: list[tuple[int, int] | None] = [None] * count
    answers: list[tuple[int, int]] = []
    pieces: list[str] = []
    length = at = begun = 0
    opened: list[tuple[int, int, int]] = []

    def close(loop: int) -> None:
        while any(one[0] == loop for one in opened):
            of, number, start = opened.pop()
            if length > start:
                turns[number] = (start, length)
            if of == loop:
                return

    for mark in MARK.finditer(marked):
        pieces.append(marked[at : mark.start()])
        length += mark.start() - at
        at = mark.end()
        if mark[1]:
            close(int(mark[1]))  # a body that `continue` left
            opened.append((int(mark[1]), int(mark[2]), length))
        elif mark[3]:
            close(int(mark[3]))
        elif mark[4] == ANSWER:
            begun = length
        else:
            answers.append((begun, length))
    return Rendered("".join([*pieces, marked[at:]]), turns, answers)
