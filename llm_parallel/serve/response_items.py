"""The input of ``/v1/responses`` as the messages of a conversation."""

from __future__ import annotations

from typing import Any

from llm_parallel.serve.errors import shown, wrong
from llm_parallel.serve.fields import Fields, checked_text
from llm_parallel.serve.messages import ROLES, call_message, content_text
from llm_parallel.serve.models import Message


def read_input(fields: Fields) -> list[Message]:
    """``instructions`` and ``input``. Raises ApiError."""
    instructions = fields.text("instructions")
    messages: list[Message] = [{"role": "system", "content": instructions}] if instructions else []
    given = fields.raw("input")
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": checked_text(given, "input")}]
    if not isinstance(given, list) or not given:
        raise fields.fault("input", "a text, or a list of at least one item")
    for number, item in enumerate(given):
        where = f"input[{number}]"
        if not isinstance(item, dict):
            raise wrong(f"{where} is {shown(item)}; it must be an object", where)
        _add(messages, Fields(item, f"{where}."), where)
    if not messages:
        raise wrong("input holds no message; give at least one", "input")
    return messages


def _add(messages: list[Message], item: Fields, where: str) -> None:
    kind = item.raw("type") or "message"
    if kind == "message":
        role = item.choice("role", None, list(ROLES))
        content = content_text(item, "content")
        if role is None or content is None:
            raise wrong(f"{where} has no {'role' if role is None else 'content'}; a message needs both", where)
        messages.append({"role": ROLES[role], "content": content})
    elif kind == "function_call":
        call = call_message(item.raw("call_id"), item.text("name") or "", item.raw("arguments"), where)
        if not (messages and messages[-1]["role"] == "assistant"):
            messages.append({"role": "assistant", "content": ""})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        output: Any = content_text(item, "output")
        message: Message = {"role": "tool", "content": output or ""}
        if item.has("call_id"):
            message["tool_call_id"] = item.text("call_id")
        messages.append(message)
    elif kind != "reasoning":  # a thought of an earlier answer, which this model does not read
        raise wrong(
            f"{where} is of type {shown(kind)}; it must be message, function_call or function_call_output", where
        )
