"""Conversations as clients of all ages write them, as the messages of a chat template."""

from __future__ import annotations

import json
from typing import Any

from llm_parallel.serve.errors import shown, wrong
from llm_parallel.serve.fields import Fields, checked_text
from llm_parallel.serve.models import Message

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
TEXT_PARTS = ("text", "input_text", "output_text")


def read_messages(fields: Fields) -> list[Message]:
    """The field ``messages``. Raises ApiError."""
    given = fields.items("messages")
    if not given:
        raise wrong("messages is empty; give at least one message", "messages")
    return [_message(one, f"messages[{number}]") for number, one in enumerate(given)]


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, dict):
        raise wrong(f"{where} is {shown(given)}; it must be an object with role and content", where)
    fields = Fields(given, f"{where}.")
    role = fields.choice("role", None, list(ROLES))
    if role is None:
        raise wrong(f"{where} has no role; give one of {', '.join(ROLES)}", f"{where}.role")
    message: Message = {"role": ROLES[role], "content": content_text(fields, "content")}
    calls = fields.items("tool_calls")
    if calls:
        if role != "assistant":
            raise wrong(f"{where}.tool_calls is given in a message of role {role}; only assistant calls", where)
        message["tool_calls"] = [_call(one, f"{where}.tool_calls[{n}]") for n, one in enumerate(calls)]
    if message["content"] is None:
        if not calls:
            raise wrong(f"{where} has no content; give a text", f"{where}.content")
        message["content"] = ""
    for name in ("name", "tool_call_id", "reasoning_content"):
        if fields.has(name):
            message[name] = fields.text(name)
    return message


def content_text(fields: Fields, name: str) -> str | None:
    """A text, or parts of text, joined. Raises ApiError for pictures and sound."""
    given = fields.raw(name)
    full = fields.named(name)
    if given is None or isinstance(given, str):
        return None if given is None else checked_text(given, full)
    if not isinstance(given, list):
        raise fields.fault(name, "a text or a list of parts of text")
    texts = []
    for number, part in enumerate(given):
        inner = f"{full}[{number}]"
        if isinstance(part, str):
            texts.append(checked_text(part, inner))
        elif isinstance(part, dict) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(checked_text(part["text"], inner))
        elif isinstance(part, dict) and part.get("type") == "refusal" and isinstance(part.get("refusal"), str):
            texts.append(checked_text(part["refusal"], inner))
        else:
            kind = part.get("type") if isinstance(part, dict) else part
            raise wrong(f"{inner} is of type {shown(kind)}; this model reads parts of type text with a text", inner)
    return "".join(texts)


def _call(given: Any, where: str) -> dict[str, Any]:
    """A call of a function with its arguments as an object, which templates expect."""
    function = given.get("function") if isinstance(given, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong(f"{where} is {shown(given)}; it must be an object with function.name and function.arguments", where)
    return call_message(given.get("id"), function["name"], function.get("arguments"), where)


def call_message(identity: Any, name: str, arguments: Any, where: str) -> dict[str, Any]:
    """The same from its parts. Raises ApiError for arguments that are no JSON object."""
    values = arguments if arguments not in (None, "") else {}
    if isinstance(values, str):
        try:
            values = json.loads(checked_text(values, where))
        except (ValueError, RecursionError):
            values = None
    if not isinstance(values, dict):
        raise wrong(f"the arguments of {where} are {shown(arguments)}; they must be a JSON object", where)
    function = {"name": checked_text(name, where), "arguments": values}
    call: dict[str, Any] = {"type": "function", "function": function}
    return call | ({"id": checked_text(identity, where)} if isinstance(identity, str) else {})


def read_tools(fields: Fields) -> list[dict[str, Any]]:
    """The functions that the model may call. Raises ApiError."""
    found = []
    for number, given in enumerate(fields.items("tools")):
        where = f"tools[{number}]"
        function = given.get("function", given) if isinstance(given, dict) else None
        if not isinstance(function, dict) or given.get("type", "function") != "function":
            raise wrong(f"{where} is {shown(given)}; it must be an object of type function", where)
        found.append({"type": "function", "function": _function(Fields(function, f"{where}.function."), where)})
    return found


def _function(fields: Fields, where: str) -> dict[str, Any]:
    name = fields.text("name")
    if not name:
        raise wrong(f"{where} has no name; give function.name", where)
    function: dict[str, Any] = {"name": name}
    if fields.has("description"):
        function["description"] = fields.text("description")
    parameters = fields.raw("parameters")
    if parameters is not None:
        if not isinstance(parameters, dict):
            raise fields.fault("parameters", "a JSON schema, which is an object")
        try:
            json.dumps(parameters, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError):
            raise wrong(f"{where}.function.parameters holds what cannot be written as UTF-8", where) from None
        function["parameters"] = parameters
    return function
