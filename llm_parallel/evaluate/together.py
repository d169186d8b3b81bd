"""Answers an evaluation's requests on all replicas of a training run, with the weights in training.

Rank 0 runs the harness and hands out requests, a portion at a time; every replica answers a part of each portion. Each
portion ends with a message of all processes, at which all learn whether one of them was asked to stop.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from llm_parallel.evaluate.record import Outcome, Record
from llm_parallel.evaluate.runner import Tokens, Work, check_room
from llm_parallel.generate.engine import Generator
from llm_parallel.generate.requests import Request
from llm_parallel.parallel.groups import Groups

LONGEST_S = 24 * 3600.0
"""The other processes wait so long for rank 0, which may be building prompts or running programs."""
PORTION = 4
"""Requests of a replica in a portion, as a multiple of those in work: more leave fewer moments at which replicas wait
for the last answer, fewer let a run stop sooner."""
Portion = list[Request] | None
"""Requests, or None when the harness has ended."""


class GivenUp(Exception):
    """Some process was asked to stop."""


class Channel:
    """Messages between all processes of a run, beside those of training. Making one is collective."""

    def __init__(self, groups: Groups) -> None:
        self._several = groups.mesh.world_size > 1
        self._group: Any = None
        if self._several:
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=LONGEST_S))

    def tell(self, message: Any) -> Any:
        """What rank 0 says; the others' ``message`` does not count. Collective."""
        if not self._several:
            return message
        box = [message]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def everybodys(self, message: Any) -> list[Any]:
        """What each process says, by its rank. Collective."""
        if not self._several:
            return [message]
        said: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(said, message, group=self._group)
        return said


class Together:
    """Answers requests on every process. See ``Runner``, in whose place it stands.

    wants_to_stop: whether this process was asked to; before_pass: called before each pass of the model, and may raise
    to leave.
    """

    def __init__(
        self,
        generator: Generator,
        channel: Channel,
        wants_to_stop: Callable[[], bool],
        before_pass: Sequence[Callable[[], None]] = (),
    ) -> None:
        self._generator, self._channel = generator, channel
        self._wants_to_stop, self._before_pass = wants_to_stop, before_pass
        self._record = Record(None, "")
        self.tokens = Tokens()
        self.left = False
        """Whether this process has left the others in the middle of a portion, by an exception."""

    def run(self, work: Work) -> list[Outcome]:
        """On rank 0: the outcomes, in the order of the requests. Raises UserError for a request that the model has no
        room for, and GivenUp."""
        limits = self._generator.limits
        check_room(work, limits.num_pages * limits.page_tokens, "half of the free memory has no room for it")
        keys = [self._record.key(request) for request in work.requests]
        first = {key: number for number, key in reversed(list(enumerate(keys))) if self._record.get(key) is None}
        order = sorted(first.values(), key=lambda number: work.requests[number].prompt)
        wanted = [self._generator.checked(replace(work.requests[number], number=number)) for number in order]
        self.tokens.known += len(keys) - len(order)
        self.tokens.asked += sum(len(request.prompt) for request in work.requests)
        size = PORTION * self._generator.limits.max_running * self._generator.replica[1]
        for begin in range(0, len(wanted), size):
            portion = wanted[begin : begin + size]
            self._channel.tell(portion)
            for number, outcome in self._answered(portion):
                self._record.add(keys[number], outcome)
                self.tokens.asked += len(outcome.tokens)
        found = [self._record.get(key) for key in keys]
        return [outcome for outcome in found if outcome is not None]

    def end(self) -> None:
        """On rank 0: lets the others go on."""
        self._channel.tell(None)

    def follow(self) -> None:
        """On every other process: answers with rank 0 until it ends. Raises GivenUp."""
        while (portion := self._channel.tell(None)) is not None:
            self._answered(portion)

    def _answered(self, portion: Sequence[Request]) -> list[tuple[int, Outcome]]:
        """All outcomes of a portion by the numbers of their requests. Neighbours begin alike, so that a replica takes
        a whole stretch of them. Collective."""
        self.left = True
        generator = self._generator
        own, replicas = generator.replica
        size = -(-len(portion) // replicas)
        for request in portion[own * size : (own + 1) * size]:
            generator.submit(request)
        made: list[tuple[int, Outcome]] = []
        while not generator.idle:
            for look in self._before_pass:
                look()
            made += [(answer.number, Outcome.of(answer)) for answer in generator.tick()]
        at = generator.groups.at
        speaks = at.tp == 0 and at.pp == 0
        said = self._channel.everybodys((self._wants_to_stop(), made if speaks else []))
        self.tokens.run = generator.scheduler.num_computed
        self.left = False
        if any(stop for stop, _ in said):
            raise GivenUp
        return [one for _, each in said for one in each]
