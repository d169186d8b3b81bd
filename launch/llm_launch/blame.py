"""From what was seen to who is at fault: a table of rules over evidence, pure, so that every row has a test.

A fault of the program or of the user stops the run and removes no device. A fault of hardware names devices or nodes;
the ledger (ledger.py) decides after how many strikes a device is removed for good.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple


class Device(NamedTuple):
    """One accelerator (or, on a CPU, one place for a process) of a node."""

    node: str
    number: int

    def __str__(self) -> str:
        return f"{self.node}/{self.number}"


class Kind(Enum):
    """What was seen."""

    EXIT = "exit"
    """A process ended by itself or by a signal."""
    RAISED = "raised"
    """A worker raised an error of its own."""
    CONNECTION = "connection"
    """A worker's collective failed because a peer or the network did."""
    AGENT_LOST = "agent lost"
    """An agent's connection closed, so its process is gone; its node may be well."""
    NODE_SILENT = "node silent"
    """No heartbeat: the node is off or cut off."""
    HANG = "hang"
    """A worker makes no progress while others wait for it."""
    STALL = "stall"
    """The same, but its process was stopped from outside, or its device has done all that it was given."""
    SLOW = "slow"
    """A device's probe takes much longer than its peers'."""
    NOT_FINITE = "not finite"
    """The loss of one replica alone is NaN or infinite."""
    DISAGREES = "disagrees"
    """A replica's weights differ from those of most others."""
    UNHEALTHY = "unhealthy"
    """The driver or the known-answer test says that the device is broken."""
    COPY_LOST = "copy lost"
    """A memory copy that the state was to come from is damaged or gone."""
    HOST_MEMORY = "host memory"
    """The system ended a process because its node ran out of memory."""


@dataclass(frozen=True)
class Evidence:
    """One observation about one device (None: about the whole node)."""

    kind: Kind
    node: str
    device: Device | None = None
    rank: int | None = None
    error: str = ""
    """Name of the exception's class."""
    message: str = ""
    status: int | None = None
    """Exit status, negative for a signal."""
    samples: tuple[int, int] | None = None
    """First and last global sample of the step."""
    copy: tuple[str, int] | None = None
    """Kind and rank of a memory copy that is lost, if it is one."""
    forming: bool = False
    """Whether its process had not begun to train in this generation."""


class Fault(Enum):
    """Who is at fault."""

    USER = "user"
    PROGRAM = "program"
    OUT_OF_MEMORY = "out of memory"
    HOST_MEMORY = "host memory"
    ENVIRONMENT = "environment"
    """Disk, files, ports: what the system refuses, whatever the device."""
    SETUP = "setup"
    """Something that one node lacks: files, a mount, software."""
    STALL = "stall"
    """A process that was stopped, or whose program stood still while its device had nothing to do."""
    DEVICE = "device"
    NODE = "node"
    AGENT = "agent"
    NETWORK = "network"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Verdict:
    """The outcome. ``certain``: hard evidence, the devices are removed at the first strike."""

    fault: Fault
    reason: str
    devices: tuple[Device, ...] = ()
    nodes: tuple[str, ...] = ()
    certain: bool = False
    evidence: tuple[Evidence, ...] = field(default=(), compare=False)

    @property
    def stops_run(self) -> bool:
        """Whether another generation would fail in the same way."""
        return self.fault in (Fault.USER, Fault.PROGRAM, Fault.OUT_OF_MEMORY)

    def given_up(self, recoveries: int, words: str = "") -> Verdict:
        """What ends a run that does not get on. words: what else is known of its nodes."""
        reason = f"given up after {recoveries} recoveries without a step (elastic.max_fruitless): {self.reason}{words}"
        return replace(self, reason=reason)

    def of_all_nodes(self) -> Verdict:
        """What was taken for something that one node lacks, when it is not: the user's or the program's."""
        users = all(classify_error(item.error, item.message) == "user" for item in self.evidence)
        return replace(self, fault=Fault.USER if users else Fault.PROGRAM, nodes=())


_CONNECTION = re.compile(
    r"Connection (closed|reset|refused)|closed by peer|Broken pipe|Socket|gloo|NCCL|nccl|timed? ?out|rendezvous"
    r"|aborted|recvValue failed|sendBytes failed|Stop_waiting|connectFullMesh|Connection was likely closed",
    re.IGNORECASE,
)
_DEVICE = re.compile(
    r"uncorrectable|ECC|illegal memory access|illegal instruction|device-side|unspecified launch failure"
    r"|CUDA error: (?!out of memory)|misaligned address|GPU is lost|fallen off the bus"
    r"|cuBLAS|CUBLAS_STATUS|CUDNN_STATUS",
    re.IGNORECASE,
)
_CERTAIN = re.compile(r"uncorrectable|ECC error|GPU is lost|fallen off the bus", re.IGNORECASE)
_OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|Cannot allocate memory|not enough memory", re.IGNORECASE)


