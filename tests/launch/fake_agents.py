"""Agents without processes: they speak to a real controller over sockets, and a test says what their workers do."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from llm_launch import wire
from llm_launch.absence import Absence
from llm_launch.controller import Controller
from llm_parallel.config.tree import RunConfig

SECRET = "of this test"
BEAT_S = 0.01
LIMIT_S = 60.0
"""A hang ends here; nothing is measured by it."""


class FakeAgent:
    """One agent with a worker on each device, which answers as a healthy one does."""

    def __init__(self, nodes: Nodes, name: str, devices: list[int]) -> None:
        self.nodes, self.name, self.devices = nodes, name, devices
        self.ranks: dict[int, int] = {}
        self.generation = 0
        self.partner: int | None = None
        self.retired: list[int] = []
        self.channel: wire.Channel | None = None

    def tell(self, message: wire.Message) -> None:
        """To the controller."""
        if self.channel is not None:
            self.channel.send({**message, "node": self.name})

    async def run(self, port: int) -> None:
        """From its hello to the controller's end."""
        self.channel = await wire.connect("127.0.0.1", port, SECRET)
        address = ["127.0.0.1", self.nodes.number(self.name)]
        self.tell({"is": "hello", "host": "127.0.0.1", "devices": self.devices, "copies": address, "pid": 1})
        for device in self.devices:
            self.tell({"is": "worker", "device": device, "pid": 1, "number": 0, "generation": 0})
        beat = asyncio.create_task(self._beat())
        try:
            while (message := await self.channel.receive()) is not None:
                if message["is"] == "end":
                    self.nodes.kept.append(message["keep"])
                    break
                self._answer(message)
        except OSError:
            pass  # the test cut it off
        finally:
            beat.cancel()
            self.channel = None

    def _answer(self, message: wire.Message) -> None:
        kind, device = message["is"], message.get("device")
        if self.name in self.nodes.frozen and kind in ("abort", "look", "kill", "stop", "pause"):
            return
        if self.name in self.nodes.behind and kind in ("abort", "look", "kill"):
            self._stand_still(message)
        elif self.name in self.nodes.stopped and kind in ("assign", "abort", "kill"):
            self._stop(message)
        elif kind == "assign":
            if message["generation"] != self.generation:
                self.generation, self.ranks = message["generation"], {}
            self.ranks[device] = message["rank"]
            self.nodes.origins[self.generation] = message["origin"]
            self.partner = message["partner"][1] if message["partner"] else None
            if message["restore"]:
                self.nodes.sources.setdefault(self.generation, json.loads(message["restore"])["sources"])
            if message["rank"] == 1 and message["restore"] and self.nodes.lose_copies:
                left = {"is": "left", "device": device, "outcome": "aborted", "generation": self.generation}
                self.tell({**left, "copy_lost": self.nodes.lose_copies.pop(0), "message": "a copy has changed"})
                del self.ranks[device]
                return
            if self.name in self.nodes.refusals:
                error, text = self.nodes.refusals[self.name]
                left = {"is": "left", "device": device, "outcome": "failed", "generation": self.generation}
                self.tell({**left, "error": error, "message": text})
                del self.ranks[device]
                return
            step = self.nodes.restored_step(message["restore"])
            self.tell({"is": "training", "device": device, "step": step, "generation": self.generation})
        elif kind in ("abort", "pause", "stop"):
            outcome = {"abort": "aborted", "pause": "paused", "stop": "stopped"}[kind]
            for number in self.ranks:
                left = {"is": "left", "device": number, "outcome": outcome}
                self.tell({**left, "generation": self.generation})
        elif kind == "look":
            seen = {"stack": self.nodes.stack, "collectives": {"dp": self.nodes.step}, "step": self.nodes.step}
            self.tell({"is": "seen", "device": device, **seen})
        elif kind == "inventory":
            entries = [{"kind": kept, "generation": generation, "rank": rank, "steps": steps,
                        "origin": self.nodes.origins.get(generation)}
                       for (kept, generation, rank), steps in self.nodes.memory[self.name].items()]  # fmt: skip
            self.tell({"is": "inventory", "entries": entries})
        elif kind == "partner":
            self.partner = message["partner"][1]
        elif kind == "retire":
            self.retired.append(message["device"])

    def _stand_still(self, message: wire.Message) -> None:
        """As a process does whose main thread goes no further: it can be looked at and ended, and is forked anew."""
        device, behind = {"device": message.get("device")}, self.nodes.behind
        if message["is"] == "look":
            seen = {"stack": "in a program", "collectives": {"dp": self.nodes.step - 1}, "step": self.nodes.step}
            self.tell({"is": "seen", **device, **seen, **behind[self.name]})
        elif message["is"] == "kill":
            del behind[self.name]
            self.nodes.age_s = 0.0
            self.tell({"is": "exit", **device, "status": -9, "host_memory": False, "number": message["number"]})
            self.tell({"is": "worker", **device, "pid": 1, "number": message["number"] + 1, "generation": 0})

    def _stop(self, message: wire.Message) -> None:
        """As a process does that somebody stops: it takes no assignment and does not leave, which its agent sees; it is
        ended and forked anew."""
        device = {"device": message.get("device")}
        if message["is"] == "assign":
            self.generation = message["generation"]
            self.tell({"is": "stopped", **device, "number": message["number"]})
        elif message["is"] == "kill":
            self.nodes.stopped.remove(self.name)
            self.tell({"is": "exit", **device, "status": -9, "host_memory": False, "number": message["number"]})
            self.tell({"is": "worker", **device, "pid": 1, "number": message["number"] + 1, "generation": 0})

    async def _beat(self) -> None:
        nodes = self.nodes
        while True:
            progress = {
                device: [self.generation, nodes.step, nodes.age_s, nodes.step_s, nodes.beats + 1.0, 0.0,
                         nodes.own_s.get((self.name, device), 1.0)]
                for device in self.ranks
            }  # fmt: skip
            self.tell({"is": "beat", "progress": progress})
            await asyncio.sleep(BEAT_S)


