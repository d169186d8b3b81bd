"""Answers over HTTP: sent while they are written, or whole, and given up when the client goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llm_parallel.serve.driver import Batch
from llm_parallel.serve.errors import ApiError

SEND_S = 60.0
"""A client that takes nothing for so long is given up."""
END = {"type": "http.response.body", "body": b"", "more_body": False}
T = TypeVar("T")


class ClientGone(Exception):
    """The client has closed its connection."""


async def until_gone(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, batch: Batch, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work. Cancels the batch and raises ClientGone if the client goes away before."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
        if batch.left:
            batch.cancel()


def event(content: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {content if isinstance(content, str) else json.dumps(content)}\n\n".encode()


class EventStream(Response):
    """Server-sent events. ``failed``: the events that tell a client of an error in the middle."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], batch: Batch, failed: Callable[[ApiError], bytes], headers: dict[str, str]
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._batch, self._failed = events, batch, failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until the end, an error, or the client goes away, which ends the answers."""
        sending = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except (OSError, asyncio.TimeoutError):
            pass  # the connection is closed or stuck; nobody is there to be told
        finally:
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            if self._batch.left:
                self._batch.cancel()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for content in self._events:
                await self._send(send, content)
        except ApiError as error:
            await self._send(send, self._failed(error))
        except (OSError, asyncio.TimeoutError):
            raise  # the connection is closed or stuck
        except Exception:
            await self._send(send, self._failed(ApiError(500, "the server has failed on this request")))
            await send(END)
            raise  # to where it is logged
        await send(END)

    async def _send(self, send: Send, content: bytes) -> None:
        await asyncio.wait_for(send({"type": "http.response.body", "body": content, "more_body": True}), SEND_S)