_ENVIRONMENT = re.compile(
    r"No space left|quota exceeded|Read-only file system|Input/output error|Stale file handle|Too many open files"
    r"|Address already in use|Cannot assign requested address|Permission denied|File name too long"
    r"|No such file or directory|Resource temporarily unavailable",
    re.IGNORECASE,
)
_OF_THE_SYSTEM = ("OSError", "FileNotFoundError", "PermissionError", "NotADirectoryError", "FileExistsError",
                  "BlockingIOError", "IsADirectoryError")  # fmt: skip


def classify_error(error: str, message: str) -> str:
    """``user``, ``memory``, ``device``, ``connection``, ``environment`` or ``program`` for an exception of a worker."""
    if error == "UserError":
        return "user"
    if error in ("OutOfMemoryError", "MemoryError") or _OUT_OF_MEMORY.search(message):
        return "memory"
    if error in ("DistBackendError", "DistNetworkError", "DistStoreError", "ConnectionError", "WireError"):
        return "connection"
    if error in ("RuntimeError", "AcceleratorError") and _DEVICE.search(message):
        return "device"
    if error == "RuntimeError" and _CONNECTION.search(message):
        return "connection"
    if error in _OF_THE_SYSTEM and _ENVIRONMENT.search(message):
        return "environment"
    return "program"


def few(texts: Sequence[str], between: str = ", ", most: int = 8) -> str:
    """The first of ``texts``, and how many more there are: a part of a cluster may fail at once."""
    return between.join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def blame(evidence: Sequence[Evidence], world: Iterable[Device]) -> Verdict:
    """Who is at fault, by the first rule of ``RULES`` that applies. ``world``: devices of the generation."""
    devices = set(world)
    for rule in RULES:
        verdict = rule(evidence, devices)
        if verdict is not None:
            return verdict
    return Verdict(Fault.NETWORK, "connections broke and every process and node is alive", evidence=tuple(evidence))


def _of(evidence: Sequence[Evidence], *kinds: Kind) -> list[Evidence]:
    return [item for item in evidence if item.kind in kinds]


def said(item: Evidence) -> str:
    """The error of a process in one line."""
    text = item.message.strip().splitlines()[-1][:300] if item.message.strip() else ""
    return f"{item.error}: {text}" if item.error else text


def _user(evidence: Sequence[Evidence], devices: set[Device]) -> Verdict | None:
    """A mistake of the user; but one that only the processes of one node of several meet, before they train, is first
    taken for something that this node lacks. The ledger knows whether another node has met it too."""
    items = [item for item in _of(evidence, Kind.RAISED) if classify_error(item.error, item.message) == "user"]
    if not items:
        return None
    if (node := _one_node_of_several(items, devices)) is not None:
        return Verdict(Fault.SETUP, items[0].message, nodes=(node,), evidence=tuple(items))
    return Verdict(Fault.USER, items[0].message, evidence=(items[0],))


def _one_node_of_several(items: Sequence[Evidence], devices: set[Device]) -> str | None:
    """The node of all the ``items``, which ended before they trained, if there are others that did not end so."""
    nodes = {item.node for item in items}
    alone = len(nodes) == 1 and all(item.forming for item in items) and {device.node for device in devices} - nodes
    return nodes.pop() if alone else None


def _out_of_memory(evidence: Sequence[Evidence], _: set[Device]) -> Verdict | None:
    for item in _of(evidence, Kind.RAISED):
        if classify_error(item.error, item.message) == "memory":
            return Verdict(
                Fault.OUT_OF_MEMORY,
                f"rank {item.rank} ran out of memory ({said(item)}); lower train.micro_batch_size, or use"
                " parallel.recompute or more tensor or pipeline parallelism",
                evidence=(item,),
            )
    return None


def _same_error_in_several_places(evidence: Sequence[Evidence], devices: set[Device]) -> Verdict | None:
    ours = ("program", "environment")
    raised = [item for item in _of(evidence, Kind.RAISED) if classify_error(item.error, item.message) in ours]
    by_error: dict[str, list[Evidence]] = {}
    for item in raised:
        by_error.setdefault(item.error, []).append(item)
    for items in by_error.values():
        places = {item.device for item in items}
        if len(places) > 1 or len(devices) == 1:
            first = min(items, key=lambda item: item.rank or 0)
            if (node := _one_node_of_several(items, devices)) is not None:
                reason = f"{len(places)} processes of {node} alone raised the same error: {said(first)}"
                return Verdict(Fault.SETUP, reason, nodes=(node,), evidence=tuple(items))
            return Verdict(
                Fault.PROGRAM,
                f"{len(places)} of {len(devices)} processes raised the same error, rank {first.rank}: {said(first)}",
                evidence=tuple(items),
            )
    return None


def _broken_device(evidence: Sequence[Evidence], _: set[Device]) -> Verdict | None:
    items = _of(evidence, Kind.UNHEALTHY, Kind.DISAGREES)
    items += [
        item for item in _of(evidence, Kind.RAISED) if classify_error(item.error, item.message) == "device"
        and _CERTAIN.search(item.message)
    ]  # fmt: skip
    broken = tuple(sorted({item.device for item in items if item.device is not None}))
    if not broken:
        return None
    reason = few(sorted({f"{item.device}: {item.kind.value}, {said(item)}" for item in items}), "; ")
    return Verdict(Fault.DEVICE, reason, broken, certain=True, evidence=tuple(items))


