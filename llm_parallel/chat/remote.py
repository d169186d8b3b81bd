"""A server with OpenAI's interface as what answers, over HTTP with nothing but Python's library."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from llm_parallel.chat.backend import Event, Interrupt, LeftOut, Note, Text
from llm_parallel.chat.conversation import Message, fitting
from llm_parallel.chat.request import Settings
from llm_parallel.errors import UserError
from llm_parallel.printable import printable
from llm_parallel.remote import base_of, is_private, key_of, opener, reason, refusal

KEY_NAME = "OPENAI_API_KEY"
"""Environment variable that holds the API key."""
CONNECT_S, SILENCE_S = 20.0, 600.0
MAX_LINE_BYTES = 1 << 24
FROM_SERVER = "the server's"


def is_address(text: str) -> bool:
    """Whether a model's name is the address of a server."""
    return text.startswith(("http://", "https://"))


class RemoteModel:
    """See ``Backend``. Raises UserError if the address is wrong, the server cannot be reached, or it has no model
    ``name``."""

    def __init__(self, address: str, name: str | None, environment: Mapping[str, str]) -> None:
        self._base = base_of(address, KEY_NAME)
        self._key = key_of(environment, KEY_NAME)
        self._opener = opener(self._base)
        self._dropped: list[Message] = []
        self.system: str | None = None
        self.defaults: dict[str, object] = dict.fromkeys(
            ("temperature", "top_p", "max_new_tokens", "seed"), FROM_SERVER
        )
        self._name = name or ""
        names = self.models()
        if name is not None and names and name not in names:
            raise UserError(f"{address} has no model {name}; it has {', '.join(names)}")
        if name is None and not names:
            raise UserError(f"{address} does not say which models it has; give --name")
        self._name = name or names[0]
        self.remark = (
            f"the API key goes to {self._base} unencrypted" if self._key and not is_private(self._base) else None
        )

    @property
    def title(self) -> str:
        """The model's name and the address."""
        return f"{self._name} at {self._base}"

    def models(self) -> list[str]:
        """Names of the server's models, the one that answers first; empty if the server has no list."""
        try:
            with closing(self._request("/models")) as response:
                listed = json.load(response)["data"]
            names = [str(model["id"]) for model in listed]
        except _Refusal as error:
            if error.status == 404:
                return []
            raise UserError(str(error)) from None
        except UserError:
            raise
        except (ValueError, LookupError, TypeError, OSError, http.client.HTTPException):
            raise UserError(f"{self._base} does not answer as OpenAI's interface does; is the address right?") from None
        return sorted(map(printable, names), key=lambda name: name != self._name)

    def choose(self, name: str) -> bool:
        """Lets another of the server's models answer."""
        if name not in self.models():
            return False
        self._name = name
        return True

    def close(self) -> None:
        """Nothing is kept open between answers."""

    def reopen(self) -> None:
        """Nothing was closed."""

    def answer(
        self, messages: Sequence[Message], settings: Settings, tries: int, interrupt: Interrupt
    ) -> Iterator[Event]:
        """Streams an answer. Where the server refuses a conversation as too long, its oldest turns are left out."""
        refused: list[_Refusal] = []
        found: list[http.client.HTTPResponse] = []

        def fits(kept: Sequence[Message]) -> bool:
            try:
                response = interrupt.wait(lambda: self._request("/chat/completions", self._body(kept, settings, tries)))
            except _Refusal as error:
                if not error.is_too_long:
                    raise UserError(str(error)) from None
                refused.append(error)
                return False
            found.extend([] if response is None else [response])
            return True  # also if the user does not want to wait any longer

        same = [message for message in messages if message["role"] not in ("system", "developer")]
        known = len(self._dropped) if self._dropped == same[: len(self._dropped)] else 0
        kept = fitting(messages, fits, known)
        if kept is None:
            raise UserError(str(refused[-1]))
        if not found:
            return
        self._dropped = same[: kept[1]]
        if kept[1]:
            yield LeftOut(kept[1])
        with closing(found[0]) as response:
            yield from _answer(response, interrupt)

    def _body(self, messages: Sequence[Message], settings: Settings, tries: int) -> dict[str, Any]:
        values = {
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_new_tokens,
            "seed": None if settings.seed is None else settings.seed + tries,
        }
        given = {name: value for name, value in values.items() if value is not None}
        return {"model": self._name, "messages": list(messages), "stream": True, **given}

    def _request(self, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
        headers = {"Accept": "text/event-stream" if body else "application/json", "User-Agent": "llm-parallel"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        request = urllib.request.Request(self._base + path, data, headers)
        try:
            response = self._opener.open(request, timeout=SILENCE_S if body else CONNECT_S)
        except urllib.error.HTTPError as error:
            with error:
                raise _Refusal(self._base + path, error, bool(self._key)) from None
        except UserError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UserError(f"{self._base} cannot be reached: {reason(error)}") from None
        assert isinstance(response, http.client.HTTPResponse)
        return response


class _Refusal(Exception):
    """A status that is no success, as a sentence."""

    def __init__(self, address: str, error: urllib.error.HTTPError, has_key: bool) -> None:
        self.status = error.code
        said, code = refusal(error)
        words = said.lower()
        named = "context_length" in code or "context_size" in code
        described = any(f"context {word}" in words for word in ("length", "size", "window"))
        self.is_too_long = error.code == 400 and (named or described)
        sentence = f"{address} answers with status {error.code}" + (f": {printable(said)}" if said else "")
        if error.code == 401:
            sentence += f"; the API key in {KEY_NAME} is not taken" if has_key else f"; set an API key in {KEY_NAME}"
        if error.code in (429, 503) and (wait := error.headers.get("Retry-After")):
            sentence += f"; try again in {printable(wait)} s"
        super().__init__(sentence)


def _answer(response: http.client.HTTPResponse, interrupt: Interrupt) -> Iterator[Event]:
    """The pieces of a streamed answer, then notes on how it ended."""
    reason, thought, wrote, calls = None, 0, False, []
    for chunk in _chunks(response, interrupt):
        if isinstance(chunk.get("error"), dict):
            raise UserError(f"the server broke the answer off: {printable(str(chunk['error'].get('message')))}")
        for choice in chunk.get("choices") or []:
            delta = choice.get("delta") or {}
            reason = choice.get("finish_reason") or reason
            thought += len(delta.get("reasoning_content") or delta.get("reasoning") or "")
            calls += [call.get("function") or {} for call in delta.get("tool_calls") or []]
            if delta.get("content"):
                wrote = True
                yield Text(str(delta["content"]))
    if thought:
        yield Note(f"before it come {thought:,} characters of reasoning, which are not shown")
    if names := [str(call["name"]) for call in calls if call.get("name")]:
        yield Note(f"the model calls {', '.join(map(printable, names))}, which this chat does not do")
    if interrupt.asked:
        return
    if reason is None:
        yield Note("the server closed the connection before the answer was complete")
    elif reason == "length":
        yield Note("the answer ended at the limit of tokens; /params max_new_tokens=… changes it")
    elif not wrote and not thought and not calls:
        yield Note("the answer is empty")


def _chunks(response: http.client.HTTPResponse, interrupt: Interrupt) -> Iterator[dict[str, Any]]:
    while not interrupt.asked:
        try:
            line = interrupt.wait(lambda: response.readline(MAX_LINE_BYTES)) or b""
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"the connection broke off: {reason(error)}") from None
        data = line.removeprefix(b"data:").strip()
        if not line or data == b"[DONE]":
            return
        if data and line.startswith(b"data:"):
            try:
                chunk = json.loads(data)
            except ValueError:
                chunk = None
            if not isinstance(chunk, dict):
                raise UserError("the server sent something that is no piece of an answer; is the address right?")
            yield chunk
