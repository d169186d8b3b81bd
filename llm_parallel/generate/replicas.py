"""How the replicas of a layout divide a file of prompts: each takes the next few prompts when it has room for more, so
that a fast one takes more of them.

What has been taken, and how far all replicas are, stands in torch's store. A prompt that a lost process had taken is
answered when the command is started again: what is complete is found on disk, and everything else is taken anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.distributed as dist

from llm_parallel.generate.parts import Key, Parts
from llm_parallel.generate.requests import Finished, Request
from llm_parallel.parallel.groups import Groups

ROUND = 4
"""Chunks that each replica takes at least, of a file that is long enough."""


class Answerer(Protocol):
    """What answers requests: ``Generator``, or another engine behind the same calls."""

    @property
    def idle(self) -> bool:
        """Whether all answers have been returned."""

    @property
    def has_room(self) -> bool:
        """Whether further requests would be in work at once."""

    def submit(self, request: Request) -> None:
        """Takes a request. Raises UserError for one that it cannot answer."""

    def tick(self) -> list[Finished]:
        """Goes on, and returns what was finished."""


def chunk_size(total: int, replicas: int, max_running: int) -> int:
    """Prompts that a replica takes at a time."""
    return max(1, min(max_running // 4, total // (ROUND * replicas)))


@dataclass(frozen=True)
class Place:
    """Which process this is, and which replica it belongs to; writes: whether it writes the answers of its replica."""

    rank: int = 0
    world_size: int = 1
    replica: int = 0
    replicas: int = 1
    writes: bool = True

    @classmethod
    def of(cls, groups: Groups) -> Place:
        """The place of a process of a layout."""
        at, mesh = groups.at, groups.mesh
        return cls(groups.rank, mesh.world_size, at.dp, mesh.dp, at.tp == at.pp == 0)


class Claims:
    """Hands out the places 0 to ``total`` in chunks, each once. The processes of a replica get the same chunks: one of
    them, which ``asks``, tells the others in the store. It is no collective, since a pipeline's processes are not at
    the same pass when they have room for more."""

    def __init__(self, store: dist.Store, total: int, chunk: int, replica: int = 0, asks: bool = True) -> None:
        self._store, self._total, self._chunk, self._replica, self._asks = store, total, chunk, replica, asks
        self._count = 0

    def next(self) -> range:
        """The next chunk, empty when there is none."""
        key, self._count = f"claim/{self._replica}/{self._count}", self._count + 1
        if self._asks:
            end = self._store.add("claimed", self._chunk)
            self._store.set(key, str(end))
        else:
            end = int(self._store.get(key))
        return range(end - self._chunk, min(end, self._total))


class Replica:
    """One process's part in the work of its replica. make: the request of a place; take: called with each answer."""

    def __init__(
        self, engine: Answerer, claims: Claims, make: Callable[[int], Request], take: Callable[[Finished], None]
    ) -> None:
        self._engine, self._claims, self._make, self._take = engine, claims, make, take
        self._has_more = True

    def step(self) -> bool:
        """Takes prompts if there is room, and lets the engine go on once. Returns whether there is more to do."""
        if self._has_more and self._engine.has_room:
            places = self._claims.next()
            self._has_more = bool(places)
            for place in places:
                self._engine.submit(self._make(place))
        if self._engine.idle:
            return self._has_more
        for answer in self._engine.tick():
            self._take(answer)
        return True


@dataclass(frozen=True)
class Total:
    """answers, tokens: finished by all replicas; cut: answers that ended before their structure was complete; passes:
    a number that grows while any replica works; done: processes that have finished."""

    answers: int = 0
    tokens: int = 0
    cut: int = 0
    passes: int = 0
    done: int = 0


class Totals:
    """Numbers of all replicas together."""

    PASS_S = 1.0
    NAMES = ("answers", "tokens", "cut", "passes", "done")

    def __init__(self, store: dist.Store) -> None:
        self._store, self._last_pass = store, 0.0

    def add(self, **numbers: int) -> None:
        """Adds to some of them."""
        for name, number in numbers.items():
            if number:
                self._store.add(name, number)

    def passed(self) -> None:
        """Says that this replica works, at most every second."""
        if time.monotonic() - self._last_pass > self.PASS_S:
            self._last_pass = time.monotonic()
            self.add(passes=1)

    def read(self) -> Total:
        """All of them."""
        return Total(*(self._store.add(name, 0) for name in self.NAMES))


@dataclass
class Out:
    """Writes the answers of a replica. unsaid: what has been written since the last ``flush``."""

    parts: Parts
    replica: int
    line: Callable[[Finished], dict[str, Any]]
    known: frozenset[Key]
    structured: bool
    unsaid: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._file = self.parts.writer(self.replica)

    def take(self, answer: Finished) -> None:
        """Writes an answer, if it is not known from before."""
        key = (answer.number, answer.sample)
        if key in self.known:
            return
        self._file.append(self.parts.line(key, self.line(answer)))
        more = {"answers": 1, "tokens": len(answer.tokens), "cut": int(self.structured and answer.truncated)}
        self.unsaid = {name: self.unsaid.get(name, 0) + number for name, number in more.items()}

    def flush(self, totals: Totals) -> None:
        """Returns when everything is on the disk."""
        if self.unsaid:
            self._file.sync()
            totals.add(**self.unsaid)
            self.unsaid = {}

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Progress:
    """Says every few seconds how far all replicas are, on one line."""

    EVERY_S = 5.0

    def __init__(self, total: int, replicas: int, tell: Callable[[str], None]) -> None:
        self._total, self._replicas, self._tell = total, replicas, tell
        self._started = self._said = time.monotonic()

    def look(self, read: Callable[[], Total]) -> None:
        """Says it if it is time to."""
        if time.monotonic() - self._said > self.EVERY_S:
            self.say(read())

    def say(self, found: Total) -> None:
        """Says it now."""
        self._said = time.monotonic()
        speed = found.tokens / max(self._said - self._started, 1e-9)
        by = f" by {self._replicas} replicas" if self._replicas > 1 else ""
        self._tell(f"[{found.answers} of {self._total} answers, {found.tokens} tokens, {speed:.1f} tokens/s{by}]")
        if found.cut:
            self._tell(f"[{found.cut} answers ended before their structure was complete; give more --max-new-tokens]")


def first_problem(problems: Sequence[tuple[int, str] | None]) -> str | None:
    """Of what each process has found wrong, with the number of the line, that of the first line."""
    found = [problem for problem in problems if problem is not None]
    return min(found)[1] if found else None
