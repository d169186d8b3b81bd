"""Conversations as tokens: which of them are trained, where an answer stops, and what is cut from one that is too long.

The whole conversation is rendered and encoded once. Trained are the tokens of the assistant's turns, from behind what
the template writes to ask for an answer (``add_generation_prompt``) to the token that ends the turn, with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llm_parallel.data.chat_tokens import PRIVATE, ChatTokenizer, Encoded
from llm_parallel.data.formats import Conversation, merged
from llm_parallel.data.template import ChatTemplate, Message, Refused, Rendered
from llm_parallel.errors import UserError

QUESTION, ANSWER = "A question?", "An answer."
CALL: Message = {"type": "function", "id": "call00001", "function": {"name": "find", "arguments": {"what": "it"}}}
NO_THOUGHT = {"enable_thinking": False}


@dataclass(frozen=True)
class ChatTokens:
    """ids int32 [n] of a conversation, and weights fp32 [n] of their losses: 0 for what is not trained. turns_cut:
    messages that were left out; answer_cut: whether the last answer lacks its end; merged: messages that became part of
    the one before them, since the template refuses two of the same role."""

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    turns_cut: int = 0
    answer_cut: bool = False
    merged: int = 0


class ChatEncoder:
    """Turns conversations into tokens. ``stops``: ids of the tokens at which a model has to stop: the one that
    ends the answers here, then those that the tokenizer and generation_config.json declare.

    Raises UserError if the template cannot write a question and its answer, or ends answers without a special token of
    the tokenizer, so that a model could not learn to stop."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        template: ChatTemplate,
        train_on: Literal["all_turns", "last_turn"] = "all_turns",
        system: str | None = None,
    ) -> None:
        self.tokenizer, self.template, self._train_on, self._system = tokenizer, template, train_on, system
        self._headers: dict[str, tuple[str, str]] = {}
        self._escape = tokenizer.escaper()
        self._escape_others = tokenizer.escaper(name for name in tokenizer.added if name in template.literals)
        self.declared = declared_stops(tokenizer)
        self._specials = re.compile(
            "|".join(map(re.escape, sorted(tokenizer.special, key=len, reverse=True))) or "(?!)"
        )
        ends = self._ends_of_answers()
        self.stops = tuple(dict.fromkeys([ends[-1][0], *self.declared]))
        self._appended = ends[-1][0] if ends[-1][1] else None
        self._stop_ids = {*self.stops, ends[0][0]}
        names = [name for name, number in tokenizer.special.items() if number in self._stop_ids]
        self._stop_names = tuple(names)

    @cached_property
    def writes_calls(self) -> bool:
        """Whether the template writes calls of tools; if it cannot be tried, it is taken to."""
        return self._writes([_user(), _calling("")])

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the template writes which tools there are; if it cannot be tried, it is taken to."""
        function = {**CALL["function"], "description": ANSWER, "parameters": {"type": "object", "properties": {}}}
        return self._writes([_user(), _assistant()], [{"type": "function", "function": function}])

    def _writes(self, messages: Sequence[Message], tools: Any = None) -> bool:
        """Whether the name of the function in ``CALL`` is part of the text."""
        try:
            return CALL["function"]["name"] in self.template.text(self._escaped(messages), tools)
        except Refused:
            return True

    def remarks(self) -> list[str]:
        """What a user should know about this template and tokenizer."""
        found = []
        stop = self.stops[0]
        if stop not in self.declared:
            named = " and ".join(self.tokenizer.name_of(n) or str(n) for n in self.declared)
            found.append(
                f"{self.tokenizer.name_of(stop)} ends answers, and the model's files name {named} only: whatever "
                f"generates with the trained model has to stop at token {stop} too"
            )
        if self.template.has_generation:
            rendered = self.template.render([_user(), _assistant()])
            turn, answers = rendered.turns[1], rendered.answers
            if turn is not None and answers:
                asked = turn[0] + self._header_length(rendered.text[turn[0] : turn[1]], "user")
                if answers[0][0] < asked:
                    found.append(
                        f"the template marks {rendered.text[answers[0][0] : asked]!r} as written by the assistant, "
                        "though it writes that itself to ask for an answer; it is trained as marked"
                    )
        return found

    def encode(self, conversation: Conversation) -> ChatTokens:
        """All tokens of a conversation. Raises Refused if the template refuses it."""
        return self._encode(conversation)[0]

    def encode_within(self, conversation: Conversation, limit: int, cut: bool = True) -> ChatTokens | None:
        """Tokens up to the last trained one, at most ``limit``: the earliest turns are left out, and of the last answer
        its end. None if nothing trained is left, or, without ``cut``, if they are more. Raises Refused."""
        found, places, conversation = self._encode(conversation)
        tokens = _trimmed(found)
        if tokens is None or len(tokens.ids) <= limit:
            return tokens
        if not cut:
            return None
        heads = heads_of(conversation.messages)
        gone, whole = 0, len(tokens.ids)
        for place in heads[1:]:
            if len(tokens.ids) <= limit:
                break
            if whole - (places[place] - places[heads[0]]) > limit and place != heads[-1]:
                continue
            shorter = conversation.without(heads[0], place)
            shortened = _trimmed(self._encode(shorter)[0])
            if shortened is None:
                break
            tokens, gone = shortened, place - heads[0]
        if len(tokens.ids) > limit:
            kept = _trimmed(replace(tokens, ids=tokens.ids[:limit], weights=tokens.weights[:limit]))
            return None if kept is None else replace(kept, turns_cut=gone, answer_cut=True, merged=found.merged)
        return replace(tokens, turns_cut=gone, merged=found.merged)

    def prompt(self, messages: Sequence[Message], tools: Any = None) -> NDArray[np.int32]:
        """Tokens of a conversation up to where the assistant answers. Raises Refused."""
        text = self.template.text(self._escaped(messages), self._escaped_value(tools), generation_prompt=True)
        return self.tokenizer.encode(text).ids

    def _encode(self, conversation: Conversation) -> tuple[ChatTokens, list[int], Conversation]:
        """All tokens, the number of tokens before each message, and the conversation with its system message and what
        had to be joined."""
        conversation = conversation.with_system(self._system)
        rendered, conversation, gone = self._rendered(conversation)
        encoded = self.tokenizer.encode(rendered.text)
        weights = np.zeros(len(encoded.ids), np.float32)
        ids = encoded.ids
        wanted = conversation.weights
        if self._train_on == "last_turn":
            last = max((n for n, weight in enumerate(wanted) if weight), default=-1)
            wanted = [weight if n == last else 0.0 for n, weight in enumerate(wanted)]
        for start, end, weight in self._trained(rendered, conversation.messages, wanted):
            part = encoded.covering(start, end)
            weights[part] = weight
            if part.stop and int(ids[part.stop - 1]) in self._stop_ids:
                continue
            if part.stop < len(encoded.ids):
                if int(ids[part.stop]) in self._stop_ids:
                    weights[part.stop] = weight
            elif self._appended is not None:
                ids = np.append(ids, np.int32(self._appended))
                weights = np.append(weights, np.float32(weight))
        places = _places(rendered, encoded)
        return ChatTokens(ids, weights, merged=gone), places, conversation

    def _trained(
        self, rendered: Rendered, messages: Sequence[Message], wanted: Sequence[float]
    ) -> list[tuple[int, int, float]]:
        """Characters that are trained, with their weights."""
        found = []
        if self.template.has_generation:
            return self._marked(rendered, messages, wanted)
        for number, weight in enumerate(wanted):
            if not weight:
                continue
            turn = rendered.turns[number]
            if turn is None:
                raise Refused(
                    f"the template writes nothing for message {number + 1}, or not in a loop over the messages; "
                    "{% generation %} and {% endgeneration %} around what the assistant writes would say where it is"
                )
            start, end = turn
            before = messages[number - 1]["role"] if number else "none"
            start += self._header_length(rendered.text[start:end], before)
            found.append((start, self._end(rendered.text, start, end), float(weight)))
        return found

    def _marked(
        self, rendered: Rendered, messages: Sequence[Message], wanted: Sequence[float]
    ) -> list[tuple[int, int, float]]:
        """Characters that the template marks as the assistant's, with their weights."""
        spoken = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        found = []
        for place, (start, end) in enumerate(rendered.answers):
            inside = [n for n, one in enumerate(rendered.turns) if one and one[0] <= start < one[1]]
            # Where no loop over messages tells whose turn it is, the marks stand for the assistant's in order.
            in_order = spoken if len(spoken) == len(rendered.answers) else []
            weight = float(wanted[inside[0]]) if inside else float(wanted[in_order[place]]) if in_order else 1.0
            found.append((start, self._end(rendered.text, start, end), weight))
        return [one for one in found if one[2] and one[1] > one[0]]

    def _end(self, text: str, start: int, end: int) -> int:
        """Where the trained part of a turn ends: behind its stop token, without the blanks after that."""
        written = text[start:end].rstrip()
        return start + len(written) if written.endswith(self._stop_names) and written else end

    def _rendered(self, conversation: Conversation) -> tuple[Rendered, Conversation, int]:
        try:
            return self._render(conversation), conversation, 0
        except Refused:
            joined = merged(conversation)
            gone = len(conversation.messages) - len(joined.messages)
            if not gone:
                raise
            return self._render(joined), joined, gone

    def _render(self, conversation: Conversation) -> Rendered:
        return self.template.render(self._escaped(conversation.messages), self._escaped_value(conversation.tools))

    def _escaped(self, messages: Sequence[Message]) -> list[Message]:
        """Copies of messages in which no text is a special token."""
        found = []
        for message in messages:
            escape = self._escape if message["role"] == "assistant" else self._escape_others
            copy = {key: _mapped(value, escape) for key, value in message.items() if key != "role"}
            if copy.get("tool_calls"):
                if copy.get("content") == "":
                    copy["content"] = self._no_content
                if not self._dict_arguments:
                    copy["tool_calls"] = [_with_json_arguments(call) for call in copy["tool_calls"]]
            found.append({"role": message["role"], **copy})
        return found

    def _escaped_value(self, tools: Any) -> Any:
        return _mapped(tools, self._escape_others)

    @cached_property
    def _dict_arguments(self) -> bool:
        """Whether the template takes a tool call's arguments as an object; else it takes JSON."""
        try:
            self.template.text([_user(), _calling(self._no_content)])
            return True
        except Refused:
            pass
        try:
            self.template.text([_user(), _calling(self._no_content, _with_json_arguments(CALL))])
            return False
        except Refused:
            return True

    @cached_property
    def _no_content(self) -> str | None:
        """What the content of a message is that holds nothing but calls of tools. Some templates write them only where
        it is none, as DeepSeek's; others write the word "None" there."""
        for content in ("", None):
            for call in (CALL, _with_json_arguments(CALL)):
                with suppress(Refused):
                    if CALL["function"]["name"] in self.template.text([_user(), _calling(content, call)]):
                        return content
        return ""

    def _header_length(self, turn: str, before: str) -> int:
        """Characters at the beginning of an assistant's turn that the template itself writes to ask for an answer."""
        if before not in self._headers:
            self._headers[before] = self._find_headers(before)
        plain, thoughtless = self._headers[before]
        if thoughtless and turn.startswith(thoughtless):
            return len(thoughtless)
        return len(plain) if turn.startswith(plain) else _common(turn, plain)

    def _find_headers(self, before: str) -> tuple[str, str]:
        """What the template asks for an answer with, after a message of the role ``before``: as usual, and if it is
        told not to think (empty if that is the same)."""
        prefix: list[Message] = [_user()]
        if before == "tool":
            prefix += [
                _calling(""),
                {"role": "tool", "content": "It.", "name": "find", "tool_call_id": CALL["id"]},
            ]
        elif before == "assistant":
            prefix += [_assistant()]
        elif before in ("system", "none"):
            prefix = [{"role": "system", "content": "Help."}] if before == "system" else []
        try:
            rendered = self.template.render(self._escaped([*prefix, _assistant()]))
            turn = rendered.turns[-1]
            if turn is None:
                return "", ""
            written = rendered.text[turn[0] : turn[1]]
            asked = self.template.text(self._escaped(prefix), generation_prompt=True)
            if asked[: turn[0]] == rendered.text[: turn[0]]:
                header = written[: _common(written, asked[turn[0] :])]
            else:
                header = written[: _common(written, self._asked(prefix))]
            thoughtless = self._asked(prefix, **NO_THOUGHT) if self.template.thinks else ""
        except Refused:
            return self._find_headers("user") if before != "user" else ("", "")
        header = header[: header.find(ANSWER)] if ANSWER in header else header
        return header, thoughtless if len(thoughtless) > len(header) and written.startswith(thoughtless) else ""

    def _asked(self, prefix: Sequence[Message], **more: Any) -> str:
        without = self.template.text(self._escaped(prefix), **more)
        asked = self.template.text(self._escaped(prefix), generation_prompt=True, **more)
        return asked[_common(asked, without) :]

    def _ends_of_answers(self) -> list[tuple[int, bool]]:
        """The token that ends an answer in the middle of a conversation and at its end, and whether it is only the next
        turn that brings it."""
        messages = [_user(), _assistant(), _user(), _assistant()]
        try:
            rendered = self.template.render(messages)
        except Refused as error:
            raise UserError(f"{self.template.origin} refuses a question with its answer: {error}") from None
        found: list[tuple[int, bool]] = []
        for place in (1, 3):
            turn = rendered.turns[place]
            if turn is None and len(rendered.answers) == 2:
                turn = rendered.answers[place // 2]
            if turn is None:
                raise UserError(
                    f"{self.template.origin} does not write messages in a loop over them, so which characters the "
                    "assistant writes is not known; put {% generation %} and {% endgeneration %} around them"
                )
            behind = rendered.text.find(ANSWER, turn[0]) + len(ANSWER)
            inside = self._specials.search(rendered.text, behind, turn[1])
            after = self._specials.match(rendered.text, turn[1])
            if inside:
                found.append((self.tokenizer.special[inside.group()], False))
            elif after:
                found.append((self.tokenizer.special[after.group()], True))
            elif found and found[0][1]:
                found.append(found[0])
            else:
                raise UserError(
                    f"{self.template.origin} ends an answer with {rendered.text[behind : behind + 20]!r}, in which no "
                    f"special token of tokenizer {self.tokenizer.tokenizer.name} is, so a model cannot learn to stop; "
                    "let the template end answers with {{ eos_token }}"
                )
        return found


def declared_stops(tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """Tokens that end an answer as the tokenizer and the generation_config.json beside it say."""
    try:
        config = json.loads((tokenizer.folder / "generation_config.json").read_text(encoding="utf-8"))
        ends = config.get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        ends = None
    numbers = ends if isinstance(ends, list) else [ends]
    return tuple(dict.fromkeys([tokenizer.eos, *(n for n in numbers if isinstance(n, int))]))


def holds_private(conversation: Conversation) -> bool:
    """Whether some text holds a character that the encoder uses itself."""
    return bool(PRIVATE.search(json.dumps([conversation.messages, conversation.tools], ensure_ascii=False)))


def _user() -> Message:
    return {"role": "user", "content": QUESTION}


def _assistant() -> Message:
    return {"role": "assistant", "content": ANSWER}


def _calling(content: str | None, call: Message = CALL) -> Message:
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def _mapped(value: Any, function: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(held, function) for key, held in value.items()}
    return [_mapped(held, function) for held in value] if isinstance(value, list) else value


def _with_json_arguments(call: Any) -> Any:
    function = call.get("function", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        return call
    changed = {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {**call, "function": changed} if "function" in call else changed


def _common(one: str, other: str) -> int:
    """Number of characters that two texts begin with alike."""
    length = 0
    for a, b in zip(one, other):
        if a != b:
            break
        length += 1
    return length


def _places(rendered: Rendered, encoded: Encoded) -> list[int]:
    """Tokens before each message; a message of which nothing is written begins where the one before it does."""
    starts = [-1 if turn is None else encoded.covering(turn[0], turn[1]).start for turn in rendered.turns]
    return list(accumulate(starts, max))


def heads_of(messages: Sequence[Message]) -> list[int]:
    """The messages with which a question begins: the first of the user's after another role."""
    roles = [message["role"] for message in messages]
    heads = [n for n, role in enumerate(roles) if role == "user" and (not n or roles[n - 1] != "user")]
    return heads or [0]


def _trimmed(tokens: ChatTokens) -> ChatTokens | None:
    """The tokens up to the last trained one; None if there is none. The first token is never a label."""
    weights = tokens.weights.copy()
    weights[:1] = 0.0
    trained = np.nonzero(weights)[0]
    if not len(trained):
        return None
    end = int(trained[-1]) + 1
    return replace(tokens, ids=tokens.ids[:end], weights=weights[:end])