class Nodes:
    """Starts fake agents as the controller asks, and keeps what outlives them: the nodes' memory."""

    host, secret = "127.0.0.1", SECRET

    def __init__(self, config: RunConfig, names: list[str], devices: int = 1) -> None:
        self.config, self.names = config, names
        self.expected = dict.fromkeys(names, devices)
        self.agents: dict[str, FakeAgent] = {}
        self.memory: dict[str, dict[tuple[str, int, int], list[int]]] = {name: {} for name in names}
        self.step, self.step_s, self.age_s, self.beats = 0, 1.0, 0.0, 0
        self.frozen: set[str] = set()
        """Nodes whose processes do nothing and cannot be ended, while their agent goes on."""
        self.stopped: set[str] = set()
        """Nodes whose process is stopped from the next assignment on, until it is ended."""
        self.behind: dict[str, dict[str, Any]] = {}
        """Nodes whose process stands still until it is ended, with what more is seen of it."""
        self.lose_copies: list[list[Any]] = []
        """Kind and rank of copies that rank 1 cannot read, one for each of its next generations."""
        self.sources: dict[int, list[Any]] = {}
        """By generation, where its ranks read their state."""
        self.origins: dict[int, dict[str, Any]] = {}
        """By generation, what the controller has said of it to be kept with the copies."""
        self.own_s: dict[tuple[str, int], float] = {}
        self.stack = 'File "distributed_c10d.py", in all_reduce'
        self.restarts = True
        self.away: set[str] = set()
        """Nodes whose agents do not come."""
        self.refusals: dict[str, tuple[str, str]] = {}
        """By node, the class and message of the error that its workers raise before they train."""
        self.absences: list[Absence] = []
        """What the starter has seen of nodes that are not there, since the controller last asked."""
        self.kept: list[bool] = []
        """What each agent was told at the end about its memory copies."""
        self._port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def number(self, name: str) -> int:
        """Stands for the port under which a node hands out its copies."""
        return self.names.index(name) + 1

    def begin(self, port: int) -> None:
        """Starts them all."""
        self._port = port
        for name in self.names:
            self._start(name)

    def start(self, node: str) -> None:
        """Again, where the test allows it."""
        if self.restarts:
            self._start(node)

    def _start(self, name: str) -> None:
        if name in self.away:
            return
        agent = self.agents[name] = FakeAgent(self, name, list(range(self.expected[name])))
        task = asyncio.get_running_loop().create_task(agent.run(self._port))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def look(self) -> list[Absence]:
        """What a test has put there."""
        found, self.absences = self.absences, []
        return found

    def condemn(self, node: str, reason: str) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""

    def restored_step(self, restore: str | None) -> int:
        """Step that workers go on from: one in memory, else the beginning, since there is no checkpoint."""
        self.step = json.loads(restore)["step"] if restore else 0
        return self.step

    def make_steps(self, count: int) -> None:
        """Every worker makes them, and copies the last two into its own node's memory and its partner's."""
        self.step += count
        for agent in list(self.agents.values()):
            for rank in agent.ranks.values() if agent.channel is not None else ():
                steps = [self.step - 1, self.step]
                self.memory[agent.name]["own", agent.generation, rank] = steps
                if agent.partner is not None:
                    self.memory[self.names[agent.partner - 1]]["kept", agent.generation, rank] = steps

    def lose(self, *names: str) -> None:
        """Their agents die; the nodes' memory stays."""
        for name in names:
            channel = self.agents[name].channel
            assert channel is not None
            channel.close()


