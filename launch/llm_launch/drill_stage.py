"""One blame drill as its scene sees it: a run, a rank, and what was found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llm_launch.drill_verdicts import Finding
from llm_launch.live_run import LiveRun

Device = list[Any]
"""A node's name and the number of a device there."""
PROVEN_MORE = 12
"""Steps between two stalls of one device, minutes in a real run: more than those after which a hang is forgotten."""


@dataclass
class Stage:
    """A live run, the rank that a scene acts at, and what is to be noted of it."""

    run: LiveRun
    rank: int
    finding: Finding
    clean_up: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """What is undone after the run's end."""
    before: int = 0
    """Events of the run when the scene begins: a busy machine may have made a node silent while the run started."""

    def begin(self) -> None:
        """The scene begins."""
        self.before = len(self.run.events())

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Events of these kinds since the scene began."""
        return [event for event in self.run.events()[self.before :] if event["event"] in kinds]

    def once(self, kind: str, **details: Any) -> Device:
        """Causes one fault at the rank and waits for the first step after it; the device."""
        target = self.run.target(self.rank)
        self.run.first_step_after(self.run.cause_at(kind, target, **details))
        return [target.node, target.device]

    def again(self, device: Device, kind: str, **details: Any) -> None:
        """The same at the rank that a device has by now."""
        self.run.until(lambda: device in self.run.status().get("ranks", []), 120.0, f"a rank of {device}")
        self.rank = self.run.status()["ranks"].index(device)
        self.once(kind, **details)

    def make_steps(self, number: int) -> None:
        """Waits for so many steps more."""
        self.run.reach(self.run.steps()[-1]["step"] + number)


@dataclass(frozen=True)
class Scene:
    """One kind of blame drill."""

    act: Callable[[Stage], list[Device]]
    """Causes it; the devices that have to be removed."""
    overrides: tuple[str, ...] = ()
    steps: int = 45
    status: int = 0
    """Exit status of the run."""
    end_s: float = 180.0
    """Longest time from the last fault to the run's end."""
    impossible: Callable[[], str] = lambda: ""
    """Why it cannot be caused on this machine; empty where it can."""
