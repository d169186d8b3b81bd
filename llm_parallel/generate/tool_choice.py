"""Structures that make an answer call a tool, as ``tool_choice`` of a request asks for it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llm_parallel.data.tokenizer import Tokenizer
from llm_parallel.errors import UserError
from llm_parallel.generate.structure import BLANKS, Structure
from llm_parallel.generate.tool_calls import ToolFormat

MOST_CALLS = 8
"""That a structure lets an answer make at once."""


def tool_structure(
    form: ToolFormat, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]], choice: Any, parallel: bool = True
) -> Structure | None:
    """The structure that makes an answer call a function, as ``tool_choice`` of OpenAI's interfaces asks for it.

    tools: as in a request, each ``{"type": "function", "function": {"name", "parameters"}}`` or the inner object;
    choice: None, ``auto`` or ``none`` (no structure), ``required`` (at least one call of any of them; several only if
    ``parallel``), or ``{"type": "function", "function": {"name": …}}`` (one call of that one; the name may stand beside
    ``type``). Arguments satisfy the function's parameters. Raises UserError that names the field."""
    functions = functions_of(tools)
    if choice in (None, "auto", "none"):
        return None
    if choice != "required":
        name = _chosen(choice)
        if name not in functions:
            raise UserError(f"tool_choice names the function {name!r}, and tools has {_listed(functions)}")
        functions, parallel = {name: functions[name]}, False
    if not functions:
        raise UserError("tool_choice is required and tools is empty; give tools, or leave tool_choice out")
    about = "form of a call, with the parameters of tools,"
    return Structure("grammar", _grammar(form, tokenizer, functions, parallel), about)


def functions_of(tools: Any) -> dict[str, Mapping[str, Any]]:
    """Name and schema of the parameters of each tool. Raises UserError that names the field."""
    if not isinstance(tools, (list, tuple)):
        raise UserError(f"tools is {json.dumps(tools, default=str)[:80]}; it must be a list of functions")
    found: dict[str, Mapping[str, Any]] = {}
    for place, tool in enumerate(tools):
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = inner.get("name") if isinstance(inner, Mapping) else None
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,200}", name):
            shown = json.dumps(name if isinstance(inner, Mapping) else tool, default=str)[:80]
            raise UserError(f"tools[{place}] has the name {shown}; it must be letters, digits, _, - or dots")
        if name in found:
            raise UserError(f"tools[{place}] has the name {name!r} of an earlier one; give each another name")
        schema = inner.get("parameters")  # type: ignore[union-attr]
        schema = {"type": "object"} if schema is None else schema
        if not isinstance(schema, Mapping):
            raise UserError(f"parameters of tools[{place}] is {json.dumps(schema, default=str)[:80]}; give a schema")
        found[name] = schema
    return found


def _chosen(choice: Any) -> str:
    holder = choice.get("function", choice) if isinstance(choice, Mapping) else None
    name = holder.get("name") if isinstance(holder, Mapping) else None
    if not isinstance(name, str):
        shown = json.dumps(choice, default=str)[:80]
        raise UserError(f"tool_choice is {shown}; it must be auto, none, required, or name a function of tools")
    return name


def _listed(functions: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, functions)) or "none"


def _grammar(form: ToolFormat, tokenizer: Tokenizer, functions: Mapping[str, Any], parallel: bool) -> str:
    """Lark's grammar, in which JSON schemas may stand."""
    rules = []
    begin, end = (_mark(tokenizer, mark) for mark in (form.begin, form.end))
    key = "parameters" if form.kind == "llama" else "arguments"
    named, more = form.kind == "mistral" and form.named, f"{{0,{MOST_CALLS - 1}}}"
    for number, (name, schema) in enumerate(functions.items()):
        held = {**schema, "x-guidance": {"whitespace_flexible": True, "whitespace_pattern": BLANKS, "lenient": False}}
        head = f"{_quoted(name)} {_mark(tokenizer, '[ARGS]')}" if named else _quoted(f'{{"name": "{name}", "{key}": ')
        rules.append(f"call{number}: {head} %json {json.dumps(held)}" + ("" if named else ' "}"'))
    rules.append("call: " + " | ".join(f"call{number}" for number in range(len(functions))))
    if form.kind == "llama":
        start = "call"
    elif form.kind == "hermes":
        rules.append(f'one: {begin} "\\n" call "\\n" {end}')
        start = "one" + (f' ("\\n" one){more}' if parallel else "")
    elif named:
        rules.append(f"one: {begin} call")
        start = "one" + (f" one{more}" if parallel else "")
    else:
        others = f' (", " call){more}' if parallel else ""
        start = f'{begin} " "? "[" call{others} "]"'
    return "\n".join([f"start: {start}", *rules])


def _mark(tokenizer: Tokenizer, mark: str) -> str:
    """A mark in a grammar: one token by its number if the vocabulary has it, else its characters."""
    if not mark:
        return ""
    ids = tokenizer.encode(mark)
    if len(ids) != 1 or tokenizer.token(ids[0]) != mark:  # SentencePiece reads no control tokens in a text
        ids = [number for number in range(tokenizer.vocab_size) if tokenizer.token(number) == mark]
    return f"<[{ids[0]}]>" if ids else _quoted(mark)


def _quoted(text: str) -> str:
    return json.dumps(text)
