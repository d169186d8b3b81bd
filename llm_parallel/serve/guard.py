"""What every request passes before a route sees it: keys, hosts, origins, and whether the server still takes any."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_parallel.lines import note
from llm_parallel.serve.errors import ApiError, shown
from llm_parallel.serve.local_users import is_ours
from llm_parallel.serve.metrics import Metrics

OPEN_PATHS = ("/health", "/")
"""Paths that need no key: whether the server lives, and the chat page, which holds nothing secret."""
COUNTED = (
    *("/health", "/metrics", "/", "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses"),
    "/v1/embeddings",
)
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Access:
    """keys: digests of the keys that are taken, none for a server without keys; hosts: names that a request may call
    the server by, None for all; origins: web pages of other servers that may ask; own_user: whether only processes of
    this user and of root may ask, of those on this machine."""

    keys: tuple[bytes, ...] = ()
    hosts: tuple[str, ...] | None = None
    origins: tuple[str, ...] = ()
    own_user: bool = False

    @staticmethod
    def digest(key: str) -> bytes:
        """What is kept of a key."""
        return hashlib.sha256(key.encode()).digest()

    def check_scope(self, scope: Scope) -> Headers:
        """The headers of a request. Raises ApiError if it may not be answered."""
        headers, path = Headers(scope=scope), scope["path"]
        self.check(path, headers)
        if self.own_user and path not in (*OPEN_PATHS, "/metrics"):
            client, server = (tuple(end[:2]) if end else None for end in (scope.get("client"), scope.get("server")))
            if not is_ours(client, server):
                raise ApiError(403, "this server asks for no key, so it answers the user who started it alone")
        return headers

    def check(self, path: str, headers: Headers) -> None:
        """Raises ApiError for a request whose host, origin or key is not right."""
        host = headers.get("host", "")
        if self.hosts is not None and _host_name(host) not in self.hosts:
            # Else a web page whose name points at this machine could read what the server answers.
            raise ApiError(403, f"the host {shown(host)} is not served here; call it {' or '.join(self.hosts)}")
        origin = headers.get("origin")
        if origin is not None and origin not in self.origins and urlsplit(origin).netloc != host:
            raise ApiError(403, f"pages of {shown(origin)} may not ask this server; start it with --allow-origin")
        if self.keys and path not in OPEN_PATHS:
            self._check_key(headers.get("authorization", ""))

    def _check_key(self, authorization: str) -> None:
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise ApiError(401, "no API key is given; send it as Authorization: Bearer KEY", code="invalid_api_key")
        digest = self.digest(given.strip())
        # All are compared, so that the time says nothing about which one it is.
        if sum(hmac.compare_digest(digest, key) for key in self.keys) == 0:
            raise ApiError(401, "the API key is not one of this server's", code="invalid_api_key")


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


@dataclass
class State:
    """Whether the server takes requests, and how many it is answering."""

    draining: bool = False
    answering: int = 0
    said: set[str] = field(default_factory=set)


class Guard:
    """The application with checks before it, and counters and the log around it. An error that nobody expected is
    written to the log by its kind and place alone, since its message may quote a prompt."""

    def __init__(self, app: ASGIApp, access: Access, state: State, metrics: Metrics, log: bool) -> None:
        self._app, self._access, self._state, self._metrics, self._log = app, access, state, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request, or the messages of the server's start and end."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._state.answering += 1
        try:
            await self._answer(scope, receive, noting)
        except Exception as error:
            self._note(error)
            if not status:
                await _refusal(ApiError(500, "the server has failed on this request"))(scope, receive, noting)
        finally:
            self._state.answering -= 1
            path = scope["path"] if scope["path"] in COUNTED else "other"
            self._metrics.requests.labels(path, status or "gone").inc()
            if self._log:
                took = time.monotonic() - started
                note(f"{scope['method']} {path} {status or 'gone'} {took:.3f} s")

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._access.check_scope(scope)
            if self._state.draining:
                raise ApiError(
                    503, "the server is ending and takes no more requests", code="server_ending", retry_after_s=5
                )
        except ApiError as error:
            await _refusal(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    @staticmethod
    def _note(error: Exception) -> None:
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        place = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where is not None else "unknown place"
        note(f"error: {type(error).__name__} at {place}")


def _refusal(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, {**error.headers(), "connection": "close"})


def digests(keys: Sequence[str]) -> tuple[bytes, ...]:
    """What is kept of keys."""
    return tuple(map(Access.digest, keys))
