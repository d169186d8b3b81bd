"""A small server with OpenAI's protocol whose answers a test decides, so that what talks to it can be tried without a
model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], "str | tuple[int, dict[str, Any]] | Iterator[str]"]
"""What a request is answered with: a text, a status and a body, or pieces of a text as they come."""


@dataclass
class ChatServer:
    """A running server. asked: bodies of the requests for answers; keys: their Authorization headers; gone: set when a
    client went away before its answer was complete; page: the body and headers of ``/``."""

    answer: Answer
    models: tuple[str, ...] = ("first-model", "second-model")
    page: tuple[str, dict[str, str]] = ("", {})
    key: str | None = None
    address: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serving(server: ChatServer) -> Iterator[ChatServer]:
    """Serves on a free port of this machine."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": server}))
    http.daemon_threads = True
    server.address = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: ChatServer

    def log_message(self, *_: Any) -> None:
        """Nothing is logged."""

    def _send(self, status: int, body: str, headers: dict[str, str]) -> None:
        content = body.encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _json(self, status: int, body: Any) -> None:
        self._send(status, json.dumps(body), {"Content-Type": "application/json"})

    def do_GET(self) -> None:
        if self.path == "/":
            self._send(200, *self.state.page)
        elif self._refused():
            return
        elif self.path == "/v1/models":
            self._json(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.state.models]})
        else:
            self._json(404, {"error": {"message": f"there is no {self.path}"}})

    def _refused(self) -> bool:
        wrong = self.state.key is not None and self.headers["Authorization"] != f"Bearer {self.state.key}"
        if wrong:
            self._json(401, {"error": {"message": "the API key is wrong"}})
        return wrong

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.state.keys.append(self.headers["Authorization"])
        if self._refused():
            return
        self.state.asked.append(body)
        answer = self.state.answer(body)
        if isinstance(answer, tuple):
            self._json(*answer)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self._stream(body, iter([answer]) if isinstance(answer, str) else answer)
        except OSError:
            self.state.gone.set()

    def _stream(self, body: dict[str, Any], pieces: Iterator[str]) -> None:
        count = 0
        self._event({"delta": {"role": "assistant", "content": ""}})
        for piece in pieces:
            self._event({"delta": {"content": piece}})
            count += 1
        reason = "length" if body.get("max_tokens") == count else "stop"
        self._event({"delta": {}, "finish_reason": reason})
        usage = {"prompt_tokens": 7, "completion_tokens": count, "total_tokens": 7 + count}
        self._write(json.dumps({"object": "chat.completion.chunk", "choices": [], "usage": usage}))
        self._write("[DONE]")

    def _event(self, choice: dict[str, Any]) -> None:
        choice = {"index": 0, "finish_reason": None, **choice}
        self._write(json.dumps({"object": "chat.completion.chunk", "choices": [choice]}))

    def _write(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()
