"""Records of conversations, by their fields: Alpaca, ShareGPT, OpenAI's messages, prompt and completion."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llm_parallel.config.tree_tune import Columns

ROLES = {
    "user": ("user", "human", "prompter", "question"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt", "ai", "answer", "output"),
    "system": ("system", "developer"),
    "tool": ("tool", "observation", "function", "function_response", "ipython", "tool_response", "environment"),
    "function_call": ("function_call", "tool_call", "tool_calls"),
}
KNOWN_ROLES = "user or human, assistant or gpt, system, tool or observation, function_call"
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
USUAL: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation"),
    "role": ("role", "from"),
    "content": ("content", "value"),
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions"),
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response"),
    "history": ("history",),
    "prompt": ("prompt", "question"),
    "completion": ("completion", "response", "answer"),
}
"""Names that fields have if the run file does not say otherwise."""
FORMATS = {
    "messages": "a list of turns with 'role' and 'content' in 'messages'",
    "sharegpt": "a list of turns with 'from' and 'value' in 'conversations'",
    "alpaca": "'instruction' and 'output'",
    "completion": "'prompt' and 'completion'",
}
KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
"""Further fields of a message that templates read."""
WEIGHTS = ("weight", "train", "training", "loss_weight")
DETAILS = ("train_detail", "training_detail")
"""Fields of other systems that say which characters of a turn are trained."""
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6
"""Weights of a turn besides 0; sums of losses in fp32 hold these."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Fields with what only models of more than text read."""
PAIR = ("chosen", "rejected")
COMPARED = "has two answers, 'chosen' and 'rejected'; `llm-parallel prefer` with method.kind=dpo learns from pairs"


class BadRecord(ValueError):
    """A record that is no conversation; the message goes on a sentence that begins with its place."""


def refuse_media(record: Mapping[str, Any]) -> None:
    """Raises BadRecord about a record with pictures, films or sounds, of which its text speaks."""
    seen = next((name for name in MEDIA if record.get(name)), None)
    if seen is not None:
        raise BadRecord(f"has {seen!r}, and only text can be trained on; leave the field out if the text needs it not")


@dataclass(frozen=True)
class Conversation:
    """messages: dicts with ``role`` (system, user, assistant, tool), ``content`` (text)
    and what else templates read; weights: of each message's tokens in the loss, 0 for whatever is not the assistant's;
    tools: what the assistant may call, or None."""

    messages: list[dict[str, Any]]
    weights: list[float]
    tools: list[Any] | None = None

    def with_system(self, text: str | None) -> Conversation:
        """The conversation with that system message, unless it has one."""
        if not text or any(message["role"] == "system" for message in self.messages):
            return self
        return replace(
            self, messages=[{"role": "system", "content": text}, *self.messages], weights=[0.0, *self.weights]
        )

    def without(self, start: int, end: int) -> Conversation:
        """The conversation without the messages [start, end)."""
        return replace(
            self,
            messages=self.messages[:start] + self.messages[end:],
            weights=self.weights[:start] + self.weights[end:],
        )


def merged(conversation: Conversation) -> Conversation:
    """The conversation with each message joined, after a blank line, to the one before it if both have the same role,
    the same weight and nothing but text."""
    messages: list[dict[str, Any]] = []
    weights: list[float] = []
    for message, weight in zip(conversation.messages, conversation.weights):
        before = messages[-1] if messages else {}
        plain = before.keys() == message.keys() == {"role", "content"} and message["role"] != "tool"
        if plain and before["role"] == message["role"] and weights[-1] == weight:
            joined = "\n\n".join(text for text in (before["content"], message["content"]) if text)
            messages[-1] = {"role": message["role"], "content": joined}
            continue
        messages.append(message)
        weights.append(weight)
    return replace(conversation, messages=messages, weights=weights)


