"""The one thread that drives the generator, and its bridge to the event loop that speaks HTTP.

Commands go in through a queue that the thread empties before each pass. Tokens and finished answers go out once a pass,
all of them in one call into the event loop, which puts each into the queue of the request that it belongs to.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llm_parallel.checkpoint.folders import is_complete
from llm_parallel.errors import UserError
from llm_parallel.generate.draw import Choice
from llm_parallel.generate.engine import Generator
from llm_parallel.generate.requests import Finished, Request
from llm_parallel.lines import note, say
from llm_parallel.serve.errors import ApiError, wrong
from llm_parallel.serve.followers import HEARTBEAT_S, Cancel, Command, Control, Load, Stop, Submit, apply
from llm_parallel.serve.metrics import Metrics

Event = tuple[int, int, Choice | Finished | ApiError]
"""Number of the prompt within its HTTP request, sample, and what happened."""


class Batch:
    """The answers to one HTTP request, whose prompts are requests of the generator. ``events``: what happens to them;
    ``left``: answers that are not finished."""

    def __init__(self, driver: Driver, requests: Sequence[Request], streams: bool) -> None:
        self._driver, self.requests, self.streams = driver, requests, streams
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.left = sum(request.n for request in requests)
        self.arrived = time.monotonic()

    async def next(self) -> Event:
        """The next event."""
        event = await self.events.get()
        if not isinstance(event[2], Choice):
            self.left -= 1
        return event

    def cancel(self) -> None:
        """Gives up what is not finished, as when the client has gone away."""
        self._driver.cancel(self)


@dataclass
class _Open:
    """A request in work. last: when each sample's last token came."""

    batch: Batch
    place: int
    left: int
    last: dict[int, float] = field(default_factory=dict)