class Story:
    """A controller at work, for a test that acts and waits for what the controller records."""

    def __init__(self, controller: Controller, nodes: Nodes) -> None:
        self.controller, self.nodes = controller, nodes
        self.recorded: list[dict[str, Any]] = []
        record = controller.journal.event

        def event(kind: str, **fields: Any) -> None:
            self.recorded.append({"event": kind, **fields})
            record(kind, **fields)

        controller.journal.event = event  # type: ignore[method-assign]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Those of a kind so far."""
        return [event for event in self.recorded if event["event"] == kind]

    async def until(self, condition: Callable[[], Any], what: str) -> None:
        """Waits for it. Raises TimeoutError."""
        deadline = asyncio.get_running_loop().time() + LIMIT_S
        while not condition():
            if asyncio.get_running_loop().time() > deadline:
                raise TimeoutError(f"{what} did not happen; recorded: {self.recorded}")
            await asyncio.sleep(BEAT_S)

    async def training(self, world: int) -> None:
        """Until so many ranks train."""
        fleet = self.controller.fleet
        await self.until(
            lambda: fleet.phase.value == "training" and fleet.placement is not None
            and fleet.placement.layout.world_size == world, f"training of {world} ranks",
        )  # fmt: skip

    async def heard_of(self, step: int) -> None:
        """Until the controller knows that every worker has made it."""
        await self.until(lambda: all(w.step >= step for w in self.controller.fleet.workers()), f"step {step}")


def play(config: RunConfig, nodes: Nodes, act: Callable[[Story], Awaitable[None]]) -> tuple[int, Story]:
    """Runs a controller with ``nodes`` while ``act`` acts; then asks the run to end. The exit status."""

    async def playing() -> tuple[int, Story]:
        controller = Controller(config, Path(config.run_dir), nodes, "cpu")
        story = Story(controller, nodes)
        nodes.begin(await controller.listen("127.0.0.1"))
        running = asyncio.create_task(controller.run())
        acting = asyncio.ensure_future(act(story))
        try:
            await asyncio.wait({running, acting}, return_when=asyncio.FIRST_COMPLETED, timeout=2 * LIMIT_S)
            assert acting.done(), "the run ended, or nothing happened, while the test still acted"
            await acting
            controller.stop()
            return await asyncio.wait_for(running, LIMIT_S), story
        finally:
            for task in (running, acting):
                task.cancel()
                with contextlib.suppress(BaseException):
                    await task
            controller.close()

    return asyncio.run(playing())
