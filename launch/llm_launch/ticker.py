"""What the controller does at regular times, whatever it waits for: signs of life, agents that are gone, the status."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from llm_launch.blame import Kind
from llm_launch.copy_catalog import CopyCatalog
from llm_launch.fleet import Fleet
from llm_launch.starters import AgentStarter
from llm_launch.states import OVER, Phase

START_AGAIN_S = 5.0
"""Time after which an agent that could not be started is tried again."""
LONGEST_PAUSE_S = 60.0


class Ticker:
    """Runs beside the controller's decisions. stop: asks the run to end; write_status: replaces elastic.json."""

    def __init__(
        self,
        fleet: Fleet,
        copies: CopyCatalog,
        starter: AgentStarter,
        stop: Callable[[], None],
        write_status: Callable[[], None],
    ) -> None:
        self.fleet, self.copies, self.starter = fleet, copies, starter
        self._stop, self._write_status = stop, write_status
        self._last_look_s = time.monotonic()
        self._last_beat_s = 0.0
        self._last_status_s = 0.0
        self._not_before_s = 0.0
        self._stopping = False
        self._due_s: dict[str, float] = {}
        """By node, the time before which its agent is not started again."""

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(self.fleet.tick_s)
            self.tick(time.monotonic())

    def tick(self, now: float) -> None:
        """What is due at the time ``now``."""
        fleet, elastic = self.fleet, self.fleet.elastic
        if now - self._last_look_s > elastic.lost_after_s / 2:
            for node in fleet.roster.alive():
                node.heard_s = now  # this process itself was held up and received nothing
        self._last_look_s = now
        if fleet.asked_to_stop and not self._stopping:
            self._stopping = True
            self._stop()
        self._take_absences(now)
        self._start_agents(now)
        if now - self._last_beat_s >= elastic.heartbeat_s:
            self._last_beat_s = now
            for node in fleet.roster.alive():
                node.send({"is": "beat"})
            self.copies.forget_older()
        for node in fleet.roster.alive():
            if now - node.heard_s > elastic.lost_after_s:
                channel = node.channel
                fleet.lost(node, Kind.NODE_SILENT)
                if channel is not None:
                    channel.close()
        if now - self._last_status_s >= max(1.0, 20.0 * fleet.tick_s):
            self._last_status_s = now
            self._write_status()

    def _take_absences(self, now: float) -> None:
        """What the starter has seen of nodes that are not there; their agents are started again, at once the first time
        and then after pauses that grow."""
        fleet, missing = self.fleet, self.fleet.attendance.missing
        for item in self.starter.look():
            node = fleet.roster.nodes.get(item.node)
            if item.late:
                fleet.attendance.ended(item)
                continue
            if fleet.phase in OVER or (node is not None and node.channel is not None):
                continue
            if item.node in fleet.to_restart:  # it is the end of the agent that was lost, which is known
                fleet.attendance.ended(item)
            else:
                fleet.attendance.absent(item)
            if item.ended:
                tries = missing[item.node].tries if item.node in missing else 0
                self._due_s[item.node] = now + (min(tries * START_AGAIN_S, LONGEST_PAUSE_S) if tries > 1 else 0.0)
                fleet.to_restart.add(item.node)
            fleet.changed.set()

    def _start_agents(self, now: float) -> None:
        """Starts those that are gone again. An agent's start takes processor time that a recovery and its first step
        need, so it waits for that step. A machine that has no process or no descriptor left has some again later."""
        fleet = self.fleet
        recovered = fleet.phase is Phase.TRAINING and fleet.step > fleet.journal.resumed_step
        if not (recovered or fleet.phase is Phase.WAITING) or now < self._not_before_s:
            return
        for name in sorted(name for name in fleet.to_restart if self._due_s.get(name, 0.0) <= now):
            try:
                self.starter.start(name)
            except OSError as error:
                self._not_before_s = now + START_AGAIN_S
                fleet.journal.event("not_started", node=name, cause=error.strerror or str(error))
                return
            fleet.to_restart.discard(name)
