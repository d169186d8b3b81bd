"""How the replicas of a layout divide a file of prompts: each takes the next few prompts when it has room for more, so
that a fast one takes more of them.

What has been taken, and how far all replicas are, stands in torch's store. A prompt that a lost process had taken is
answered when the command is started again: what is complete is found on disk, and everything else is taken anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

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


class Claims:
    """Hands out the places 0 to ``total`` in chunks, each once. groups: the processes of a replica get the same."""

    def __init__(self, store: dist.Store, total: int, chunk: int, groups: Groups | None = None) -> None:
        self._store, self._total, self._chunk, self._groups = store, total, chunk, groups

    def next(self) -> range:
        """The next chunk, empty when there is none. Collective over the processes of the replica."""
        groups = self._groups
        if groups is None or groups.mesh.tp * groups.mesh.pp == 1:
            return self._from(self._store.add("claimed", self._chunk))
        asks = groups.at.tp == groups.at.pp == 0
        end = torch.tensor(self._store.add("claimed", self._chunk) if asks else 0, device=groups.platform.device)
        dist.broadcast(end, group=groups.collection.mp, group_src=0)
        return self._from(int(end))

    def _from(self, end: int) -> range:
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
    a number that grows while any replica works; done: replicas that have finished."""

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
