"""uvicorn with an end that finishes what is in work."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from llm_parallel.lines import note
from llm_parallel.serve.driver import Driver
from llm_parallel.serve.guard import State

CANCEL_S = 10.0
"""Time that clients have to take the errors after their answers have been given up."""


class Server(uvicorn.Server):
    """The first SIGTERM or SIGINT lets requests in work finish for ``finish_s`` seconds, then gives them up; new ones
    are refused with 503 all the while. The second one ends at once."""

    def __init__(self, app: ASGIApp, host: str, port: int, driver: Driver, state: State, finish_s: float) -> None:
        options = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=int(CANCEL_S),
            backlog=1024,
            ws="none",
            proxy_headers=False,  # else a client may say that it is another
        )
        super().__init__(options)
        self._driver, self._state, self._finish_s = driver, state, finish_s
        self._ending: asyncio.Task[None] | None = None
        self.watch: Callable[[], Coroutine[Any, Any, None]] | None = None
        """What runs beside the server until its end."""
        driver.failed = self._fail

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own handlers close the listening socket at once, where clients would find nobody to tell them."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_to_end)
        watching = None if self.watch is None else asyncio.ensure_future(self.watch())
        try:
            yield
        finally:
            if watching is not None:
                watching.cancel()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _asked_to_end(self) -> None:
        if self._ending is not None:
            self.should_exit = self.force_exit = True
            return
        self._ending = asyncio.ensure_future(self._end(self._finish_s))

    def _fail(self) -> None:
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end(0.0))

    async def _end(self, finish_s: float) -> None:
        self._state.draining = True
        if self._state.answering:
            note(f"[ending: {self._state.answering} requests may finish within {finish_s:.0f} s]")
        await self._idle(finish_s)
        self._driver.cancel_all()
        await self._idle(CANCEL_S)
        self.should_exit = True

    async def _idle(self, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while self._state.answering and time.monotonic() < until:
            await asyncio.sleep(0.05)
