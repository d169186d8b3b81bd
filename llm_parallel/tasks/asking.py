"""Questions to a language model behind OpenAI's interface: tried again where that helps, and answered from a cache
where the same was asked before."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write
from llm_parallel.printable import printable
from llm_parallel.remote import opener, reason, refusal

T = TypeVar("T")
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Statuses after which the same request may succeed."""
LONGEST_PAUSE_S = 60.0
MAX_REPLY_BYTES = 1 << 24
THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


class Nonsense(Exception):
    """A reply in another form than was asked for; its text says what would be right."""


class NoReply(Exception):
    """No reply in the right form was to be had; its text says why."""


@dataclass(frozen=True)
class Asking:
    """Whom to ask, and how.

    base: the address up to ``/v1``; name: the model; key: the API key, which is sent and never written; parameters:
    further fields of the request; tries: requests at most for one question; timeout_s: seconds of one request; cache: a
    folder for replies, which several processes may share; pause_s: before the second try, doubled each time.
    """

    base: str
    name: str
    key: str | None = field(default=None, repr=False)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    tries: int = 4
    timeout_s: float = 120.0
    cache: Path | None = None
    pause_s: float = 1.0

    def ask(self, question: str, read: Callable[[str], T]) -> T:
        """What ``read`` makes of the reply. Where it raises Nonsense, the model is told so and asked again. Only a
        reply that could be read is kept. Raises NoReply, and UserError if the cache cannot be written."""
        messages = [{"role": "user", "content": question}]
        place = self._place(messages)
        with suppress(Nonsense):
            if (known := _kept(place)) is not None:
                return read(known)
        said = ""
        for number in range(self.tries):
            reply, problem, pause = self._try(messages)
            if reply is None:
                said = problem
                if pause is None:
                    break
                if number + 1 < self.tries:
                    time.sleep(min(max(pause, 0.0) if pause >= 0 else self.pause_s * 2**number, LONGEST_PAUSE_S))
                continue
            try:
                value = read(THOUGHT.sub("", reply))
            except Nonsense as error:
                said = f"it replies {_short(reply)}, but {error}"
                again = f"That is not the form that was asked for: {error}. Reply again, in that form."
                messages = [*messages[:1], {"role": "assistant", "content": reply}, {"role": "user", "content": again}]
                continue
            self._keep(place, THOUGHT.sub("", reply))
            return value
        raise NoReply(f"{self.name} at {self.base}: {said}")

    def _try(self, messages: Sequence[Mapping[str, str]]) -> tuple[str | None, str, float | None]:
        """A reply; or else a problem, and the seconds to wait before another try: under 0 for as many as seem right,
        None if it is useless."""
        body = {"model": self.name, "messages": list(messages), **self.parameters}
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "llm-parallel"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.base}/chat/completions", json.dumps(body).encode(), headers)
        deadline = time.monotonic() + self.timeout_s
        try:
            with opener(self.base).open(request, timeout=self.timeout_s) as response:
                data = bytearray()
                while piece := response.read1(1 << 16):
                    data += piece
                    if time.monotonic() > deadline or len(data) > MAX_REPLY_BYTES:
                        return None, f"its reply is not complete after {self.timeout_s:g} s", -1.0
        except urllib.error.HTTPError as error:
            with error:
                return self._refused(error)
        except UserError as error:
            return None, str(error), None
        except (OSError, http.client.HTTPException, ValueError) as error:
            return None, self._safe(f"it cannot be reached: {reason(error)}"), -1.0
        return self._content(bytes(data))

    def _content(self, data: bytes) -> tuple[str | None, str, float | None]:
        try:
            choice = json.loads(data)["choices"][0]
            content = choice["message"]["content"]
        except (ValueError, LookupError, TypeError):
            return None, "it does not answer as OpenAI's interface does; is the address right?", None
        if not isinstance(content, str) or not content.strip():
            why = ", since it reached max_reply_tokens" if choice.get("finish_reason") == "length" else ""
            return None, f"its reply is empty{why}", -1.0
        return content, "", None

    def _refused(self, error: urllib.error.HTTPError) -> tuple[None, str, float | None]:
        said, _ = refusal(error)
        sentence = f"it answers with status {error.code}" + (f": {_short(said)}" if said else "")
        if error.code in (401, 403):
            sentence += "; the API key is not taken" if self.key else "; it wants an API key, so give key_from"
        pause: float | None = None
        if error.code in PASSING:
            wait = error.headers.get("Retry-After", "")
            pause = float(wait) if re.fullmatch(r"\d{1,6}(\.\d+)?", wait) else -1.0
        return None, self._safe(sentence), pause

    def _safe(self, text: str) -> str:
        """A text from a server, which may repeat the key."""
        return printable(text.replace(self.key, "…") if self.key else text)

    def _place(self, messages: Sequence[Mapping[str, str]]) -> Path | None:
        """The file of a question: by everything that the reply depends on, and by nothing secret."""
        if self.cache is None:
            return None
        asked = [self.base, self.name, list(messages), dict(self.parameters)]
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        return self.cache / digest[:2] / f"{digest[2:]}.json"

    def _keep(self, place: Path | None, reply: str) -> None:
        if place is None:
            return
        try:
            with atomic_write(place) as file:
                json.dump({"model": self.name, "reply": reply}, file)
        except OSError as error:
            raise UserError(f"the cache {self.cache} cannot be written: {error.strerror}") from None


def _kept(place: Path | None) -> str | None:
    """The reply in a file of the cache; None if there is none, or no whole one."""
    if place is None:
        return None
    try:
        reply = json.loads(place.read_text(encoding="utf-8"))["reply"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return reply if isinstance(reply, str) else None


def _short(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 120 else f"{text[:120]} …")
