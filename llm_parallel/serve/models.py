"""What the server can be asked for: the names of its models, how their texts become tokens, and what fits."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llm_parallel.data.chat import ChatEncoder
from llm_parallel.data.template import Refused
from llm_parallel.data.tokenizer import Tokenizer
from llm_parallel.errors import UserError
from llm_parallel.serve.errors import ApiError, shown, wrong
from llm_parallel.serve.open import OpenedModel

Message = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """context: tokens of a prompt and its answer together; vocabulary: token ids are below it."""

    context: int
    vocabulary: int


class Served:
    """One model by one or more names, each of which stands for the base or an adapter on it.

    adapters: for each name the adapter that the generator is asked for, None for the base."""

    def __init__(self, opened: OpenedModel, limits: Limits, adapters: Mapping[str, str | None]) -> None:
        self._opened, self.limits, self.adapters = opened, limits, dict(adapters)
        self.tokenizer: Tokenizer = opened.tokenizer
        self.created = int(time.time())

    @property
    def names(self) -> list[str]:
        """All names, the base's first."""
        return list(self.adapters)

    def adapter(self, name: str | None) -> str | None:
        """The adapter of a name; no name stands for the first. Raises ApiError for a name that is not served."""
        if name is None:
            name = self.names[0]
        if name not in self.adapters:
            raise ApiError(
                404,
                f"the model {shown(name)} does not exist; this server has {', '.join(self.names)}",
                "model",
                "model_not_found",
            )
        return self.adapters[name]

    def describe(self, name: str) -> dict[str, Any]:
        """A model as ``/v1/models`` lists it."""
        found = {"id": name, "object": "model", "created": self.created, "owned_by": "llm-parallel"}
        return found | {"max_model_len": self.limits.context, "root": self.names[0]}

    @cached_property
    def chat(self) -> ChatEncoder:
        """What writes conversations. Raises ApiError if the model has none that works."""
        try:
            return self._opened.encoder()
        except UserError as error:
            raise wrong(f"the model cannot chat: {error}", "messages") from None

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a text."""
        return self._opened.ends

    @property
    def chat_ends(self) -> frozenset[int]:
        """Tokens that end an answer in a conversation."""
        return self._opened.ends | frozenset(self.chat.stops)

    def text_tokens(self, text: str) -> list[int]:
        """Tokens of a plain text, with those that the model expects before it."""
        return [*self._opened.begin, *map(int, self.tokenizer.encode(text))]

    def conversation_tokens(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
        """Tokens of a conversation up to where the assistant answers. Raises ApiError."""
        system = self._opened.system
        if system and all(message["role"] != "system" for message in messages):
            messages = [{"role": "system", "content": system}, *messages]
        try:
            return [int(token) for token in self.chat.prompt(messages, tools)]
        except Refused as error:
            raise wrong(f"the model's chat template refuses the conversation: {error}", "messages") from None

    def most_new_tokens(self, prompt: Sequence[int], wanted: int | None, param: str, default: int | None = None) -> int:
        """Tokens that an answer may have: ``wanted``, else at most ``default``, within the context. Raises ApiError
        with both numbers if prompt and answer do not fit."""
        context, length = self.limits.context, len(prompt)
        if length + (wanted or 1) > context:
            asked = f" and {wanted} are wanted for the answer" if wanted else ", which leaves none for an answer"
            raise wrong(
                f"the model's context is {context} tokens, and the prompt has {length}{asked}; shorten one of them",
                param,
                "context_length_exceeded",
            )
        room = context - length
        return wanted if wanted is not None else room if default is None else min(room, default)


@dataclass
class Names:
    """The names of tokens for answers with log-probabilities."""

    tokenizer: Tokenizer
    _known: dict[int, tuple[str, list[int]]] = field(default_factory=dict)

    @cached_property
    def _bytes_of_letters(self) -> dict[str, int]:
        """Byte-level vocabularies write each byte as a letter; these are the letters. Empty for other vocabularies."""
        if "\u0120" not in "".join(self.tokenizer.token(int(token)) for token in self.tokenizer.encode("a a")):
            return {}
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in plain]
        return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}

    def of(self, token: int) -> tuple[str, list[int]]:
        """The text that a token stands for, and its bytes, which may be a part of a character."""
        if token not in self._known:
            self._known[token] = self._find(token)
        return self._known[token]

    def _find(self, token: int) -> tuple[str, list[int]]:
        name = self.tokenizer.token(token)
        letters = self._bytes_of_letters
        if letters and name and all(letter in letters for letter in name):
            held = bytes(letters[letter] for letter in name)
        elif len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            held = bytes([int(name[3:5], 16)])
        else:
            held = (name if letters else name.replace("\u2581", " ")).encode()
        return held.decode("utf-8", "replace"), list(held)
