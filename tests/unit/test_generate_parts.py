"""Answering a file in parts, without processes: whoever takes, finishes, dies and goes on, every request is answered
once, in the order of the input."""

from __future__ import annotations

import json
import random
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_parallel.errors import UserError
from llm_parallel.generate.parts import Parts
from llm_parallel.generate.replicas import Claims, Out, Replica, Totals, chunk_size, first_problem
from llm_parallel.generate.requests import Finished, Reason, Request
from llm_parallel.generate.watchdog import Watchdog


class Engine:
    """Finishes what it was asked for in a random order, none or several at a time."""

    def __init__(self, room: int, draw: random.Random) -> None:
        self.open: list[tuple[int, int]] = []
        self.asked: list[int] = []
        self._room, self._draw = room, draw

    @property
    def idle(self) -> bool:
        return not self.open

    @property
    def has_room(self) -> bool:
        return len(self.open) < self._room

    def submit(self, request: Request) -> None:
        self.asked.append(request.number)
        self.open += [(request.number, sample) for sample in range(request.n)]

    def tick(self) -> list[Finished]:
        self._draw.shuffle(self.open)
        count = self._draw.randint(0, len(self.open))
        ended, self.open = self.open[:count], self.open[count:]
        return [Finished(number, sample, (number,), (-1.0,), (), Reason.STOP) for number, sample in ended]


def line_of(answer: Finished) -> dict[str, Any]:
    return {"text": f"answer {answer.sample} to {answer.number}", "tokens": answer.tokens}


class Session:
    """A command from its start to its end or its death."""

    def __init__(
        self, parts: Parts, keys: list[tuple[int, int]], replicas: int, room: int, draw: random.Random
    ) -> None:
        self.parts, self.draw = parts, draw
        self.known = parts.known()
        left = sorted({key[0] for key in keys if key not in self.known})
        samples = 1 + max(sample for _, sample in keys)
        store = dist.HashStore()
        self.totals = Totals(store)
        self.engines = [Engine(room, draw) for _ in range(replicas)]
        self.outs = [Out(parts, n, line_of, frozenset(self.known), False) for n in range(replicas)]
        chunk = chunk_size(len(left), replicas, room)
        self.replicas = [
            Replica(engine, Claims(store, len(left), chunk, n), lambda at: Request(left[at], (1,), n=samples), out.take)
            for n, (engine, out) in enumerate(zip(self.engines, self.outs))
        ]
        self.working = set(range(replicas))

    def run(self, steps: int | None) -> None:
        """Steps of random replicas, until all have finished or ``steps`` are done."""
        count = 0
        while self.working and (steps is None or count < steps):
            at = self.draw.choice(sorted(self.working))
            if not self.replicas[at].step():
                self.working.remove(at)
            self.outs[at].flush(self.totals)
            count += 1
        for out in self.outs:
            out.close()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(0, 12), st.booleans()), max_size=4),
    st.integers(0, 2**32),
)
def test_every_request_is_answered_once_whoever_dies(
    prompts: int, samples: int, lives: list[tuple[int, int, int, bool]], seed: int
) -> None:
    keys = [(number, sample) for number in range(prompts) for sample in range(samples)]
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        parts = Parts(Path(folder) / "out.jsonl", "mark")
        for replicas, room, steps, torn in [*lives, (2, 3, None, False)]:
            with parts.held():
                session = Session(parts, keys, replicas, room, draw)
                session.run(steps)
                complete = {number for number, _ in session.known}
                complete -= {number for number, _ in set(keys) - session.known}
                asked = [number for engine in session.engines for number in engine.asked]
                assert len(set(asked)) == len(asked), "no prompt is taken twice"
                assert not complete & set(asked), "what is complete is not made again"
                assert session.totals.read().answers == len(parts.known()) - len(session.known)
                if torn:
                    with (parts.folder / "part-0.jsonl").open("a") as out:
                        out.write('{"job": "mark", "number": 0, "sam')
        written = [json.loads(line) for path in parts.folder.glob("part-*") for line in whole_lines(path)]
        assert len(written) == len(keys), "no answer is written twice"
        parts.merge(keys)
        lines = [json.loads(line) for line in parts.target.read_text().splitlines()]
        assert [(line["number"], line["sample"]) for line in lines] == keys and not parts.begun()
        assert all(line["text"] == f"answer {line['sample']} to {line['number']}" for line in lines)
        with parts.held():
            assert parts.known() == set(keys)
            parts.merge(keys)  # a command that finds everything
        assert [json.loads(line) for line in parts.target.read_text().splitlines()] == lines


def whole_lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.endswith("}")]


def test_the_processes_of_a_replica_get_the_same_chunks_and_the_others_further_ones() -> None:
    store = dist.HashStore()
    asks, follows = Claims(store, 10, 3, 0), Claims(store, 10, 3, 0, asks=False)
    other = Claims(store, 10, 3, 1)
    taken = [asks.next(), other.next(), asks.next(), other.next(), asks.next()]
    assert taken == [range(3), range(3, 6), range(6, 9), range(9, 10), range(12, 10)] and not taken[-1]
    assert [follows.next() for _ in range(3)] == taken[::2]


def test_a_fast_replica_takes_more(tmp_path: Path) -> None:
    keys = [(number, 0) for number in range(60)]
    parts = Parts(tmp_path / "out.jsonl", "mark")
    with parts.held():
        session = Session(parts, keys, 2, 4, random.Random(0))
        turn = 0
        while session.working:
            at = 0 if turn % 4 else 1  # the first one steps three times as often
            turn += 1
            if at in session.working and not session.replicas[at].step():
                session.working.remove(at)
        for out in session.outs:
            out.close()
        fast, slow = (len(engine.asked) for engine in session.engines)
        assert fast + slow == 60 and 2 * slow < fast
        parts.merge(keys)


def test_answers_of_another_job_and_of_a_command_that_runs_are_left_alone(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "out.jsonl", "mark")
    with parts.held():
        out = parts.writer(0)
        out.append(parts.line((0, 0), {}))
        out.close()
        with pytest.raises(UserError, match="another command is answering into"), parts.held():
            pass
        with pytest.raises(UserError, match="lacks 1 of 2 answers"):
            parts.merge([(0, 0), (1, 0)])
    with pytest.raises(UserError, match="holds something else than answers to this input"):
        Parts(parts.target, "another").known()
    empty = Parts(tmp_path / "empty.jsonl", "mark")
    with empty.held():
        pass
    assert not empty.begun() and parts.known() == {(0, 0)}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), Parts(tmp_path / "file" / "out", "mark").held():
        pass


def test_the_first_line_that_is_wrong_is_named() -> None:
    assert first_problem([(7, "seven"), None, (3, "three")]) == "three" and first_problem([None]) is None


def test_a_watchdog_expires_once_without_progress() -> None:
    now, expired = [0.0], threading.Event()
    watchdog = Watchdog(10.0, expired.set, lambda: now[0])
    now[0] = 9.0
    assert watchdog.left_s() == 1.0
    watchdog.tick()
    now[0] = 18.0
    assert watchdog.left_s() == 1.0
    with Watchdog(0.001, expired.set):
        assert expired.wait(60.0)
    quiet = threading.Event()
    with Watchdog(1000.0, quiet.set) as watchdog:
        watchdog.tick()
    watchdog._thread.join(60.0)
    assert not watchdog._thread.is_alive() and not quiet.is_set()
