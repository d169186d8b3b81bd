"""A server with OpenAI's interface in a thread of this process, which replies what a test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answering = Callable[[dict[str, Any], int], "str | Problem"]


@dataclass(frozen=True)
class Problem:
    """A reply that is none: a status with headers, or a body of another form."""

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b'{"error": {"message": "no"}}'


@dataclass
class Fake:
    """asked: every request's path, headers and body; answer: what it replies to a body, with the number of the
    request from 0."""

    answer: Answering
    asked: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    base: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def last(self) -> str:
        """The last message of the last request."""
        return str(self.asked[-1][2]["messages"][-1]["content"])

    def reply(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Problem:
        """The reply to one request."""
        with self._lock:
            number = len(self.asked)
            self.asked.append((path, headers, body))
        said = self.answer(body, number)
        if isinstance(said, Problem):
            return said
        message = {"role": "assistant", "content": said}
        whole = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "model": body["model"]}
        return Problem(body=json.dumps(whole).encode())


@contextmanager
def fake_openai(answer: Answering) -> Iterator[Fake]:
    """The server, for as long as the body runs."""
    fake = Fake(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            said = fake.reply(self.path, dict(self.headers), body)
            self.send_response(said.status)
            for name, value in (*said.headers, ("Content-Length", str(len(said.body)))):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(said.body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    fake.base = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
