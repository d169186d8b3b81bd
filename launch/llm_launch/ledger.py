"""What is remembered of each device's faults, also by the next start."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from llm_launch.blame import Device, Fault, Kind, Verdict, said

PROVEN_STEPS = 10
"""Steps that a device makes after a hang in which a fault that stays would have shown again."""
PROVEN_PROBES = 40
"""The same for a slow device, in probes. Three slow ones in a row find it; in drills that took up to 14 probes."""


class Strike(NamedTuple):
    """One fault of a device."""

    at_s: float
    """Unix time."""
    reason: str
    until_steps: int = 0
    """Steps of its device afterwards in which a fault that stays would have shown again: then it is forgotten; 0: it
    stays."""


@dataclass
class Ledger:
    """Strikes and removals of one run.

    A suspected device is used again until its ``strikes``-th fault within ``expire_s`` seconds, which removes it for
    good; hard evidence removes it at once. If the same error follows the work to another device, the program is at
    fault and both are acquitted. A process that ends while its generation forms says little about its device, since
    the launcher, the network and the file system are at work then: it counts if the next forming ends there again.
    A hang counts until the device has made ``PROVEN_STEPS`` steps, since a program may stand still for reasons of its
    own, and slowness until it has made ``slow_steps``, since a busy host may make a process slow for a while.
    """

    strikes: int = 2
    expire_s: float = 86400.0
    slow_steps: int = PROVEN_PROBES * 10
    counts: dict[Device, list[Strike]] = field(default_factory=dict)
    removed: dict[Device, str] = field(default_factory=dict)
    errors: dict[str, set[Device]] = field(default_factory=dict)
    lacking: dict[str, str] = field(default_factory=dict)
    """Nodes that could not begin to train in this start though others could, with what they said."""
    refused: str = ""
    """The only node to which the system refused something in the last forming, when no generation has trained since."""
    forming: set[Device] = field(default_factory=set)
    """Devices whose process ended in the last forming, when no generation has trained since."""
    now: Callable[[], float] = field(default=time.time, compare=False)

    def judge(self, verdict: Verdict) -> Verdict:
        """Takes in a verdict about devices; the one that comes back blames the program if another device failed with
        the same error before, and nobody for a process that ended while its generation formed."""
        if verdict.fault is Fault.ENVIRONMENT and len(verdict.nodes) == 1:
            before, (self.refused,) = self.refused, verdict.nodes
            if before == self.refused:  # twice in a row: it lacks something for good
                verdict = replace(verdict, fault=Fault.SETUP)
        if verdict.fault is Fault.SETUP:
            (node,) = verdict.nodes
            if self.lacking.keys() - {node}:  # a second node says so: it is not the first one's
                return verdict.of_all_nodes()
            self.lacking[node] = verdict.reason
        if verdict.fault is not Fault.DEVICE:
            return verdict
        for item in verdict.evidence:
            if item.kind is Kind.RAISED and item.device is not None:
                places = self.errors.setdefault(f"{item.error}: {item.message[:200]}", set())
                places.add(item.device)
                if len(places) > 1:
                    for device in places:
                        self.acquit(device)
                    return Verdict(
                        Fault.PROGRAM,
                        f"the same error came again on another device, so it is the program's: {said(item)}",
                        evidence=verdict.evidence,
                    )
        if not verdict.certain and all(item.kind is Kind.EXIT and item.forming for item in verdict.evidence):
            first = [device for device in verdict.devices if device not in self.forming]
            self.forming = set(verdict.devices)
            if first:
                guilty = tuple(device for device in verdict.devices if device not in first)
                reason = f"{verdict.reason}, while the generation formed"
                if not guilty:
                    return Verdict(Fault.UNKNOWN, f"{reason}: no device is to blame yet", evidence=verdict.evidence)
                verdict = replace(verdict, devices=guilty, reason=reason)
        for device in verdict.devices:
            new = Strike(self.now(), verdict.reason, self._until_steps(verdict, device))
            given = [*self._fresh(device), new]
            self.counts[device] = given
            slow = self.slow_steps  # slowness and another fault are no sign of each other
            alike = [strike for strike in given if (strike.until_steps == slow) == (new.until_steps == slow)]
            if verdict.certain or len(alike) >= self.strikes:
                self.removed[device] = verdict.reason
        return verdict

    def _fresh(self, device: Device) -> list[Strike]:
        """Strikes that count still; one that lies in the future, since a clock was set back, does."""
        return [strike for strike in self.counts.get(device, []) if self.now() - strike.at_s < self.expire_s]

    def _until_steps(self, verdict: Verdict, device: Device) -> int:
        kinds = {item.kind for item in verdict.evidence if item.device == device}
        return {frozenset({Kind.HANG}): PROVEN_STEPS, frozenset({Kind.SLOW}): self.slow_steps}.get(frozenset(kinds), 0)

    def made_steps(self, number: int, devices: Iterable[Device]) -> None:
        """These devices have made so many steps in the generation that ends: what would have shown again in as many is
        forgotten."""
        for device in devices:
            if device in self.counts:
                self.counts[device] = [s for s in self.counts[device] if not 0 < s.until_steps <= number]

    def acquit(self, device: Device) -> None:
        """Forgets strikes and removal of a device that is not at fault."""
        self.counts.pop(device, None)
        self.removed.pop(device, None)

    def formed(self) -> None:
        """A generation trains."""
        self.forming.clear()
        self.refused = ""

    def to_json(self) -> dict[str, Any]:
        """What is written into the run folder."""
        return {
            "strikes": [[*device, [list(strike) for strike in given]] for device, given in self.counts.items()],
            "removed": [[*device, reason] for device, reason in self.removed.items()],
            "errors": [[error, [list(device) for device in places]] for error, places in self.errors.items()],
        }

    @classmethod
    def from_json(
        cls, values: dict[str, Any], strikes: int, expire_s: float = 86400.0, probe_steps: int = 10
    ) -> Ledger:
        """Inverse of ``to_json``. Strikes that an earlier version wrote have no time, and count from now on."""
        found = cls(strikes, expire_s, PROVEN_PROBES * max(probe_steps, 1))
        for node, index, given in values.get("strikes", []):
            found.counts[Device(node, index)] = [
                Strike(found.now(), item)
                if isinstance(item, str)
                else Strike(float(item[0]), str(item[1]), int((*item, 0)[2]))
                for item in given
            ]
        found.removed = {Device(node, index): reason for node, index, reason in values.get("removed", [])}
        found.errors = {error: {Device(*place) for place in places} for error, places in values.get("errors", [])}
        return found
