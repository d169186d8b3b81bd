"""How the processes of a layout make the same calls: rank 0 serves HTTP and tells the others what it is about to do."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from llm_parallel.generate.engine import Generator
from llm_parallel.generate.requests import Request
from llm_parallel.parallel.groups import Groups

HEARTBEAT_S = 1.0
"""How often rank 0 speaks to the others when there is nothing to do; far below the timeout of the process group."""
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Submit:
    """Answer a request."""

    request: Request


@dataclass(frozen=True)
class Cancel:
    """End the answers to a request."""

    number: int


@dataclass(frozen=True)
class Load:
    """Take up the weights of a checkpoint; no answer is in work then."""

    folder: str


@dataclass(frozen=True)
class Stop:
    """End the process."""


Command = Submit | Cancel | Load | Stop


class Control:
    """Hands rank 0's commands to all processes of the layout. timeout_s: how long they wait for one."""

    def __init__(self, groups: Groups, timeout_s: float = TIMEOUT_S) -> None:
        self._several = groups.mesh.world_size > 1
        self._group: Any = None
        if self._several:
            timeout = datetime.timedelta(seconds=timeout_s)
            self._group = dist.new_group(backend="gloo", timeout=timeout)

    @property
    def several(self) -> bool:
        """Whether there are other processes, which have to hear from rank 0 now and then."""
        return self._several

    def share(self, commands: Sequence[Command] | None) -> list[Command]:
        """Rank 0 gives the commands of this pass, the others None; all get them."""
        if not self._several:
            return list(commands or ())
        box: list[Any] = [list(commands) if commands is not None else None]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


def apply(commands: Sequence[Command], generator: Generator, load: Callable[[str], None]) -> bool:
    """Carries out commands, alike on every process; returns whether to go on. ``load``: loads a checkpoint's
    weights."""
    for command in commands:
        if isinstance(command, Submit):
            generator.submit(command.request)
        elif isinstance(command, Cancel):
            generator.cancel(command.number)
        elif isinstance(command, Load):
            load(command.folder)
            generator.refresh()
        else:
            return False
    return True


def follow(control: Control, generator: Generator, load: Callable[[str], None]) -> None:
    """What the other processes do until rank 0 stops them."""
    while apply(control.share(None), generator, load):
        if not generator.idle:
            generator.tick()
