"""A worker's side of the elastic launcher: takes assignments, leaves a generation when told to, says how it went.

One thread reads what the agent sends while the main thread trains. To leave a generation it breaks the main thread out
of whatever collective it waits in: gloo has no abort, but ends a collective whose connection is shut down; NCCL has
one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_launch import wire
from llm_launch.progress import Marker
from llm_launch.states import Outcome
from llm_parallel.lines import note

SLOW_TO_LEAVE_S = 0.6
"""A process that is still in a generation so long after it was given up logs its stacks; it will be killed."""
READING_ONLY_S = 0.5
"""For 0.5 s after an abort only the read side of connections is shut (decision 46)."""
ABORT_EVERY_S = 0.02
"""Sockets are looked for again this often, since a thread that is connecting opens new ones."""


@dataclass(frozen=True)
class Assignment:
    """What a worker is in one generation."""

    generation: int
    rank: int
    world_size: int
    local_rank: int
    overrides: tuple[str, ...]
    """Configuration fields that differ from the run file's: the layout."""
    restore: dict[str, Any] | None
    """``{"step", "generation", "sources": [[rank, kind, host, port], …]}``; None: newest checkpoint on disk."""
    here: tuple[str, int]
    """Address of this node's own copies: a source with this address is read from local memory."""
    partner: tuple[str, int] | None
    elapsed_s: float
    """Seconds since the run was started."""
    origin: dict[str, Any]
    """What memory copies say of this generation, for a start that cannot read it in the run folder."""
    believe: tuple[int, ...] = ()
    """Steps whose loss is not finite on any device, so that data or program are at fault; the guard decides on them."""

    @classmethod
    def read(cls, message: dict[str, Any]) -> Assignment:
        """From a message of the agent."""
        values = {name: message[name] for name in cls.__dataclass_fields__}
        for name in ("partner", "here"):
            values[name] = tuple(values[name]) if values[name] else None
        values["restore"] = json.loads(values["restore"]) if values["restore"] else None
        values["overrides"], values["believe"] = tuple(values["overrides"]), tuple(values["believe"])
        return cls(**values)