def _host_memory(evidence: Sequence[Evidence], _: set[Device]) -> Verdict | None:
    items = _of(evidence, Kind.HOST_MEMORY)
    if not items:
        return None
    ended = few([f"rank {item.rank} of {item.node}" for item in items])
    reason = f"the system ended {ended} because the node had no memory left (the host's, not a GPU's)"
    return Verdict(Fault.HOST_MEMORY, reason, evidence=tuple(items))


def _whole_node(evidence: Sequence[Evidence], devices: set[Device]) -> Verdict | None:
    silent = tuple(sorted({item.node for item in _of(evidence, Kind.NODE_SILENT)}))
    gone = tuple(sorted({item.node for item in _of(evidence, Kind.AGENT_LOST)} - set(silent)))
    if silent:
        return Verdict(Fault.NODE, f"no heartbeat from {few(silent)}", nodes=silent, evidence=tuple(evidence))
    if gone:
        reason = f"the agent of {few(gone)} is gone"
        return Verdict(Fault.AGENT, reason, nodes=gone, evidence=tuple(evidence))
    dead = {item.device for item in _of(evidence, Kind.EXIT) if item.device is not None}
    for node in sorted({device.node for device in dead}):
        here = {device for device in devices if device.node == node}
        if len(here) > 1 and here <= dead and here != devices and dead <= here:
            return Verdict(
                Fault.NODE, f"all {len(here)} processes of {node} died", nodes=(node,), evidence=tuple(evidence)
            )
    return None


def _lost_copies(evidence: Sequence[Evidence], _: set[Device]) -> Verdict | None:
    items = _of(evidence, Kind.COPY_LOST)
    if not items or len(items) + len(_of(evidence, Kind.CONNECTION)) < len(evidence):
        return None  # something else has happened too, and is judged
    reason = few(sorted({item.message for item in items}), "; ")
    return Verdict(Fault.ENVIRONMENT, f"{reason}; another copy or the checkpoint is taken", evidence=tuple(items))


def _environment(evidence: Sequence[Evidence], devices: set[Device]) -> Verdict | None:
    items = _of(evidence, Kind.RAISED)
    found = [item for item in items if classify_error(item.error, item.message) == "environment"]
    if not found:
        return None
    reason = few([f"rank {item.rank} of {item.node}: {said(item)}" for item in found], "; ")
    node = _one_node_of_several(found, devices)
    nodes = (node,) if node is not None else ()
    reason = f"{reason} (the system's answer, not the device's fault)"
    return Verdict(Fault.ENVIRONMENT, reason, nodes=nodes, evidence=tuple(found))


def _all_stand_still(evidence: Sequence[Evidence], devices: set[Device]) -> Verdict | None:
    hung = {item.device for item in _of(evidence, Kind.HANG, Kind.STALL)}
    if len(devices) < 2 or not devices <= hung:
        return None
    reason = f"all {len(devices)} processes stand still, and nothing tells them apart"
    return Verdict(Fault.NETWORK, reason, evidence=tuple(evidence))


def _single_devices(evidence: Sequence[Evidence], devices: set[Device]) -> Verdict | None:
    alone = (Kind.EXIT, Kind.HANG, Kind.RAISED, Kind.NOT_FINITE, Kind.SLOW)
    items = [
        item
        for item in _of(evidence, *alone)
        if item.device in devices
        and not (item.kind is Kind.RAISED and classify_error(item.error, item.message) == "connection")
    ]
    if not items:
        return None
    suspects = tuple(sorted({item.device for item in items if item.device is not None}))
    what = few([f"{item.device}: {_how(item)}" for item in items], "; ")
    return Verdict(Fault.DEVICE, what, suspects, evidence=tuple(items))


def _stalls(evidence: Sequence[Evidence], devices: set[Device]) -> Verdict | None:
    items = [item for item in _of(evidence, Kind.STALL) if item.device in devices]
    if not items:
        return None
    what = few([f"{item.device}: {_how(item)}" for item in items], "; ")
    return Verdict(Fault.STALL, f"{what}; no device is to blame", evidence=tuple(items))


def _how(item: Evidence) -> str:
    if item.kind is Kind.EXIT and item.status is not None:
        return f"rank {item.rank} ended with " + (
            f"signal {-item.status}" if item.status < 0 else f"status {item.status}"
        )
    who = f"rank {item.rank} " if item.rank is not None else ""
    return f"{who}{item.kind.value}" + (f", {said(item)}" if said(item) else "")


RULES = (
    _user,
    _out_of_memory,
    _broken_device,
    _host_memory,
    _whole_node,
    _same_error_in_several_places,
    _environment,
    _lost_copies,
    _all_stand_still,
    _single_devices,
    _stalls,
)
"""In order: a user's mistake; memory of a device; hard evidence against a device; memory of a host; a silent node, a
dead agent, all processes of one node; the same error in several places; disk, files and ports; lost memory copies; a
standstill of all; single devices; a program that stood still."""
