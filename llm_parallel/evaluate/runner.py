"""Runs requests of an evaluation on the generator: sorted, so that neighbours share the pages of what they begin with,
a window of them at a time, and none that was answered before."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from llm_parallel.errors import UserError
from llm_parallel.evaluate.record import Outcome, Record
from llm_parallel.generate.engine import Generator
from llm_parallel.generate.requests import Request
from llm_parallel.lines import note
from llm_parallel.serve.followers import Command, Control, Submit, apply

WAITING = 2
"""Requests that wait beside those in work, as a multiple of them."""
PROGRESS_S = 10.0
MORE_ROOM = "give --cache-tokens if there is memory for more, a smaller --context, or more processes by --tp or --pp"


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of what two sequences begin with alike."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    low, high = 0, length
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle)
    return low


def check_room(work: Work, cache_tokens: int, remedy: str) -> None:
    """Raises UserError if the cache cannot hold one of the requests, with ``remedy``."""
    for request, task in zip(work.requests, work.tasks):
        length = len(request.prompt) + (0 if request.candidates else request.sampling.max_new_tokens)
        if length > cache_tokens:
            raise UserError(
                f"a request of {task} has {length:,} tokens with its answer, and the cache holds {cache_tokens:,}; "
                f"{remedy}"
            )


@dataclass
class Work:
    """Requests and the tasks that wait for each of them, as many as want its answer."""

    requests: list[Request]
    tasks: list[str]


@dataclass
class Tokens:
    """asked: tokens of all prompts and answers; run: those that were computed; known: requests that were answered
    before."""

    asked: int = 0
    run: int = 0
    known: int = 0


@dataclass
class _Progress:
    """Says on standard error how far each task is, when one is finished and every few seconds."""

    work: Work
    costs: dict[int, float]
    left: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.left = Counter(self.work.tasks[number] for number in self.costs)
        self._counts, self._todo, self._done = dict(self.left), sum(self.costs.values()), 0.0
        self._started = self._said = time.monotonic()

    def count(self, number: int) -> None:
        """Counts an answered request."""
        task = self.work.tasks[number]
        self.left[task] -= 1
        self._done += self.costs[number]
        now = time.monotonic()
        if not self.left[task] or now - self._said > PROGRESS_S:
            done = self._counts[task] - self.left[task]
            seconds = (now - self._started) * (self._todo / max(self._done, 1e-9) - 1)
            rest = f", about {duration(seconds)} left" if self._done < self._todo else ""
            note(f"[{task}: {done} of {self._counts[task]} requests; {self._done / self._todo:.0%} of all{rest}]")
            self._said = now


def duration(seconds: float) -> str:
    """A time in words."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else (
        f"{seconds / 3600:.1f} h"
    )  # fmt: skip


class Runner:
    """Answers requests with a generator, on rank 0; the other processes of the layout follow."""

    def __init__(self, generator: Generator, control: Control, record: Record) -> None:
        self._generator, self._control, self._record = generator, control, record
        self.tokens = Tokens()

    def run(self, work: Work) -> list[Outcome]:
        """The outcomes, in the order of the requests. Raises UserError for a request that the model has no room for."""
        keys = [self._record.key(request) for request in work.requests]
        first: dict[str, int] = {}
        for number, key in enumerate(keys):
            if self._record.get(key) is None:
                first.setdefault(key, number)
        self.tokens.known += len(keys) - len(first)
        order = sorted(first.values(), key=lambda number: work.requests[number].prompt)
        self.tokens.asked += sum(len(request.prompt) for request in work.requests)
        progress = _Progress(work, _costs(work, order))
        self._answer(work, order, keys, progress)
        found = [self._record.get(key) for key in keys]
        return [outcome for outcome in found if outcome is not None]

    def _answer(self, work: Work, order: Sequence[int], keys: Sequence[str], progress: _Progress) -> None:
        generator = self._generator
        check_room(work, generator.limits.num_pages * generator.limits.page_tokens, MORE_ROOM)
        room = generator.limits.max_running * (1 + WAITING)
        checked = {number: generator.checked(replace(work.requests[number], number=number)) for number in order}
        waiting, in_work = list(reversed(order)), 0
        while waiting or in_work:
            commands: list[Command] = []
            while waiting and in_work < room:
                commands.append(Submit(checked[waiting.pop()]))
                in_work += 1
            apply(self._control.share(commands), generator, lambda _: None)
            for answer in generator.tick() if not generator.idle else ():
                in_work -= 1
                self._record.add(keys[answer.number], Outcome.of(answer))
                self.tokens.asked += len(answer.tokens)
                progress.count(answer.number)
        self.tokens.run = generator.scheduler.num_computed


def _costs(work: Work, order: Sequence[int]) -> dict[int, float]:
    """Tokens that each request costs: what its prompt does not share with the one before, and half of the answer."""
    costs, before = dict[int, float](), tuple[int, ...]()
    for number in order:
        request = work.requests[number]
        new = len(request.prompt) - common(before, request.prompt)
        costs[number] = max(new, 1) + (request.sampling.max_new_tokens - 1) / 2
        before = request.prompt
    return costs