@dataclass
class Member:
    """One worker's connection to its agent."""

    control: socket.socket
    marker: Marker
    node: str
    copies_dir: str
    secret: str
    assignments: queue.Queue[Assignment | None] = field(default_factory=queue.Queue)
    injected: list[dict[str, Any]] = field(default_factory=list)
    abort_collectives: Callable[[], None] = lambda: None
    """Ends collectives that are not gloo's; set when the device is known."""
    describe_collectives: Callable[[], dict[str, Any]] = dict
    """How many collectives this process has entered in each group."""
    device_is_idle: Callable[[], bool] = lambda: True
    """Whether the device has done all that it was given; set when the device is known."""
    _generation: int = 0
    _aborted: int = 0
    _stop: bool = False
    _pause: int = 0
    _inside: bool = False
    _kept: set[int] = field(default_factory=set)
    _shut: dict[tuple[int, int], socket.socket] = field(default_factory=dict)
    """Duplicate descriptors of sockets that were shut, by inode and side."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _answered: threading.Condition = field(default_factory=threading.Condition)
    """Held to touch ``_answers``; told of every answer, and when the generation is given up."""
    _answers: dict[int, Any] = field(default_factory=dict)
    """By number of the question; None while there is none."""
    _asked: int = 0
    _partner: tuple[str, int] | None = None

    def start(self) -> None:
        """Registers with the agent and listens to it."""
        self.send({"is": "ready", "pid": os.getpid()})
        threading.Thread(target=self._listen, name="control", daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        """Tells the agent something."""
        with self._lock, contextlib.suppress(OSError):
            wire.send(self.control, {"generation": self._generation, **message})

    def tell(self, generation: int, message: dict[str, Any]) -> None:
        """Says something to a generation's store that has no answer. Raises ConnectionError if it was given up."""
        if self._aborted >= generation:
            raise ConnectionError("the generation was given up")
        self.send({"is": "store", "generation": generation, **message})

    def ask(self, generation: int, message: dict[str, Any], timeout_s: float) -> Any:
        """The answer of a generation's store. Raises ConnectionError when the generation is given up meanwhile, and
        TimeoutError."""
        with self._answered:
            self._asked += 1
            number = self._asked
            self._answers[number] = None
        try:
            self.tell(generation, {"id": number, **message})
            with self._answered:
                self._answered.wait_for(
                    lambda: self._answers[number] is not None or self._aborted >= generation, timeout_s
                )
                answer = self._answers[number]
        finally:
            with self._answered:
                del self._answers[number]
        if answer is not None:
            return answer["value"]
        if self._aborted >= generation:
            raise ConnectionError("the generation was given up before its store answered")
        raise TimeoutError("the store did not answer in time")

    def request_stop(self) -> None:
        """Asks this worker to save and end, as the agent's message ``stop`` does."""
        self._stop = True

    def faults(self) -> list[dict[str, Any]]:
        """Faults that a drill has asked for."""
        return self.injected

    def next_assignment(self) -> Assignment | None:
        """Waits for the next generation; None when the run is over. Skips those that were given up meanwhile."""
        while True:
            assignment = self.assignments.get()
            if assignment is None or assignment.generation > self._aborted:
                if assignment is not None:
                    self._let_go()
                    self._generation, self._inside, self._partner = assignment.generation, True, None
                    self._kept = _sockets()
                return assignment

    def leave(self, outcome: Outcome, error: BaseException | None = None, **facts: Any) -> None:
        """Reports how this worker left the generation."""
        self._inside = False
        message: dict[str, Any] = {"is": "left", "outcome": outcome.value, **facts}
        if error is not None:
            trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            message |= {"error": type(error).__name__, "message": str(error)[-4000:], "traceback": trace[-16000:]}
        self.send(message)

    @property
    def aborted(self) -> bool:
        """Whether the present generation was given up."""
        return self._aborted >= self._generation

    def take_partner(self) -> tuple[str, int] | None:
        """Address of another partner node that the controller has named in this generation, once."""
        found, self._partner = self._partner, None
        return found

    @property
    def asked_to_stop(self) -> bool:
        """Whether to save and end after this step."""
        return self._stop

    @property
    def asked_to_pause(self) -> bool:
        """Whether to leave after this step, for a planned change of the layout."""
        return self._pause >= self._generation > 0

    def _listen(self) -> None:
        while (message := wire.receive(self.control)) is not None:
            kind = message["is"]
            if kind == "assign":
                self.assignments.put(Assignment.read(message))
            elif kind == "abort":
                self._aborted = max(self._aborted, message["generation"])
                with self._answered:
                    self._answered.notify_all()
                threading.Thread(target=self._break_out, name="abort", daemon=True).start()
            elif kind == "partner":
                self._partner = tuple(message["partner"])
            elif kind == "value":
                with self._answered:
                    if message["id"] in self._answers:
                        self._answers[message["id"]] = message
                        self._answered.notify_all()
            elif kind == "pause":
                self._pause = message["generation"]
            elif kind == "stop":
                self._stop = True
            elif kind == "look":
                self.send({"is": "seen", **self._look()})
            elif kind == "inject":
                self.injected.append(message["fault"])
            elif kind == "pardon":
                self.injected.clear()
            elif kind == "end":
                self.assignments.put(None)
        os._exit(1)  # the agent is gone, so no controller knows of this process

    def _break_out(self) -> None:
        """Ends the collective that the main thread waits in, by an end of file on every socket of the generation.

        gloo then fails all buffers that wait, except those that it could not write (`Pair::signalException` skips
        them), so no write may fail at first. Therefore only the read side is shut, and a duplicate descriptor keeps
        each connection open until all have left, since closing it would fail the peers' writes. A thread that blocks in
        a write is ended after ``READING_ONLY_S``, when the write side is shut too.
        """
        generation, kept, began, said = self._generation, self._kept, time.monotonic(), False
        while True:
            found = _sockets() - kept
            if not (self._inside and self.aborted and self._generation == generation):
                return
            self.abort_collectives()
            passed_s = time.monotonic() - began
            how = socket.SHUT_RD if passed_s < READING_ONLY_S else socket.SHUT_RDWR
            for inode in found:
                if (inode, how) not in self._shut:
                    self._shut_down(inode, how)
            if not said and passed_s > SLOW_TO_LEAVE_S:
                said = True
                note(f"still in generation {generation}, which was given up; where its threads are:")  # fmt: skip
                faulthandler.dump_traceback(all_threads=True)
            time.sleep(ABORT_EVERY_S)

    def _shut_down(self, inode: int, how: int) -> None:
        """Shuts the sides ``how`` of a connected TCP socket of this process. A listener is left alone: gloo ends the
        process when its listener fails."""
        for entry in os.scandir("/proc/self/fd"):
            with contextlib.suppress(OSError, ValueError):
                if Path(entry.path).readlink().name != f"socket:[{inode}]":
                    continue
                handle = socket.socket(fileno=os.dup(int(entry.name)))
                tcp = handle.family in (socket.AF_INET, socket.AF_INET6)
                if not tcp or handle.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    handle.close()
                    return
                try:
                    handle.shutdown(how)
                except OSError:  # not connected yet, or not any more
                    handle.close()
                    return
                self._shut[inode, how] = handle
                return

    def _let_go(self) -> None:
        """Closes the connections of a generation that all workers have left."""
        while self._shut:
            self._shut.popitem()[1].close()

    def _look(self) -> dict[str, Any]:
        """The main thread's stack, the collectives entered in each group, and whether the device has nothing to do."""
        main = threading.main_thread().ident
        frame = sys._current_frames().get(main or 0)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        told = {"stack": stack[-8000:], "collectives": self.describe_collectives(), "step": self.marker.step}
        return {**told, "idle": self.device_is_idle()}


def _sockets() -> set[int]:
    """Inodes of this process's sockets."""
    found = set()
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = Path(entry.path).readlink().name
            if target.startswith("socket:["):
                found.add(int(target[8:-1]))
    return found
