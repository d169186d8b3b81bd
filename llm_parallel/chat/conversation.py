"""A conversation and the file that holds it: OpenAI's messages as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write

Message = dict[str, Any]
SYSTEM_ROLES = ("system", "developer")
ROLES = (*SYSTEM_ROLES, "user", "assistant", "tool")


@dataclass
class Conversation:
    """Messages without the system message, and that apart. tries: how often the last question was answered before."""

    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    tries: int = 0

    def all(self) -> list[Message]:
        """All messages, the system message first if there is one."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.messages]

    def ask(self, text: str) -> bool:
        """Appends a question. A last question without an answer is left out, since templates refuse two in a row;
        returns whether there was one."""
        unanswered = bool(self.messages) and self.messages[-1]["role"] == "user"
        if unanswered:
            self.messages.pop()
        self.messages.append({"role": "user", "content": text})
        self.tries = 0
        return unanswered

    def take_answer(self, text: str) -> None:
        """Appends an answer, if it is not empty."""
        if text:
            self.messages.append({"role": "assistant", "content": text})

    def drop_answer(self) -> bool:
        """Removes what follows the last question, so that it can be answered again. False if there is no question."""
        place = self._last_question()
        if place is None:
            return False
        del self.messages[place + 1 :]
        self.tries += 1
        return True

    def drop_question(self) -> str | None:
        """Removes the last question and what follows it. Returns it, or None if there is none."""
        place = self._last_question()
        if place is None:
            return None
        text = self.messages[place]["content"]
        del self.messages[place:]
        return text

    def question(self) -> str | None:
        """The last question."""
        place = self._last_question()
        return None if place is None else self.messages[place]["content"]

    def _last_question(self) -> int | None:
        asked = [place for place, message in enumerate(self.messages) if message["role"] == "user"]
        return asked[-1] if asked else None


def save(conversation: Conversation, path: Path) -> None:
    """Writes ``{"messages": […]}``. Raises UserError if the file cannot be written, or is there and holds something
    else."""
    if path.exists():
        try:
            load(path)
        except UserError:
            raise UserError(f"{path} exists and holds no conversation; give another file") from None
    try:
        with atomic_write(path) as handle:
            json.dump({"messages": conversation.all()}, handle, indent=1, ensure_ascii=False)
            handle.write("\n")
    except (OSError, UnicodeEncodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "a message has half of a character in it"
        raise UserError(f"{path} cannot be written: {reason}; give another file") from None


def load(path: Path) -> Conversation:
    """Reads ``{"messages": […]}`` or the list alone. Raises UserError if the file has no such messages."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give a file that /save wrote") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); give a file that /save wrote") from None
    messages = read.get("messages") if isinstance(read, dict) else read
    if not isinstance(messages, list):
        raise UserError(f'{path} has no list of messages; it should be {{"messages": [{{"role": …, "content": …}}]}}')
    read_messages = [_message(message, number, path) for number, message in enumerate(messages, 1)]
    head = 0
    while head < len(read_messages) and read_messages[head]["role"] in SYSTEM_ROLES:
        head += 1
    system = "\n\n".join(message["content"] for message in read_messages[:head])
    return Conversation(system or None, read_messages[head:])


def _message(message: Any, number: int, path: Path) -> Message:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = repr(message.get("role")) if isinstance(message, dict) else "none"
        raise UserError(f"message {number} of {path} has the role {role}; it must be one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise UserError(f"message {number} of {path} has no text as its content; give a text")
    return {**message, "content": content}


def fitting(
    messages: Sequence[Message], fits: Callable[[Sequence[Message]], bool], left_out: int = 0
) -> tuple[list[Message], int] | None:
    """The messages that ``fits`` accepts, without the oldest turns where it must be, and how many were left out.

    A turn is a question and all up to the next one. The system message at the beginning stays, and so does the last
    turn: None if ``fits`` refuses it. ``left_out``: how many are known not to fit with the others.
    """
    head = 0
    while head < len(messages) and messages[head]["role"] in SYSTEM_ROLES:
        head += 1
    begins = [place for place in range(head + 1, len(messages)) if messages[place]["role"] == "user"]
    cuts = [cut for cut in (head, *begins) if cut - head >= left_out] or [head]
    for cut in cuts:
        kept = [*messages[:head], *messages[cut:]]
        if fits(kept):
            return kept, cut - head
    return None