class Reader:
    """Reads the records of one source. ``wanted`` is a format or "auto"; ``columns`` are the names of its fields, and
    ``roles`` names of roles besides the usual ones. ``asked_for_others``: how many turns that are not the assistant's
    ask to be trained, which they are not."""

    def __init__(
        self, wanted: str = "auto", columns: Columns | None = None, roles: Mapping[str, str] | None = None
    ) -> None:
        self._wanted = wanted
        given = (columns or Columns()).model_dump()
        self._names = {field: ((given[field],) if given.get(field) else names) for field, names in USUAL.items()}
        self._roles = {**ROLE_OF, **(roles or {})}
        self.found: dict[str, int] = {}
        self.asked_for_others = 0

    def read(self, record: Any) -> Conversation:
        """The conversation of a record; ``found`` counts the records of each format. Raises BadRecord."""
        if not isinstance(record, Mapping):
            raise BadRecord(f"is {_kind(record)} where a record with named fields is expected")
        refuse_media(record)
        compared = all(record.get(name) is not None for name in PAIR)
        try:
            form = self._recognised(record)
            conversation = getattr(self, f"_{form}")(record)
        except BadRecord:
            if compared:
                raise BadRecord(COMPARED) from None
            raise
        if compared and conversation.messages and conversation.messages[-1]["role"] != "assistant":
            raise BadRecord(COMPARED)
        if not conversation.messages:
            raise BadRecord("holds no messages")
        if not any(message["role"] == "assistant" for message in conversation.messages):
            raise BadRecord("has no turn of the assistant, so there is nothing to learn from it")
        tools = conversation.tools or self.tools(record)
        shown = form if form not in ("messages", "sharegpt") else self._dialect(record)
        self.found[shown] = self.found.get(shown, 0) + 1
        return replace(conversation, tools=tools)

    def turns(self, value: Any, field: str = "messages") -> list[dict[str, Any]]:
        """A list of turns as messages. Raises BadRecord."""
        return self._turns(_parsed(value), field)[0]

    def turns_or_text(self, value: Any) -> Any:
        """What is a text or a list of turns, and a table holds the list as text: the list, if all of it are turns."""
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                found = json.loads(value)
            except (ValueError, RecursionError):
                return value
            roles = set(self._names["role"])
            if isinstance(found, list) and found and all(isinstance(one, dict) and roles & one.keys() for one in found):
                return found
        return value

    def prompt(self, record: Mapping[str, Any]) -> Conversation:
        """What stands before an answer that is kept in another field: the text or turns of 'prompt', Alpaca's question,
        or a list of turns; without messages where there is none of these. Raises BadRecord."""
        messages: list[dict[str, Any]] = []
        value = self.turns_or_text(self._get(record, "prompt"))
        if isinstance(value, str):
            messages = [{"role": "user", "content": value}] if value else []
        elif value is not None:
            messages = self._turns(value, "prompt")[0]
        elif self._get(record, "instruction") is not None:
            messages = self._question(record)
        elif (turns := _parsed(self._get(record, "messages"))) is not None:
            messages = self._turns(turns, self._names["messages"][0])[0]
        found = Conversation(messages, [0.0] * len(messages), self.tools(record))
        return _with_system(found, _text_or_none(self._get(record, "system"), "system")) if messages else found

    def tools(self, record: Mapping[str, Any]) -> list[Any] | None:
        """What the assistant may call, a list or the JSON of one; None if there is nothing. Raises BadRecord."""
        tools = self._get(record, "tools")
        if isinstance(tools, str):
            if not tools.strip():
                return None
            tools = _json(tools, "'tools'")
        return None if not tools else _listed(tools, "tools")

    def _recognised(self, record: Mapping[str, Any]) -> str:
        if self._wanted != "auto":
            return self._wanted
        turns = self._get(record, "messages")
        if turns is not None:
            return "messages"
        if self._get(record, "instruction") is not None and self._get(record, "output") is not None:
            return "alpaca"
        if self._get(record, "prompt") is not None and self._get(record, "completion") is not None:
            return "completion"
        raise BadRecord(
            f"has the fields {', '.join(map(repr, record))}, of which no conversation can be made; known are "
            f"{'; '.join(FORMATS.values())}; other names can be given in `columns` of the source"
        )

    def _dialect(self, record: Mapping[str, Any]) -> str:
        turns = _parsed(self._get(record, "messages"))
        return "sharegpt" if turns and isinstance(turns[0], Mapping) and "from" in turns[0] else "messages"

    def _get(self, record: Mapping[str, Any], field: str) -> Any:
        return next((record[name] for name in self._names[field] if record.get(name) is not None), None)

    def _need(self, record: Mapping[str, Any], field: str) -> Any:
        value = self._get(record, field)
        if value is None:
            names = " or ".join(map(repr, self._names[field]))
            raise BadRecord(f"has no field {names}; its fields are {', '.join(map(repr, record))}")
        return value

    def _messages(self, record: Mapping[str, Any]) -> Conversation:
        turns = _parsed(self._need(record, "messages"))
        messages, weights = self._turns(turns, self._names["messages"][0])
        return _with_system(Conversation(messages, weights), _text_or_none(self._get(record, "system"), "system"))

    _sharegpt = _messages

    def _alpaca(self, record: Mapping[str, Any]) -> Conversation:
        messages = self._question(record)
        messages.append({"role": "assistant", "content": _text(self._need(record, "output"), "output")})
        found = Conversation(messages, [float(message["role"] == "assistant") for message in messages])
        return _with_system(found, _text_or_none(self._get(record, "system"), "system"))

    def _question(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Alpaca's earlier questions with their answers, and its question."""
        messages: list[dict[str, Any]] = []
        for pair in _listed(_parsed(self._get(record, "history")) or [], "history"):
            if not (isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
                raise BadRecord("has a 'history' that is not a list of pairs of texts, question and answer")
            messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        asked = [_text(self._need(record, "instruction"), "instruction"), self._get(record, "input")]
        question = "\n".join(text for text in (asked[0], _text_or_none(asked[1], "input")) if text)
        if not question:
            raise BadRecord("has an empty 'instruction' and no 'input'")
        return [*messages, {"role": "user", "content": question}]

    def _completion(self, record: Mapping[str, Any]) -> Conversation:
        parts = []
        for field, role in (("prompt", "user"), ("completion", "assistant")):
            value = self.turns_or_text(self._need(record, field))
            if isinstance(value, str):
                parts.append(([{"role": role, "content": value}], [float(role == "assistant")]))
            else:
                parts.append(self._turns(value, field))
        (asked, weights), (answered, trained) = parts
        found = Conversation([*asked, *answered], [*(0.0 for _ in weights), *trained])
        return _with_system(found, _text_or_none(self._get(record, "system"), "system"))

    def _turns(self, turns: Any, field: str) -> tuple[list[dict[str, Any]], list[float]]:
        messages, weights = [], []
        for number, turn in enumerate(_listed(turns, field), 1):
            if not isinstance(turn, Mapping):
                raise BadRecord(f"has a turn {number} that is {_kind(turn)} where fields such as 'role' are expected")
            message = self._turn(turn, number)
            messages.append(message)
            spoken = message["role"] == "assistant"
            weights.append(_weight(turn, number) if spoken else 0.0)
            self.asked_for_others += not spoken and any(turn.get(name) for name in (*WEIGHTS, *DETAILS))
        return messages, weights

    def _turn(self, turn: Mapping[str, Any], number: int) -> dict[str, Any]:
        named = self._get(turn, "role")
        role = self._roles.get(named.strip().lower()) if isinstance(named, str) else None
        if role is None:
            names = " or ".join(map(repr, self._names["role"]))
            what = f"the role {named!r}" if named is not None else f"no {names}"
            raise BadRecord(f"has a turn {number} with {what}; known roles are {KNOWN_ROLES}")
        content = self._get(turn, "content")
        if role == "function_call":
            return {"role": "assistant", "content": "", "tool_calls": _calls_of(content, number)}
        message: dict[str, Any] = {"role": role, "content": _joined(content, number)}
        for field in KEPT:
            if turn.get(field):
                message[field] = turn[field]
        if "tool_calls" in message:
            message["tool_calls"] = [
                _call(call, number) for call in _listed(_parsed(message["tool_calls"]), "tool_calls")
            ]
        if message["content"] is None:
            if "tool_calls" not in message:
                names = " or ".join(map(repr, self._names["content"]))
                raise BadRecord(f"has a turn {number} of the role {named!r} without {names}")
            # None is the word "None" in templates that know no tool calls.
            message["content"] = ""
        return message


def _with_system(conversation: Conversation, text: str | None) -> Conversation:
    return conversation.with_system(text)


def _weight(turn: Mapping[str, Any], number: int) -> float:
    if detail := next((name for name in DETAILS if turn.get(name)), None):
        raise BadRecord(f"has a turn {number} with {detail!r}, and only whole turns can be weighted, by 'weight'")
    given = next((turn[name] for name in WEIGHTS if turn.get(name) is not None), 1.0)
    if not isinstance(given, (bool, int, float)) or not (given == 0 or LEAST_WEIGHT <= given <= MOST_WEIGHT):
        raise BadRecord(
            f"has a turn {number} of weight {given!r}; a weight is 0, or from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}, and "
            "'train' is true or false"
        )
    return float(given)


def _joined(content: Any, number: int) -> str | None:
    """The text of a content, which may be a list of parts of type "text"."""
    if content is None or isinstance(content, str):
        return content
    pieces = []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            pieces.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, Mapping) else _kind(part)
        text = part.get("text", part.get("value")) if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            raise BadRecord(f"has a turn {number} with a content of type {kind!r}; only text can be trained on")
        pieces.append(text)
    return "".join(pieces)


def _calls_of(content: Any, number: int) -> list[Any]:
    calls = _json(content, f"the function call of turn {number}") if isinstance(content, str) else content
    return [_call(call, number) for call in (calls if isinstance(calls, list) else [calls])]


def _call(call: Any, number: int) -> dict[str, Any]:
    """A tool call in OpenAI's form, with its arguments as an object where they are one."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRecord(f"has a turn {number} with a tool call that has no 'name'")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = arguments
        arguments = parsed if isinstance(parsed, dict) else arguments
    found: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if call.get("id"):
        found["id"] = call["id"]
    return found


def _parsed(value: Any) -> Any:
    """A list that a table holds as JSON text, as a list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        return _json(value, "a list of turns")
    return value


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"holds {what} as text that is not JSON ({error})") from None


def _listed(value: Any, field: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise BadRecord(f"has {_kind(value)} in {field!r} where a list is expected")
    return list(value)


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"has {_kind(value)} in {field!r} where text is expected")
    return value


def _text_or_none(value: Any, field: str) -> str | None:
    return None if value is None else _text(value, field)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "nothing" if value is None else names.get(type(value), f"a value of type {type(value).__name__}")
