"""Time that a process waits in communication, by the axis of the layout that it is for.

Every collective and message of torch.distributed, under whatever name megatron-core imported its function, ends in a
method of ``ProcessGroup`` and in ``Work.wait``. ``CommTime.recording`` replaces these methods by timed ones and puts
the originals back at its end; it changes nothing else.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm_parallel.parallel.groups import Groups

METHODS = (
    "_allgather_base", "_end_coalescing", "_reduce_scatter_base", "all_gather_single", "all_gather_single_coalesced",
    "all_to_all_single", "allgather", "allgather_coalesced", "allgather_into_tensor_coalesced", "allreduce",
    "allreduce_coalesced", "alltoall", "alltoall_base", "barrier", "broadcast", "gather", "monitored_barrier", "recv",
    "recv_anysource", "reduce", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced", "scatter", "send",
)  # fmt: skip
"""Names of the ``ProcessGroup`` methods that communicate; an older torch lacks some."""

AXES = ("tp", "cp", "dp", "pp")
DATA, FORWARD_BACKWARD, OPTIMIZER, OUTSIDE = "data", "forward_backward", "optimizer", ""
PHASES = (DATA, FORWARD_BACKWARD, OPTIMIZER)


@dataclass(frozen=True)
class Link:
    """Time of one message between neighbouring pipeline stages that are both ready."""

    latency_s: float = 0.0
    s_per_byte: float = 0.0

    def transfer_s(self, size_bytes: int) -> float:
        """Seconds for ``size_bytes``."""
        return self.latency_s + size_bytes * self.s_per_byte


@dataclass(frozen=True)
class TimeSplit:
    """Seconds of one step of one process; they add up to the step.

    tp, cp, dp: waiting in collectives of that group, which includes waiting for its slowest rank. dp holds the
    reduction of gradients and the gathering of parameters over data- and context-parallel ranks, as far as compute does
    not overlap them.
    pp, bubble: waiting for messages between stages and in collectives of all stages (gradients of tied embeddings, and
    the sum of losses at the end of the schedule, in which stages that are done wait for the others). Of each such wait,
    pp is at most the time that a message of its size takes when both sides are ready (``Link``, measured before the
    first step); bubble is the rest, in which the other side had not sent yet. So an uneven split of the layers, a slow
    replica that the sum of losses waits for, and the schedule's own idle time are all in the bubble.
    optimizer, data: the update, and waiting for data, without the communication in them. compute: forward, backward and
    gradient norm, without the communication in them. other: the rest, such as communication over other groups.
    """

    tp: float = 0.0
    cp: float = 0.0
    dp: float = 0.0
    pp: float = 0.0
    bubble: float = 0.0
    optimizer: float = 0.0
    data: float = 0.0
    compute: float = 0.0
    other: float = 0.0

    @property
    def communication_s(self) -> float:
        """Seconds of communication that is not overlapped by compute, without the bubble."""
        return self.tp + self.cp + self.dp + self.pp


class _Call:
    """One collective or message. left_s: seconds of its transfer that nothing has waited for yet."""

    __slots__ = ("axis", "left_s")

    def __init__(self, axis: str, left_s: float) -> None:
        self.axis, self.left_s = axis, left_s


_NO_NAME: AbstractContextManager[None] = nullcontext()


class Untimed:
    """Has the methods of ``CommTime`` and times nothing."""

    annotate = False
    """Whether calls are named in a torch.profiler trace."""

    def during(self, phase: str) -> AbstractContextManager[None]:
        """Counts nothing."""
        return nullcontext()

    def recording(self) -> AbstractContextManager[None]:
        """Changes nothing."""
        return nullcontext()

    def take(self, step_s: float, phases_s: Mapping[str, float]) -> TimeSplit | None:
        """None: the split is not known."""
        return None


class CommTime(Untimed):
    """Collects waiting by phase of the step and axis. ``axes``: name of a process group → axis, "self" for a group of
    one.

    On a CPU a wait is wall time of the call and of ``Work.wait``. On a GPU it is the time that the current stream is
    held up, by events around the same calls, read in ``take``.
    """

    def __init__(self, axes: Mapping[str, str], cuda: bool, link: Link = Link()) -> None:
        self._axes, self._cuda, self._link = axes, cuda, link
        self._thread = threading.get_ident()
        self._works: dict[int, _Call] = {}
        self._works_of_last_step: dict[int, _Call] = {}
        self._coalesced: dict[str, int] = defaultdict(int)
        self._seconds: dict[tuple[str, str], float] = defaultdict(float)
        self._events: list[tuple[str, _Call, Any, Any]] = []
        self.calls: Counter[tuple[str, str]] = Counter()
        """Calls by axis and method since the beginning; "other" is every group that is no axis."""
        self.phase = OUTSIDE
        """Part of the step that is going on."""

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Counts communication inside to ``phase``."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While inside, communication is timed. Not to be nested: two would count twice."""
        found = [(dist.ProcessGroup, name) for name in METHODS if hasattr(dist.ProcessGroup, name)]
        # A method that getattr returns from a pybind11 class does not bind to instances after it is put back; the entry
        # in the class's dictionary does.
        originals = [(owner, name, vars(owner)[name]) for owner, name in [*found, (dist.Work, "wait")]]
        assert not any(hasattr(original, "times_communication") for *_, original in originals)
        for owner, name, _ in originals:
            method = getattr(owner, name)
            timed = self._timed_wait(method) if owner is dist.Work else self._timed_call(name, method)
            timed.times_communication = True  # type: ignore[attr-defined]
            setattr(owner, name, timed)
        try:
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)

    def _counts(self, axis: str) -> bool:
        # Copies of the state travel over groups of their own in other threads, beside the step; autograd's thread,
        # which runs backward on a GPU, uses the layout's groups.
        return axis in AXES or threading.get_ident() == self._thread

    def _timed_call(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        axes, calls, now, finish = self._axes, self.calls, self._now, self._finish
        ends_many = name == "_end_coalescing"

        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            axis = axes.get(group.group_name, "other")
            if not self._counts(axis):
                return original(group, *args, **kwargs)
            made = _Call(axis, self._transfer_s(group, args, ends_many) if axis == "pp" else 0.0)
            calls[axis, name] += 1
            start = now()
            try:
                with self._named(axis, name):
                    work = original(group, *args, **kwargs)
            finally:
                finish(made, start)
            if work is not None:
                self._works[id(work)] = made
            return work

        return call

    def _timed_wait(self, original: Callable[..., Any]) -> Callable[..., Any]:
        now, finish = self._now, self._finish

        def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
            made = self._works.pop(id(work), None) or self._works_of_last_step.pop(id(work), None)
            if made is None or not self._counts(made.axis):
                return original(work, *args, **kwargs)
            start = now()
            try:
                with self._named(made.axis, "wait"):
                    return original(work, *args, **kwargs)
            finally:
                finish(made, start)

        return wait

    def _transfer_s(self, group: Any, args: Sequence[Any], ends_many: bool) -> float:
        """Seconds that the link takes for one message or, where ``ends_many``, for all messages coalesced since the
        last such end."""
        if ends_many:
            return self._link.transfer_s(self._coalesced.pop(group.group_name, 0))
        size = _size_bytes(args[0]) if args else 0
        self._coalesced[group.group_name] += size
        return self._link.transfer_s(size)

    def _named(self, axis: str, name: str) -> AbstractContextManager[Any]:
        return torch.profiler.record_function(f"{axis}: {name}") if self.annotate else _NO_NAME

    def _finish(self, made: _Call, start: Any) -> None:
        """Records the time since ``start``, also that of a call that failed."""
        if self._cuda:
            self._events.append((self.phase, made, start, self._now()))
        else:
            self._book(self.phase, made, time.perf_counter() - start)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _book(self, phase: str, made: _Call, seconds: float) -> None:
        if made.axis == "pp":
            transfer = min(seconds, made.left_s)
            made.left_s -= transfer
            self._seconds[phase, "bubble"] += seconds - transfer
            seconds = transfer
        self._seconds[phase, made.axis] += seconds

    def take(self, step_s: float, phases_s: Mapping[str, float]) -> TimeSplit:
        """The split of a step that took ``step_s`` seconds, of which each phase took ``phases_s``; clears what was
        collected.

        On a GPU the device must have done the step's work (``Platform.synchronize``)."""
        for phase, made, start, end in self._events:
            self._book(phase, made, start.elapsed_time(end) / 1e3)
        self._events.clear()
        self._coalesced.clear()
        # A gather may be waited for in the next step; what nobody waits for at all must not pile up.
        self._works_of_last_step, self._works = self._works, {}
        found, self._seconds = self._seconds, defaultdict(float)
        waited = {axis: sum(found.get((phase, axis), 0.0) for phase in PHASES) for axis in (*AXES, "bubble")}
        own = {
            phase: phases_s[phase] - sum(value for (at, axis), value in found.items() if at == phase and axis != "self")
            for phase in PHASES
        }
        other = step_s - sum(waited.values()) - sum(own.values())
        return TimeSplit(**waited, optimizer=own[OPTIMIZER], data=own[DATA], compute=own[FORWARD_BACKWARD], other=other)


def _size_bytes(what: Any) -> int:
    """Bytes of the tensors in the first argument of a ProcessGroup method."""
    if isinstance(what, Tensor):
        return what.nbytes
    return sum(part.nbytes for part in what if isinstance(part, Tensor)) if isinstance(what, list) else 0


def sum_and_max(values: Sequence[float], device: torch.device) -> tuple[list[float], list[float]]:
    """Sums and largest values of fp64 scalars over all processes, element by element, in one collective; every process
    calls this."""
    own = torch.tensor(values, dtype=torch.float64, device=device)
    found = own.new_empty(dist.get_world_size(), len(values))
    dist.all_gather_into_tensor(found.view(-1), own)
    return found.sum(0).tolist(), found.amax(0).tolist()


def axes_of(groups: Groups) -> dict[str, str]:
    """Name of every group of a layout → axis. With a pipeline the group of all processes counts as pp, since in the sum
    of losses the stages that are done wait for those that are not."""
    collection, found = groups.collection, {}
    members = {
        "tp": ("tp",),
        "cp": ("cp",),
        "dp": ("dp", "dp_cp", "intra_dp_cp"),
        "pp": ("pp", "embd", "pos_embd"),
    }
    if groups.mesh.pp > 1:
        found[dist.group.WORLD.group_name] = "pp"
    for axis, names in members.items():
        for name in names:
            group = getattr(collection, name, None)
            if isinstance(group, dist.ProcessGroup):
                found[group.group_name] = axis if group.size() > 1 else "self"
    return found


def open_comm_time(groups: Groups, message_bytes: int) -> CommTime:
    """A ``CommTime`` for the groups of a layout; every process of it calls this. ``message_bytes``: size of an
    activation between two stages."""
    link = Link()
    if groups.mesh.pp > 1:
        link = measure_link(groups.collection.pp, groups.platform, message_bytes)
    return CommTime(axes_of(groups), groups.platform.is_cuda, link)


def measure_link(group: Any, platform: Any, message_bytes: int, rounds: int = 7) -> Link:
    """Times messages of 8 bytes and of ``message_bytes`` from every stage to the next at once, as in the steady part of
    the schedule; medians over ``rounds``, after one that is not counted. Every process of ``group`` calls this."""
    rank, size = group.rank(), group.size()
    after = dist.get_global_rank(group, (rank + 1) % size)
    before = dist.get_global_rank(group, (rank - 1) % size)
    medians = []
    for size_bytes in (8, message_bytes):
        sent = torch.zeros(size_bytes, dtype=torch.uint8, device=platform.device)
        got, times = torch.empty_like(sent), []
        for _ in range(rounds + 1):
            dist.barrier(group=group)
            platform.synchronize()
            started = time.perf_counter()
            messages = [dist.P2POp(dist.isend, sent, after, group), dist.P2POp(dist.irecv, got, before, group)]
            for request in dist.batch_isend_irecv(messages):
                request.wait()
            platform.synchronize()
            times.append(time.perf_counter() - started)
        medians.append(statistics.median(times[1:]))
    latency_s, long_s = medians
    return Link(latency_s, max(0.0, long_s - latency_s) / max(message_bytes - 8, 1))
