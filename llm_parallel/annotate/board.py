"""Who judges what: tasks, the leases under which they are shown, and the judgements, each on disk before it counts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from llm_parallel.annotate.items import Item
from llm_parallel.annotate.request import MODES
from llm_parallel.errors import UserError
from llm_parallel.jsonlines import JsonLines

NAME_LENGTH = 64


@dataclass(frozen=True)
class Task:
    """What is judged at a time: some answers of an item, by their places in it."""

    id: str
    item: Item
    answers: tuple[int, ...]


@dataclass(frozen=True)
class Judgement:
    """What a person said of a task. ranks: of each of its answers, 1 for the best, the same for equally good ones; in
    ``good-bad`` 1 is good and 2 is bad; None if the task was skipped."""

    task: str
    annotator: str
    ranks: tuple[int, ...] | None


def tasks_of(items: Sequence[Item], mode: str) -> tuple[list[Task], int]:
    """The tasks of items in order, and the number of items that have too few answers for the mode."""
    found, alone = [], 0
    for item in items:
        places = range(len(item.answers))
        if mode == "good-bad":
            parts: list[tuple[int, ...]] = [(place,) for place in places]
        elif len(places) < 2:
            alone += 1
            continue
        else:
            parts = list(combinations(places, 2)) if mode == "pair" else [tuple(places)]
        found += [Task(f"{item.id}.{'-'.join(map(str, part))}.{mode}", item, part) for part in parts]
    return found, alone


@dataclass(frozen=True)
class BoardOptions:
    """mode: one of ``MODES``; overlap: annotators of a task; lease_s: time for which a task stays with an annotator to
    whom it was shown; seed: of the order in which answers are shown."""

    mode: str
    overlap: int = 1
    lease_s: float = 900.0
    seed: int = 0


@dataclass
class _Own:
    """What an annotator did: tasks in the order in which they were judged or skipped last."""

    done: dict[str, Judgement] = field(default_factory=dict)


class Board:
    """Hands out tasks and takes judgements. ``log``: where each goes, as a line; ``clock``: seconds.

    One task has at most ``overlap`` annotators, those to whom it is shown now included. A judgement is taken from
    whoever gives it, also after the lease is over; a later one of the same person replaces the earlier."""

    def __init__(
        self, tasks: Sequence[Task], options: BoardOptions, log: JsonLines, clock: Callable[[], float]
    ) -> None:
        self.tasks = {task.id: task for task in tasks}
        self.options = options
        self._log, self._clock = log, clock
        self._people: dict[str, _Own] = {}
        self._judged: dict[str, set[str]] = {task.id: set() for task in tasks}
        self._leases: dict[str, dict[str, float]] = {}

    def load(self, records: Iterable[Mapping[str, Any]]) -> int:
        """Takes up what was judged before. Returns the number of records that are of other tasks."""
        others = 0
        for record in records:
            task, name = self.tasks.get(str(record.get("task"))), record.get("annotator")
            if task is None or not isinstance(name, str):
                others += 1
                continue
            if record.get("event") == "undone":
                self._forget(name, task.id)
                continue
            ranks = record.get("ranks")
            if record.get("event") == "skipped":
                self._take(Judgement(task.id, name, None))
            elif isinstance(ranks, list) and len(ranks) == len(task.answers) and all(type(one) is int for one in ranks):
                self._take(Judgement(task.id, name, tuple(ranks)))
            else:
                others += 1
        return others

    def order(self, annotator: str, task: Task) -> list[int]:
        """In which order the answers of a task are shown to an annotator: by their places among its answers."""
        order = list(range(len(task.answers)))
        random.Random(f"{self.options.seed} {annotator} {task.id}").shuffle(order)
        return order

    def next(self, annotator: str, again: bool = False) -> Task | None:
        """The task that an annotator is to judge now, which is leased to them; None if there is none. ``again``: what
        they skipped comes again."""
        own = self._own(annotator).done
        candidates = [task_id for task_id, leases in self._leases.items() if self._holds(leases, annotator)]
        for task_id in (*candidates, *self.tasks):
            done = own.get(task_id)
            if done is not None and not (again and done.ranks is None):
                continue
            if task_id in candidates or self._is_free(task_id, annotator):
                self._lease(annotator, task_id)
                return self.tasks[task_id]
        return None

    def hold(self, annotator: str, task_id: str) -> None:
        """Renews the lease of a task that is still looked at."""
        if self._holds(self._leases.get(task_id, {}), annotator):
            self._lease(annotator, task_id)

    def judge(self, annotator: str, task_id: str, shown: Sequence[int], seconds: float | None = None) -> None:
        """Takes the ranks of a task's answers in the order in which they were shown. Raises UserError if they are no
        judgement, or cannot be written."""
        task = self._task(task_id)
        order = self.order(annotator, task)
        self._check(task, shown)
        ranks = [0] * len(order)
        for place, rank in zip(order, shown):
            ranks[place] = rank
        judgement = Judgement(task_id, annotator, tuple(ranks))
        if self._own(annotator).done.get(task_id) == judgement:
            return  # sent again, since the page did not hear that it had arrived
        seen = [task.answers[place] for place in order]
        self._write("judged", annotator, task, ranks=ranks, shown=seen, seconds=seconds)
        self._take(judgement)

    def skip(self, annotator: str, task_id: str) -> None:
        """Leaves a task to others. Raises UserError if that cannot be written."""
        self._write("skipped", annotator, self._task(task_id))
        self._take(Judgement(task_id, annotator, None))

    def undo(self, annotator: str) -> Task | None:
        """Takes back an annotator's last judgement or skip, and leases the task to them again; None if there is none.
        Raises UserError if that cannot be written."""
        done = self._own(annotator).done
        if not done:
            return None
        task = self.tasks[next(reversed(done))]
        self._write("undone", annotator, task)
        self._forget(annotator, task.id)
        self._lease(annotator, task.id)
        return task

    def judgements(self) -> list[Judgement]:
        """All judgements and skips that stand."""
        return [one for own in self._people.values() for one in own.done.values()]

    def progress(self, annotator: str) -> dict[str, int]:
        """How far an annotator is, and how far all are together. ``left``: tasks that are free for the annotator;
        ``elsewhere``: tasks that only others hold now."""
        done = self._own(annotator).done
        left = elsewhere = 0
        for task_id in self.tasks:
            if task_id not in done and len(self._judged[task_id]) < self.options.overlap:
                free = self._is_free(task_id, annotator)
                left += free
                elsewhere += not free
        return {
            "judged": sum(one.ranks is not None for one in done.values()),
            "skipped": sum(one.ranks is None for one in done.values()),
            "left": left,
            "elsewhere": elsewhere,
            "all": sum(min(len(names), self.options.overlap) for names in self._judged.values()),
            "wanted": len(self.tasks) * self.options.overlap,
        }

    def _own(self, annotator: str) -> _Own:
        return self._people.setdefault(annotator, _Own())

    def _task(self, task_id: str) -> Task:
        task = self.tasks.get(task_id)
        if task is None:
            raise UserError("this item is not among those that are annotated here any more; reload the page")
        return task

    def _check(self, task: Task, ranks: Sequence[int]) -> None:
        count, mode = len(task.answers), self.options.mode
        if len(ranks) != count:
            raise UserError(f"{len(ranks)} ranks are given for {count} answers; give one for each")
        levels = sorted(set(ranks))
        fits = levels == list(range(1, len(levels) + 1))
        if mode == "good-bad":
            fits = ranks[0] in (1, 2)
        elif mode == "best":
            fits = fits and (len(levels) == 1 or (list(ranks).count(1) == 1 and len(levels) == 2))
        if not fits:
            raise UserError(f"the ranks {list(ranks)} are no judgement of {MODES[mode]}")

    def _write(self, event: str, annotator: str, task: Task, **values: Any) -> None:
        about = {"event": event, "task": task.id, "item": task.item.id, "mode": self.options.mode}
        self._log.append({**about, "annotator": annotator, "answers": list(task.answers), **values})

    def _take(self, judgement: Judgement) -> None:
        self._forget(judgement.annotator, judgement.task)
        self._own(judgement.annotator).done[judgement.task] = judgement
        if judgement.ranks is not None:
            self._judged[judgement.task].add(judgement.annotator)
        self._leases.get(judgement.task, {}).pop(judgement.annotator, None)

    def _forget(self, annotator: str, task_id: str) -> None:
        self._own(annotator).done.pop(task_id, None)
        self._judged[task_id].discard(annotator)

    def _holds(self, leases: Mapping[str, float], annotator: str) -> bool:
        return leases.get(annotator, -1.0) > self._clock()

    def _is_free(self, task_id: str, annotator: str) -> bool:
        taken = {*self._judged[task_id]}
        taken |= {name for name, until in self._leases.get(task_id, {}).items() if until > self._clock()}
        return len(taken - {annotator}) < self.options.overlap

    def _lease(self, annotator: str, task_id: str) -> None:
        for held in [held for held, leases in self._leases.items() if annotator in leases]:
            del self._leases[held][annotator]
            if not self._leases[held]:
                del self._leases[held]
        self._leases.setdefault(task_id, {})[annotator] = self._clock() + self.options.lease_s


def annotator_name(given: Any) -> str:
    """The name of an annotator as it is recorded. Raises UserError."""
    name = " ".join(given.split()) if isinstance(given, str) else ""
    if not name or len(name) > NAME_LENGTH or not name.isprintable():
        raise UserError(f"the name must have 1 to {NAME_LENGTH} letters")
    return name
