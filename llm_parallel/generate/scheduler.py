"""Which tokens of which sequences run next: continuous batching, without any tensor.

A plan is one idea for everything: for each sequence, how many of its tokens run in this pass. One token is a decoding
step, many are a prompt or a chunk of one, and both share a pass. A sequence for whose tokens no page is left takes the
pages of a less urgent one, which is computed again later.

Requests are divided over ``waves``, as many as there are pipeline stages; a plan has sequences of one wave, so that the
stages work on different waves at the same time. Plans are made one after the other on every process of a replica from
the same requests and answers, so all processes make the same plans.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llm_parallel.generate.draw import NO_TOKEN, Choice
from llm_parallel.generate.pages import PagePool, digest_of
from llm_parallel.generate.requests import Finished, Reason, Request, TopTokens


@dataclass(frozen=True)
class Limits:
    """num_pages, page_tokens: the cache; max_running: sequences at a time; pass_tokens: tokens of one pass."""

    num_pages: int
    page_tokens: int = 16
    max_running: int = 64
    pass_tokens: int = 512


@dataclass(eq=False)
class Draft:
    """One answer in the making. tokens: the prompt and what has been written; computed: how many of them have keys and
    values in ``pages``; digests: of the pages that are full; wave: which plans it takes part in, None while it waits;
    in_flight: its next token is being computed."""

    request: Request
    sample: int
    arrival: int
    tokens: list[int]
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    wave: int | None = None
    in_flight: bool = False
    ended: bool = False
    log_probs: list[float] = field(default_factory=list)
    top: list[TopTokens] = field(default_factory=list)
    prompt_scores: list[tuple[float, TopTokens]] = field(default_factory=list)
    hidden_sum: NDArray[np.float64] | None = None

    @property
    def written(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def urgency(self) -> tuple[int, int, int]:
        """The most urgent sequence has the least: by priority, then by arrival."""
        return -self.request.priority, self.arrival, self.sample


@dataclass(frozen=True)
class Part:
    """``count`` tokens of a sequence from position ``start``; ``chooses``: whether its next token follows."""

    sequence: Draft
    start: int
    count: int
    chooses: bool


class Scheduler:
    """ends: whether the text of a request's ``stop`` has come, called with each new token of such requests. salt: bytes
    that tell apart the keys of equal tokens, by the length of the prompt (for rotary frequencies that depend on it)."""

    def __init__(
        self,
        limits: Limits,
        waves: int = 1,
        ends: Callable[[Draft], bool] = lambda _: False,
        salt: Callable[[int], bytes] = lambda _: b"",
    ) -> None:
        assert limits.pass_tokens >= limits.max_running >= 1
        self.limits, self.waves = limits, waves
        self.pool = PagePool(limits.num_pages, limits.page_tokens)
        self._ends, self._salt = ends, salt
        self._running: list[list[Draft]] = [[] for _ in range(waves)]
        self._waiting: list[Draft] = []
        self._siblings: dict[int, list[Draft]] = {}
        self._cancelled: list[Finished] = []
        self._arrivals = 0
        self.num_computed = 0
        """Tokens of all plans so far."""

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not (self._siblings or self._cancelled)

    @property
    def num_running(self) -> int:
        """Sequences that have pages."""
        return sum(map(len, self._running))

    @property
    def num_waiting(self) -> int:
        """Sequences that have none."""
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Takes a request that ``check_fits`` accepts."""
        assert request.number not in self._siblings, f"request {request.number} is in work already"
        self._arrivals += 1
        made = [Draft(request, n, self._arrivals, list(request.prompt)) for n in range(request.num_made)]
        self._siblings[request.number] = made
        for sequence in made:
            insort(self._waiting, sequence, key=_urgency)

    def cancel(self, number: int) -> None:
        """Ends the answers to a request that are not finished; does nothing if there are none."""
        for sequence in list(self._siblings.get(number, ())):
            self._cancelled.append(self._end(sequence, Reason.CANCELLED))

    def start_over(self) -> None:
        """Forgets all keys, as a change of the weights asks for; answers in work go on from their tokens."""
        for sequence in [sequence for wave in self._running for sequence in wave]:
            self._interrupt(sequence)
        self.pool.forget()

    def take_cancelled(self) -> list[Finished]:
        """Answers that were cancelled since the last call."""
        taken, self._cancelled = self._cancelled, []
        return taken

    def plan(self, wave: int = 0) -> list[Part]:
        """The next pass of a wave, none of whose tokens are in flight: single tokens first, then chunks. A chunk has
        what more urgent sequences leave of the pass, those that wait included."""
        first = next((sequence for sequence in self._waiting if self._can_start(sequence)), None)
        if first is not None:
            self._make_way(first, {})  # before the sequences that it may interrupt are in the plan
        running = list(self._running[wave])
        decoding = sum(len(s.tokens) - s.computed == 1 for s in running)
        budget = self.limits.pass_tokens - decoding
        parts: dict[Draft, Part] = {}
        for sequence in running:
            left = len(sequence.tokens) - sequence.computed
            if left > 1 and sequence.wave is not None:
                budget = self._admit(wave, budget, parts, sequence.urgency)
            count = 1 if left == 1 else min(left, budget)
            if sequence.wave is None or count == 0 or not self._find_room(sequence, count, parts):
                continue
            budget -= count if left > 1 else 0
            parts[sequence] = self._schedule(sequence, count)
        self._admit(wave, budget, parts)
        return sorted(parts.values(), key=lambda part: part.count > 1)

    def apply(self, parts: Sequence[Part], choices: Iterable[Choice]) -> list[Finished]:
        """Takes the tokens that followed a plan, one for each part that chooses, and returns the finished answers."""
        finished = []
        for part, choice in zip((part for part in parts if part.chooses), choices):
            sequence = part.sequence
            if sequence.ended:
                continue
            sequence.in_flight = False
            if choice.token == NO_TOKEN:
                finished.append(self._end(sequence, Reason.STRUCTURE))
                continue
            sequence.tokens.append(choice.token)
            sequence.log_probs.append(choice.log_prob)
            sequence.top.append(choice.top)
            request = sequence.request
            stopped = bool(request.stop) and self._ends(sequence)
            if stopped or choice.token in request.ends:
                finished.append(self._end(sequence, Reason.STOP))
            elif len(sequence.log_probs) >= request.sampling.max_new_tokens:
                finished.append(self._end(sequence, Reason.LENGTH))
        return finished

    def _schedule(self, sequence: Draft, count: int) -> Part:
        """The pages exist. A page that this fills is known from now on: whoever shares it runs later, or in the same
        pass, where each layer stores all keys before any query reads them."""
        start = sequence.computed
        sequence.computed += count
        self.num_computed += count
        size = self.limits.page_tokens
        for page in range(len(sequence.digests), sequence.computed // size):
            before = sequence.digests[-1] if sequence.digests else self._salt_of(sequence.request)
            sequence.digests.append(digest_of(before, sequence.tokens[page * size : (page + 1) * size]))
            self.pool.record(sequence.pages[page], sequence.digests[-1])
        sequence.in_flight = sequence.computed == len(sequence.tokens)
        return Part(sequence, start, count, sequence.in_flight)

    def _find_room(self, sequence: Draft, count: int, planned: dict[Draft, Part]) -> bool:
        """Gives the sequence pages for ``count`` more tokens, if need be those of less urgent sequences that are not in
        the plan. If there are none, the sequence gives up its own and waits."""
        missing = -(-(sequence.computed + count) // self.limits.page_tokens) - len(sequence.pages)
        while self.pool.available < missing:
            victim = self._least_urgent(planned)
            assert victim is not None and (victim is not sequence or self.num_running > 1), "submit checks that it fits"
            self._interrupt(victim)
            if victim is sequence:
                return False
        for _ in range(missing):
            sequence.pages.append(self.pool.take(sequence.pages[-1] if sequence.pages else None))
        return True

    def _least_urgent(self, planned: dict[Draft, Part]) -> Draft | None:
        others = (sequence for wave in self._running for sequence in wave if sequence not in planned)
        return max(others, key=_urgency, default=None)

    def _interrupt(self, sequence: Draft) -> None:
        self._leave(sequence)
        insort(self._waiting, sequence, key=_urgency)

    def _leave(self, sequence: Draft) -> None:
        """Takes a sequence out of its wave and its pages away. A pass in flight that still reads them is done before
        another one writes: all stages run the passes in the order of the plans."""
        assert sequence.wave is not None
        self._running[sequence.wave].remove(sequence)
        self.pool.release(sequence.pages)
        sequence.wave, sequence.computed, sequence.pages, sequence.digests = None, 0, [], []

    def _end(self, sequence: Draft, reason: Reason) -> Finished:
        if sequence.wave is None:
            self._waiting.remove(sequence)
        else:
            self._leave(sequence)
        sequence.ended = True
        request = sequence.request
        self._siblings[request.number].remove(sequence)
        if not self._siblings[request.number]:
            del self._siblings[request.number]
        return Finished(
            request.number,
            sequence.sample,
            tuple(sequence.written),
            tuple(sequence.log_probs),
            tuple(sequence.top),
            reason,
            tuple(sequence.prompt_scores),
            _mean(sequence),
        )

    def _admit(
        self, wave: int, budget: int, parts: dict[Draft, Part], before: tuple[int, int, int] | None = None
    ) -> int:
        """Starts waiting sequences in order of urgency while there is room; with ``before`` only those that are more
        urgent. One that does not fit keeps the others waiting, or a long one would never start. Returns what is left of
        the pass."""
        for sequence in list(self._waiting):
            if before is not None and sequence.urgency > before:
                break
            if budget <= 0 or self._has_its_share(wave):
                break
            if not self._can_start(sequence):
                continue
            if not self._make_way(sequence, parts):
                break
            self._waiting.remove(sequence)
            insort(self._running[wave], sequence, key=_urgency)
            sequence.wave = wave
            known = self._known_pages(sequence)
            self.pool.share(known)
            sequence.pages, sequence.computed = known, len(known) * self.limits.page_tokens
            count = min(len(sequence.tokens) - sequence.computed, budget)
            budget -= count
            self._find_room(sequence, count, parts)
            parts[sequence] = self._schedule(sequence, count)
        return budget

    def _has_its_share(self, wave: int) -> bool:
        """Whether another wave should take the next sequence: it has fewer, and this one has as many as each would if
        all that wait and fit were spread over the waves."""
        count = len(self._running[wave])
        if count <= min(map(len, self._running)):
            return False
        total, room = self.num_running, self.pool.available - self.num_running
        for sequence in self._waiting:
            if total >= min(self.waves * count + 1, self.limits.max_running):
                break
            if self._can_start(sequence):
                room -= -(-len(sequence.tokens) // self.limits.page_tokens) + 1  # and one to grow into
                if room < 0:
                    break
                total += 1
        return self.waves * count >= total

    def _can_start(self, sequence: Draft) -> bool:
        """Whether a waiting sequence knows all of its tokens, and the first answer to the same prompt, whose pages the
        others share, has come through it."""
        first = self._siblings[sequence.request.number][0]
        return not sequence.in_flight and (first is sequence or first.computed >= len(first.request.prompt))

    def _make_way(self, sequence: Draft, planned: dict[Draft, Part]) -> bool:
        """Whether a waiting sequence can start, having interrupted sequences of lower priority if that was needed. It
        starts if all of its tokens fit and every running sequence can grow, so that none is interrupted at once."""
        while True:
            known = self._known_pages(sequence)
            kept = sum(not self.pool.is_used(page) for page in known)
            needed = -(-len(sequence.tokens) // self.limits.page_tokens) - len(known)
            free = self.pool.available - kept - self.num_running
            if self.num_running < self.limits.max_running and (free >= needed or not self.num_running):
                return True
            victim = self._least_urgent(planned)
            if victim is None or victim.request.priority >= sequence.request.priority:
                return False
            self._interrupt(victim)

    def _known_pages(self, sequence: Draft) -> list[int]:
        """Pages that hold the sequence's first tokens already. At least one token is left to compute, from whose output
        the next one is chosen."""
        limit = len(sequence.tokens) - 1
        if sequence.request.looks_at_prompt and sequence.sample == 0:
            limit = min(limit, sequence.request.first_row)
        size = self.limits.page_tokens
        sequence.digests, digest = [], self._salt_of(sequence.request)
        for start in range(0, limit - size + 1, size):
            digest = digest_of(digest, sequence.tokens[start : start + size])
            sequence.digests.append(digest)
        known = self.pool.find(sequence.digests)
        del sequence.digests[len(known) :]
        return known

    def _salt_of(self, request: Request) -> bytes:
        """Adapters change the keys of equal tokens."""
        return self._salt(len(request.prompt)) + (request.adapter or "").encode()


def _mean(sequence: Draft) -> tuple[float, ...]:
    if sequence.hidden_sum is None:
        return ()
    return tuple((sequence.hidden_sum / len(sequence.request.prompt)).tolist())


def _urgency(sequence: Draft) -> tuple[int, int, int]:
    return sequence.urgency