class Driver:
    """max_queue: answers that may wait beside those in work; load: loads the weights of a checkpoint; failed: called in
    the event loop when the generator has failed and the server has to end."""

    def __init__(
        self, generator: Generator, control: Control, metrics: Metrics, max_queue: int, load: Callable[[str], None]
    ) -> None:
        self.generator, self.metrics, self._control, self._load = generator, metrics, control, load
        self.max_open = generator.limits.max_running + max_queue
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._open: dict[int, _Open] = {}
        self._held: list[Command] = []
        self._loading: str | None = None
        self._out: list[tuple[int, int, Choice | Finished]] = []
        self._number = 0
        self.num_open = 0
        self._seconds_per_answer = 1.0
        self.failure: str | None = None
        self.failed: Callable[[], None] = lambda: None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="generator", daemon=True)
        generator.on_token = self._took
        self._gauges()

    def _gauges(self) -> None:
        scheduler, gauge = self.generator.scheduler, self.metrics.gauge
        gauge("queue", "Answers that wait.", lambda: max(self.num_open - scheduler.num_running, 0))
        gauge("running", "Answers in work.", lambda: scheduler.num_running)
        gauge("pages_used", "Pages of the cache that answers use.", lambda: scheduler.pool.used)
        gauge("tasks", "Tasks of the event loop.", lambda: len(asyncio.all_tasks(self._loop)))
        gauge("pages_total", "Pages of the cache.", lambda: scheduler.pool.num_pages)

    # In the event loop

    def start(self) -> None:
        """Starts the thread; called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, requests: Sequence[Request], streams: bool) -> Batch:
        """Takes requests, whose numbers it gives anew. Raises ApiError if too many answers wait already."""
        count = sum(request.n for request in requests)
        if self.failure is not None:
            raise ApiError(503, f"the generator has failed ({self.failure}); the server is ending")
        if count > self.max_open:
            raise wrong(
                f"the request asks for {count} answers, and the server takes {self.max_open} at a time; ask for fewer"
            )
        if self.num_open + count > self.max_open:
            wait_s = min(
                60, max(1, round(self._seconds_per_answer * self.num_open / self.generator.limits.max_running))
            )
            raise ApiError(
                429,
                f"{self.num_open} answers are in work or waiting, and the server takes {self.max_open}; try again in "
                f"{wait_s} s",
                code="rate_limit_exceeded",
                retry_after_s=wait_s,
            )
        numbered = []
        for request in requests:
            self._number += 1
            numbered.append(replace(request, number=self._number))
        batch = Batch(self, numbered, streams)
        for place, request in enumerate(numbered):
            self._open[request.number] = _Open(batch, place, request.n)
            self.metrics.prompt_tokens.inc(len(request.prompt))
            self._inbox.put(Submit(request))
        self.num_open += count
        return batch

    def cancel(self, batch: Batch) -> None:
        """Ends what is not finished of a batch."""
        for request in batch.requests:
            if request.number in self._open:
                self._inbox.put(Cancel(request.number))

    def cancel_all(self) -> None:
        """Ends everything that is in work."""
        for number in list(self._open):
            self._inbox.put(Cancel(number))

    def load(self, folder: str) -> None:
        """Takes up a checkpoint when the answers in work are finished; requests that come until then wait for it."""
        self._inbox.put(Load(folder))

    def stop(self) -> None:
        """Ends the thread and the other processes, after what is in work."""
        self._inbox.put(Stop())

    def join(self, timeout_s: float) -> None:
        """Waits for the end of the thread."""
        self._thread.join(timeout_s)

    def _hand_out(self, events: Sequence[tuple[int, int, Choice | Finished]]) -> None:
        for number, sample, what in events:
            opened = self._open.get(number)
            if opened is None:
                continue
            if isinstance(what, Finished):
                self.num_open -= 1
                opened.left -= 1
                self.metrics.answers.labels(what.reason.value).inc()
                if not opened.left:
                    del self._open[number]
                    seconds = time.monotonic() - opened.batch.arrived
                    self._seconds_per_answer += 0.1 * (seconds - self._seconds_per_answer)
            elif not opened.batch.streams:
                continue
            opened.batch.events.put_nowait((opened.place, sample, what))

    def _hand_out_failure(self) -> None:
        error = ApiError(500, f"the generator has failed ({self.failure}); the server is ending", code="engine_failed")
        for opened in self._open.values():
            for _ in range(opened.left):
                opened.batch.events.put_nowait((opened.place, 0, error))
        self._open.clear()
        self.num_open = 0
        self.failed()

    # In the generator's thread

    def _took(self, number: int, sample: int, choice: Choice) -> None:
        now, opened = time.monotonic(), self._open.get(number)
        if opened is None:
            return
        before = opened.last.get(sample)
        if before is not None:
            self.metrics.per_token.observe(now - before)
        elif not opened.last:
            self.metrics.first_token.observe(now - opened.batch.arrived)
        opened.last[sample] = now
        self.metrics.generated_tokens.inc()
        if opened.batch.streams:
            self._out.append((number, sample, choice))

    def _run(self) -> None:
        try:
            while apply(self._control.share(self._commands()), self.generator, self._load_noted):
                finished = [] if self.generator.idle else self.generator.tick()
                out: list[tuple[int, int, Any]] = [*self._out, *((one.number, one.sample, one) for one in finished)]
                self._out.clear()
                if out:
                    self._call(self._hand_out, out)
        except BaseException as error:
            # The message of any other error may quote a prompt, and is not written anywhere.
            self.failure = str(error) if isinstance(error, UserError) else type(error).__name__
            where = error.__traceback__
            while where is not None and where.tb_next is not None:
                where = where.tb_next
            place = (
                f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where is not None else "an unknown place"
            )
            note(f"error: the generator has failed: {self.failure} at {place}")
            self._call(self._hand_out_failure)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _load_noted(self, folder: str) -> None:
        started = time.monotonic()
        self._load(folder)
        self.metrics.reloads.inc()
        say(f"[took up {folder} in {time.monotonic() - started:.1f} s]")

    def _commands(self) -> list[Command]:
        """What all processes do before the next pass. Waits while there is nothing to do."""
        found: list[Command] = []
        if self.generator.idle and self._loading is None:
            try:
                found.append(self._inbox.get(timeout=HEARTBEAT_S if self._control.several else None))
            except queue.Empty:
                return found
        while True:
            try:
                found.append(self._inbox.get_nowait())
            except queue.Empty:
                break
        current: list[Command] = []
        for command in found:
            if isinstance(command, Load):
                self._loading = command.folder
            elif self._loading is None or (isinstance(command, Cancel) and not self._is_held(command.number)):
                current.append(command)
            else:
                self._held.append(command)
        if self._loading is not None and self.generator.idle and not current:
            # Training may have removed it while answers were finished; then a newer one will come.
            load = [Load(self._loading)] if is_complete(Path(self._loading)) else []
            current = [*load, *self._held]
            self._loading, self._held = None, []
        return current

    def _is_held(self, number: int) -> bool:
        return any(isinstance(command, Submit) and command.request.number == number for command in self._held)
