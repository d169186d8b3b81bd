"""All agents of a run as the controller sees them: who is there, what their workers do, what went wrong."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from llm_launch import wire
from llm_launch.absence import Absence
from llm_launch.attendance import Attendance
from llm_launch.blame import Device, Evidence, Kind, classify_error, few
from llm_launch.door import CROWDED_S, PAUSE_S, WAITING, Door
from llm_launch.generation_store import GenerationStore
from llm_launch.hang import find_hung, waits_for_files
from llm_launch.journal import Journal
from llm_launch.placement import Placement
from llm_launch.progress import Pace
from llm_launch.roster import Node, Roster, Worker
from llm_launch.states import OVER, Outcome, Phase
from llm_parallel.config.tree import ElasticConfig

TICK_S = 0.05
MANY_NODES = 64
LOOK_S = 0.3
PATIENT_S = 3.0
"""Time that a process which is not stopped has to answer before it counts as hung."""
ALONE_S = 30.0
"""Shortest hang of the only process of a run: no collective with others tells it from a pause of a busy machine."""
STOPPED = ("T", "t", "Z", "X")
"""States of a process in /proc that cannot go on by itself."""

AT_WORK = (Phase.FORMING, Phase.TRAINING, Phase.PAUSING)
"""Phases in which the processes of a generation have work, so that a fault of one ends it."""


class Fleet:
    """Connections to agents, and what came over them since the present generation began."""

    def __init__(self, elastic: ElasticConfig, secret: str, journal: Journal) -> None:
        self.elastic, self.secret, self.journal = elastic, secret, journal
        self.roster = Roster()
        self.attendance = Attendance(self.roster, journal)
        self.needs: wire.Message = {"is": "needs", "at": None, "run_dir": ".", "run": None, "files": []}
        """What agents are asked to look for before they join."""
        self.phase = Phase.WAITING
        self.generation = journal.last_generation()
        self.placement: Placement | None = None
        self.evidence: list[Evidence] = []
        self.doubted: dict[int, set[Device]] = {}
        """Devices on which the loss of a step was not finite."""
        self.unfit: dict[Device, str] = {}
        """Devices that their driver has called broken, and those of nodes that lack something."""
        self.asked_to_stop = False
        """Whether an agent was asked to end, as by SLURM, whose signals for a step the launcher does not get."""
        self.to_restart: set[str] = set()
        """Nodes whose agent has to be started again."""
        self.step = 0
        self.saved_step = 0
        """Newest step that workers of this start have saved on disk."""
        self.start_step: int | None = None
        """Step from which the present generation went on; None until one of its workers has said so."""
        self.fruitless = 0
        """Recoveries since the last finished step."""
        self.broken_since_s: float | None = None
        """Monotonic time at which connections broke for the first time since the last finished step."""
        self.looks: dict[Device, dict[str, Any]] = {}
        self.stalled = (0, 0)
        """Generation and step at which processes were last seen waiting for files."""
        self.address: list[Any] = []
        self.changed = asyncio.Event()
        self.door = Door(WAITING)
        self.admitting: asyncio.Task[None] | None = None
        """Takes in agents; None before the fleet listens. Without it no agent could come back, and nobody would say
        why, so its end ends the run."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._store = GenerationStore()
        self.pace = Pace(elastic.hang_deviations, first_s=elastic.first_step_limit_s)

    def broken_for_s(self) -> float:
        """Seconds since connections broke first without a step in between: a network, or a stranger at the ports of the
        workers' collectives, may hinder a run that has trained for a while, and not only for five attempts."""
        now = time.monotonic()
        self.broken_since_s = now if self.broken_since_s is None else self.broken_since_s
        return now - self.broken_since_s

    def begin(self, placement: Placement) -> None:
        """The next generation."""
        self.generation += 1
        self.placement, self.evidence, self.start_step = placement, [], None
        self._store = GenerationStore()
        self.looks.clear()

    @property
    def made_steps(self) -> int:
        """Steps of the present generation."""
        return self.step - self.start_step if self.start_step is not None else 0

    def new_pace(self) -> None:
        """Forgets how long steps took, for a layout whose steps take another time."""
        usual_s = self.pace.median_s()
        self.pace = Pace(self.elastic.hang_deviations, first_s=self.elastic.first_step_limit_s, usual_s=usual_s)

    async def listen(self, host: str, port: int = 0) -> int:
        """Begins to accept agents; the port."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=4096)
        listener.setblocking(False)
        self.address = [host, listener.getsockname()[1]]
        self.admitting = self._spawn(self._admit(listener))
        return self.address[1]

    def _spawn(self, coroutine: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        """One connection's end is no other's; what ended it by mistake is said."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.journal.say("".join(traceback.format_exception(error)))

    async def _admit(self, listener: socket.socket) -> None:
        """Takes in connections one by one; a flood of strangers must not starve the agents that are there."""
        with listener:
            while True:
                try:
                    connection, _ = await asyncio.get_running_loop().sock_accept(listener)
                except OSError:  # no descriptor is left
                    self.door.make_room()
                    await asyncio.sleep(PAUSE_S)
                    continue
                self._spawn(self._accept(connection, self.door.enter(connection)))
                # A queue of connections is accepted without a moment for anybody else unless it is given here.
                await asyncio.sleep(CROWDED_S if self.door.crowded else 0.0)

    async def _accept(self, connection: socket.socket, number: int) -> None:
        try:
            reader, writer = await asyncio.open_connection(sock=connection)
            channel = await wire.accept(reader, writer, self.secret)
        except (OSError, wire.WireError):
            connection.close()
            return
        finally:
            self.door.leave(number)
        try:
            await self._serve(channel)
        finally:
            writer.close()

    async def _serve(self, channel: wire.Channel) -> None:
        """What an agent, or a drill, says, until its connection ends."""
        node: Node | None = None
        try:
            while (message := await channel.receive()) is not None:
                if message["is"] == "drill":
                    self._on_drill(message)
                elif message["is"] == "here":
                    self.attendance.visitors.add(channel)
                    channel.send(self.needs)
                elif message["is"] == "absent":
                    item = Absence(message["node"], message["cause"], not message["final"])
                    self.attendance.absent(item, by_agent=True)
                elif message["is"] == "hello":
                    node = self.roster.join(message, channel)
                    self.attendance.joined(node.name)
                    self.attendance.visitors.discard(channel)
                    # It was only cut off, perhaps: starting its agent again would end this one.
                    self.to_restart.discard(node.name)
                    self.journal.event("join", node=node.name, generation=self.generation)
                elif node is not None and node.channel is channel:
                    node.heard_s = time.monotonic()
                    self._on_agent(node, message)
                if message["is"] != "store":  # nothing that anybody waits for here, and there are many
                    self.changed.set()
        except (OSError, wire.WireError, ValueError):
            pass
        except Exception:  # a mistake of ours; without its agent the node's work is made elsewhere
            self.journal.say(f"a message of {node.name if node else 'an agent'} failed:\n{traceback.format_exc()}")
        finally:
            self.attendance.visitors.discard(channel)
            if node is not None and node.channel is channel:
                self.lost(node, Kind.AGENT_LOST)

    def _on_drill(self, message: wire.Message) -> None:
        """A fault that a drill wants inside the process of a device."""
        node = self.roster.nodes.get(message["node"])
        if not self.elastic.drills or node is None:
            return
        fault, worker = message["fault"], node.workers.get(message["device"])
        if fault["kind"] != "partner":
            node.send({"is": "inject", "device": message["device"], "fault": fault})
        elif worker is not None:
            to = {"is": "partner", "device": message["device"], "number": worker.number}
            node.send({**to, "partner": fault["address"]})

    def lost(self, node: Node, kind: Kind) -> None:
        """An agent is gone, by its connection's end or by its silence."""
        if self.phase in OVER:
            return  # agents close their connections when the run has ended
        node.channel = None
        ran = [worker for worker in node.workers.values() if worker.generation == self.generation]
        node.workers.clear()
        self.journal.event("lost", node=node.name, cause=kind.value, generation=self.generation)
        if ran:
            self.evidence.append(Evidence(kind, node.name))
        if kind is Kind.AGENT_LOST:
            self.to_restart.add(node.name)
        self.changed.set()

    def _on_agent(self, node: Node, message: wire.Message) -> None:
        said = message["is"]
        if said == "beat":
            self._on_beat(node, message["progress"])
            return
        if said == "inventory":
            node.inventory = message["entries"]
            return
        if said == "terminated":
            self.asked_to_stop = True
            return
        if said == "health":
            self._on_health(node, message)
            return
        device = Device(node.name, message["device"])
        if said == "worker":
            node.workers[device.number] = Worker(device, message["pid"], message["number"])
            node.warm = True
            return
        worker = node.workers.get(device.number)
        if worker is None:
            return
        mine = worker.generation == self.generation
        if said == "store":
            if mine and message["generation"] == self.generation and message["number"] == worker.number:
                self._store.serve(message, partial(self._answer, node, worker, message.get("id")))
            return
        if said == "exit":
            del node.workers[device.number]
            if mine and not worker.killed and worker.outcome is None:
                kind = Kind.HOST_MEMORY if message["host_memory"] else Kind.EXIT
                forming = not worker.training
                self.evidence.append(
                    Evidence(kind, node.name, device, self.rank(device), status=message["status"], forming=forming)
                )
        elif said == "training" and mine:
            worker.training = True
            if self.start_step is None:
                self.start_step = message["step"]
                self.journal.lost_steps += max(0, self.step - self.start_step)
                self.step = self.start_step
        elif said == "copies" and mine:
            worker.copies = message["made"]
            if message["cause"]:
                facts = {"node": node.name, "device": device.number, "step": message["step"]}
                self.journal.event("copies_failed", cause=message["cause"], **facts)
        elif said == "partner_failed" and mine:
            self._change_partner(node, worker, message["cause"])
        elif said == "saved" and mine:
            self.saved_step = max(self.saved_step, message["step"])
        elif said == "left" and mine:
            worker.outcome = Outcome(message["outcome"])
            self._on_left(device, message)
        elif said == "stopped" and mine and message["number"] == worker.number:
            self._on_stopped(worker)
        elif said in ("seen", "state"):
            self.looks.setdefault(device, {}).update(message)

    def _on_stopped(self, worker: Worker) -> None:
        """A process of the generation stands still, at whatever it was."""
        device, known = worker.device, {item.device for item in self.evidence}
        if not (self.phase in AT_WORK and worker.outcome is None and not worker.killed) or device in known:
            return
        self.evidence.append(Evidence(Kind.STALL, device.node, device, self.rank(device), message="is stopped"))

    def _change_partner(self, node: Node, worker: Worker, cause: str) -> None:
        """Another node gets the second copies of a worker whose partner does not take them."""
        failed = worker.partner or ""
        worker.refused.add(failed)
        others = [other for other in self.roster.alive() if other is not node and other.name not in worker.refused]
        worker.partner = others[0].name if others else None
        instead = f"{worker.partner} keeps them from now on" if others else "no other node can keep them"
        self.journal.event("second_copy_failed", node=node.name, device=worker.device.number, partner=failed,
                           cause=f"{cause}; {instead}")  # fmt: skip
        if others:
            to = {"is": "partner", "device": worker.device.number, "number": worker.number}
            node.send({**to, "partner": list(others[0].copies_address)})

    def _answer(self, node: Node, worker: Worker, number: int | None, value: Any) -> None:
        """Answers what a worker has asked the store, if it is still that worker."""
        node.send(
            {"is": "value", "device": worker.device.number, "number": worker.number, "id": number, "value": value}
        )

    def _on_health(self, node: Node, message: wire.Message) -> None:
        """Takes in what the driver or the system reports. A fatal finding ends the generation if the device is in it; a
        spare device with one is never used."""
        self.journal.event("health", node=node.name, device=message["device"], cause=message["message"])
        if not message["fatal"] or message["device"] is None:
            return
        device = Device(node.name, message["device"])
        self.unfit[device] = message["message"]
        if self.rank(device) is not None and self.phase in AT_WORK:
            self.evidence.append(
                Evidence(Kind.UNHEALTHY, node.name, device, self.rank(device), message=message["message"])
            )

    def _on_left(self, device: Device, message: wire.Message) -> None:
        if "copy_lost" in message:
            lost = tuple(message["copy_lost"]) if message["copy_lost"] else None
            self.evidence.append(
                Evidence(Kind.COPY_LOST, device.node, device, self.rank(device), message=message["message"], copy=lost)
            )
            return
        if message["outcome"] != Outcome.FAILED.value:
            return
        error, text = message.get("error", ""), message.get("message", "")
        kind, samples = Kind.RAISED, None
        if "suspect" in message:
            if not message["suspect"]:
                return  # it only takes part
            kind = Kind(message["suspect"])
            if message["step"] is not None:
                self.doubted.setdefault(message["step"], set()).add(device)
                samples = (message["samples"][0], message["samples"][1])
        elif classify_error(error, text) == "connection":
            kind = Kind.CONNECTION
        else:
            self.journal.keep_traceback(device, self.generation, message.get("traceback", ""))
        rank, worker = self.rank(device), self.roster.worker(device)
        forming = worker is not None and not worker.training
        self.evidence.append(Evidence(kind, device.node, device, rank, error, text, samples=samples, forming=forming))

    def exclude(self, node: str, reason: str) -> None:
        """Leaves the devices of a node out of this start."""
        self.unfit.update({Device(node, number): reason for number in self.roster.nodes[node].devices})
        self.journal.event("exclude", node=node, cause=reason)

    def rank(self, device: Device) -> int | None:
        """Rank of a device in the present generation, if it has one."""
        return self.placement.ranks.get(device) if self.placement is not None else None

    def _on_beat(self, node: Node, progress: dict[str, Any]) -> None:
        for index, seen in progress.items():
            worker = node.workers.get(int(index))
            if worker is None or worker.generation != self.generation or seen[0] != self.generation:
                continue
            step = int(seen[1])
            if step > worker.step > 0 and seen[3] > 0:
                self.pace.add(seen[3])
            worker.step, worker.age_s, worker.probe_s, worker.own_s = step, seen[2], seen[4], seen[6]
            if step > self.step:
                self.step, self.fruitless, self.broken_since_s = step, 0, None

    @property
    def tick_s(self) -> float:
        """Time between looks at all workers, which cost time themselves: half a second for 2,000 nodes."""
        return max(TICK_S, 2.5e-4 * len(self.roster.nodes))

    async def until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Waits until ``condition`` holds; whether it came to that in time. Conditions look at all workers, so what
        many nodes say at once is gathered for a moment first: a tenth of a second for 2,000."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self.changed.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.changed.wait(), min(left, self.tick_s))
                if len(self.roster.nodes) > MANY_NODES:
                    await asyncio.sleep(5e-5 * len(self.roster.nodes))
        return True

    def workers(self) -> list[Worker]:
        """Workers on the devices of the present generation; a replacement on a failed one's device too."""
        assert self.placement is not None
        return [worker for device in self.placement.devices if (worker := self.roster.worker(device)) is not None]

    def inside(self) -> list[Worker]:
        """Workers that have not left the generation."""
        return [worker for worker in self.workers() if worker.generation == self.generation and not worker.outcome]

    def kill(self, workers: list[Worker]) -> None:
        """Tells their agents to end them."""
        for worker in workers:
            worker.killed = True
            kill = {"is": "kill", "device": worker.device.number, "number": worker.number}
            self.roster.nodes[worker.device.node].send(kill)

    async def find_hung(self, devices: list[Device]) -> dict[Device, str]:
        """Workers that hold the others up. A process that is stopped is known at once; else all are asked twice, and if
        any of them has moved in between, the step was only slow."""
        first = await self.look(devices, LOOK_S)
        stopped = {device: "is stopped" for device, look in first.items() if look.get("state") in STOPPED}
        if stopped or self.evidence:
            return stopped
        await asyncio.sleep(LOOK_S)
        second = await self.look(devices, PATIENT_S)
        if stopped := {device: "is stopped" for device, look in second.items() if look.get("state") in STOPPED}:
            return stopped  # known before the others have answered
        answered = {device: look for device, look in second.items() if "stack" in look}
        moved = any(
            look["collectives"] != first.get(device, {}).get("collectives") for device, look in answered.items()
        )
        longest = max((worker.age_s for worker in self.workers()), default=0.0)
        # A worker that waited for files at the first look and went on before the second is not to blame either.
        waiting = waits_for_files([*first.items(), *answered.items()])
        waiting = waiting if longest < self.elastic.first_step_limit_s else []
        if waiting and self.stalled != (self.generation, self.step):
            self.stalled = (self.generation, self.step)
            names = few([str(device) for device in waiting])
            self.journal.event("stall", step=self.step, cause=f"{names}: waiting for files", seconds=longest)
        if moved or waiting or self.evidence:
            self.pace.add(longest)
            return {}
        if len(devices) == 1 and longest < ALONE_S:
            return {}
        return find_hung(devices, answered)

    async def look(self, devices: list[Device], timeout_s: float) -> dict[Device, dict[str, Any]]:
        """Stacks and collectives of the workers that answer in time, and the system's state of each process."""
        self.looks.clear()
        for device in devices:
            self.roster.nodes[device.node].send({"is": "look", "device": device.number})

        def known() -> bool:
            looks = self.looks.values()
            stopped = any(look.get("state") in STOPPED for look in looks)
            return stopped or bool(self.evidence) or sum("stack" in look for look in looks) == len(devices)

        await self.until(known, timeout_s)
        return dict(self.looks)
