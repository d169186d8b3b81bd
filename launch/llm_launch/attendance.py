"""Which expected nodes are there, which are not, and why: each that does not join is an event and in the status."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

from llm_launch import wire
from llm_launch.absence import MUTE, TRIES, Absence, alike
from llm_launch.blame import few
from llm_launch.journal import Journal
from llm_launch.roster import Roster

Until = Callable[[Callable[[], bool], float], Awaitable[bool]]
"""Waits for a condition, so many seconds at most; whether it holds then."""
SAY_S = 30.0
"""Time after which it is said which nodes are waited for."""


@dataclass(frozen=True)
class Missing:
    """A node that is not there."""

    absence: Absence
    tries: int = 1
    """Agents of it that did not come, in a row."""
    ends: int = 0
    """Those of them, the last ones, that ended by themselves: another would too."""


class Attendance:
    """Nodes that have not joined, or have not come back."""

    def __init__(self, roster: Roster, journal: Journal) -> None:
        self.roster, self.journal = roster, journal
        self.missing: dict[str, Missing] = {}
        self.last_words: dict[str, str] = {}
        """By node, why an agent ended that had joined, as far as that is known."""
        self.visitors: set[wire.Channel] = set()
        """Connections of agents whose node lacks something."""

    def joined(self, node: str) -> None:
        """It is there."""
        self.missing.pop(node, None)

    def absent(self, item: Absence, by_agent: bool = False) -> None:
        """It is not, and why; said when the reason is another than before. by_agent: whether its agent says so."""
        node = self.roster.nodes.get(item.node)
        if not item.reason or (node is not None and node.channel is not None):
            return
        before = self.missing.get(item.node)
        if before is None or before.absence.reason != item.reason:
            self.journal.event("not_joined", node=item.node, cause=item.reason)
        ends = 0 if item.passing else TRIES if by_agent else (before.ends if before else 0) + 1
        self.missing[item.node] = Missing(item, (before.tries if before else 0) + 1, ends)

    def ended(self, item: Absence) -> None:
        """The agent of a node ended, whose loss is known already: why, if that is said."""
        if item.reason and not item.reason.startswith(MUTE):
            self.last_words[item.node] = item.reason
            self.journal.event("agent_ended", node=item.node, cause=item.reason)

    def words_of(self, nodes: Iterable[str]) -> str:
        """Why the agents of these nodes ended, in a clause; "" if that is not known."""
        told: dict[str, list[str]] = {}
        for name in nodes:
            if name in self.last_words:
                told.setdefault(self.last_words[name], []).append(name)
        return "".join(f"; of {few(names)}: {reason}" for reason, names in told.items())

    async def gather(
        self, expected: Mapping[str, int], wait_s: float, until: Until, stopped: Callable[[], bool]
    ) -> None:
        """Waits until all is settled, or ``stopped``, for ``wait_s`` at most; says after a while for which nodes."""
        first_s = min(SAY_S, wait_s)

        def done() -> bool:
            return stopped() or self.settled(expected)

        if await until(done, first_s):
            return
        names = self.unheard(expected)
        what = f"nothing was heard of {few(names)} yet" if names else "not all devices have a process that is ready"
        self.journal.event("wait", cause=what, seconds=wait_s - first_s)
        if not await until(done, wait_s - first_s):
            for name in self.unheard(expected):
                self.absent(Absence(name, f"nothing was heard of its agent within {wait_s:g} s"))

    def settled(self, expected: Mapping[str, int]) -> bool:
        """Whether nothing is to be waited for: some node is ready, and every other is ready or known to be missing; or
        none can come. expected: devices of each node."""
        nodes = {node.name: node for node in self.roster.alive()}
        ready = {name for name, node in nodes.items()
                 if len(node.ready()) >= min(expected.get(name, 0), len(node.devices))}  # fmt: skip
        known = all(name in ready or (name in self.missing and name not in nodes) for name in expected)
        return (bool(ready) and known) or self.hopeless(expected)

    def hopeless(self, expected: Mapping[str, int]) -> bool:
        """Whether no node is there, and the agents of all have ended by themselves again and again, or say that their
        node lacks something."""
        ended = all(name in self.missing and self.missing[name].ends >= TRIES for name in expected)
        return ended and not self.roster.alive()

    def why(self) -> str:
        """What the missing nodes have in common, in a sentence."""
        return alike([missing.absence for missing in self.missing.values()])

    def unheard(self, expected: Mapping[str, int]) -> list[str]:
        """Expected nodes of which nothing is known."""
        here = {node.name for node in self.roster.alive()}
        return [name for name in expected if name not in here and name not in self.missing]

    def dismiss(self) -> None:
        """The run is over: agents that wait for what their node lacks end."""
        for channel in self.visitors:
            channel.send({"is": "end", "keep": True})
