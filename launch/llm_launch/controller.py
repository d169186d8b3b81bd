"""One controller per run: knows every agent, plans each generation, sees what fails, decides who is to blame, goes on.

It trains nothing and keeps nothing that the run folder does not have. A generation is a layout, an assignment of ranks
to devices, and a fresh store; whatever changes any of them begins the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from llm_launch import wire
from llm_launch.blame import Device, Evidence, Fault, Kind, Ledger, Verdict, blame, classify_error
from llm_launch.hang import find_hung, find_slow
from llm_launch.journal import Journal
from llm_launch.members import Node, Roster, Worker
from llm_launch.plan import Placement, place, recoverable_step
from llm_launch.progress import Pace
from llm_launch.states import Outcome, Phase, check_transition
from llm_parallel.config.tree import RunConfig

TICK_S = 0.05
LEAVE_S = 1.0
"""Time for survivors to leave a generation that was given up; who has not left then is killed."""
SETTLE_S = 0.05
"""Time between the first sign of a fault and the verdict, for other signs of the same fault."""
LOOK_S = 0.3
PATIENT_S = 3.0
"""Time that a process which is not stopped has to answer before it counts as hung."""
STOPPED = ("T", "t", "Z", "X")
REPLACE_S = 3.0
"""Time for a killed worker's replacement to be forked before the plan is made without its device."""

Starter = Callable[[str], None]
"""Starts the agent of a node again."""


class Stopped(Exception):
    """The run is over; ``status`` is its exit status."""

    def __init__(self, status: int, phase: Phase) -> None:
        self.status, self.phase = status, phase


class Controller:
    """State and tasks of the controller of one run."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        secret: str,
        expected: dict[str, int],
        restart_agent: Starter,
        device: Literal["cpu", "cuda"],
    ) -> None:
        self.config, self.secret, self.device = config, secret, device
        self.expected, self._restart_agent = expected, restart_agent
        self.journal = Journal(run_dir, config.elastic, secret)
        self.ledger = Ledger.from_json(self.journal.remembered(), config.elastic.strikes)
        self.roster = Roster()
        self.phase = Phase.WAITING
        self.generation = self.journal.last_generation()
        self.placement: Placement | None = None
        self._trained: list[tuple[int, int]] = []  # generation and world size of those that copied state
        self._evidence: list[Evidence] = []
        self._changed = asyncio.Event()
        self._pace = Pace(config.elastic.hang_deviations, first_s=config.elastic.first_step_limit_s)
        self._started_s = time.monotonic()
        self._stop = False
        self._turn = False
        self._believe: set[int] = set()
        self._doubted: dict[int, set[Device]] = {}
        self._slow: dict[Device, int] = {}
        self._fruitless = 0
        self._step = 0
        self._looks: dict[Device, dict[str, Any]] = {}
        self._address: list[Any] = []
        self._to_restart: set[str] = set()

    # -- agents ---------------------------------------------------------------------------------------------------

    async def listen(self, host: str, port: int = 0) -> int:
        """Begins to accept agents; the port."""
        server = await asyncio.start_server(self._accept, host, port, backlog=4096)
        self._address = [host, server.sockets[0].getsockname()[1]]
        return self._address[1]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        node: Node | None = None
        try:
            channel = await wire.accept(reader, writer, self.secret)
            while (message := await channel.receive()) is not None:
                if message["is"] == "drill":
                    self._on_drill(message)
                elif message["is"] == "hello":
                    node = self.roster.join(message, channel)
                    self.journal.event("join", node=node.name, generation=self.generation)
                elif node is not None and node.channel is channel:
                    node.heard_s = time.monotonic()
                    self._on_agent(node, message)
                self._changed.set()
        except (OSError, wire.WireError, ValueError):
            pass
        finally:
            writer.close()
            if node is not None and node.channel is not None and node.channel._writer is writer:
                self._lost(node, Kind.AGENT_LOST)

    def _on_drill(self, message: wire.Message) -> None:
        """A fault that a drill wants inside the process of a device."""
        node = self.roster.nodes.get(message["node"])
        if self.config.elastic.drills and node is not None:
            node.send({"is": "inject", "device": message["device"], "fault": message["fault"]})

    def _lost(self, node: Node, kind: Kind) -> None:
        node.channel = None
        ran = [worker for worker in node.workers.values() if worker.generation == self.generation]
        node.workers.clear()
        if self.phase in (Phase.FINISHED, Phase.FAILED):
            return
        self.journal.event("lost", node=node.name, cause=kind.value, generation=self.generation)
        if ran:
            self._evidence.append(Evidence(kind, node.name))
        if kind is Kind.AGENT_LOST:
            self._to_restart.add(node.name)
        self._changed.set()

    def _on_agent(self, node: Node, message: wire.Message) -> None:
        kind = message["is"]
        if kind == "beat":
            self._on_beat(node, message["progress"])
            return
        if kind == "inventory":
            node.inventory = message["entries"]
            return
        device = Device(node.name, message["device"])
        if kind == "worker":
            node.workers[device.index] = Worker(device, message["pid"], message["store_port"])
            return
        worker = node.workers.get(device.index)
        if worker is None:
            return
        mine = worker.generation == self.generation
        if kind == "exit":
            del node.workers[device.index]
            if mine and not worker.killed and worker.outcome is None:
                rank = self._rank(device)
                self._evidence.append(Evidence(Kind.EXIT, node.name, device, rank, status=message["status"]))
        elif kind == "training" and mine:
            worker.training = True
        elif kind == "left" and mine:
            worker.outcome, worker.store_port = Outcome(message["outcome"]), message["store_port"]
            self._on_left(device, message)
        elif kind in ("seen", "state"):
            self._looks.setdefault(device, {}).update(message)

    def _on_left(self, device: Device, message: wire.Message) -> None:
        if message["outcome"] != Outcome.FAILED.value:
            return
        error, text = message.get("error", ""), message.get("message", "")
        kind, samples = Kind.RAISED, None
        if "suspect" in message:
            if not message["suspect"]:
                return  # it only takes part
            kind = Kind(message["suspect"])
            if message["step"] is not None:
                self._doubted.setdefault(message["step"], set()).add(device)
                samples = (message["samples"][0], message["samples"][1])
        elif classify_error(error, text) == "connection":
            kind = Kind.CONNECTION
        else:
            self.journal.keep_traceback(device, self.generation, message.get("traceback", ""))
        rank = self._rank(device)
        self._evidence.append(Evidence(kind, device.node, device, rank, error, text, samples=samples))

    def _rank(self, device: Device) -> int | None:
        return self.placement.ranks.get(device) if self.placement is not None else None

    def _on_beat(self, node: Node, progress: dict[str, Any]) -> None:
        for index, seen in progress.items():
            worker = node.workers.get(int(index))
            if worker is None or worker.generation != self.generation or seen[0] != self.generation:
                continue
            step = int(seen[1])
            if step > worker.step > 0 and seen[3] > 0:
                self._pace.add(seen[3])
            worker.step, worker.age_s, worker.probe_s = step, seen[2], seen[4]
            if step > self._step:
                self._step, self._fruitless = step, 0

    # -- the life of a run ------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """From the first agent to the run's end; the exit status."""
        ticker = asyncio.get_running_loop().create_task(self._tick())
        try:
            await self._until(self._all_expected_ready, self.config.elastic.wait_s)
            while True:
                await self._form()
                await self._train()
        except Stopped as end:
            self._enter(end.phase)
            for node in self.roster.alive():
                node.send({"is": "end"})
            await asyncio.sleep(TICK_S)
            return end.status
        finally:
            ticker.cancel()
            self.journal.write_status(self.status())
            self.journal.close()

    def stop(self) -> None:
        """Asks the run to save and end."""
        self._stop = True
        for node in self.roster.alive():
            node.send({"is": "stop"})
        self._changed.set()

    def _enter(self, phase: Phase) -> None:
        if phase is not self.phase:
            check_transition(self.phase, phase)
            self.phase = phase
            self.journal.write_status(self.status())

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while not condition():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._changed.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(left, TICK_S))
        return True

    def _all_expected_ready(self) -> bool:
        nodes = {node.name: node for node in self.roster.alive()}
        return self._stop or all(
            name in nodes and len(nodes[name].workers) >= count for name, count in self.expected.items()
        )

    def _usable(self) -> list[Device]:
        """Devices with a worker that is ready, without those removed; in the order of the nodes' arrival."""
        removed = set(self.ledger.removed)
        return [
            device
            for node in self.roster.alive()
            for device in (Device(node.name, index) for index in sorted(node.workers))
            if device not in removed
        ]

    def _active(self, usable: list[Device]) -> list[Device]:
        """Without the spare nodes, as long as enough others live."""
        spares = self.config.elastic.spare_nodes
        names = list(dict.fromkeys(device.node for device in usable))
        lost = max(0, len(self.expected) - len(names))
        held_back = set(names[len(names) - max(0, spares - lost) :]) if spares > lost else set()
        return [device for device in usable if device.node not in held_back]

    async def _form(self) -> None:
        config, began = self.config, time.monotonic()
        removed = set(self.ledger.removed)

        def replaced() -> bool:
            return all(
                Device(node.name, index) in removed or index in node.workers
                for node in self.roster.alive()
                for index in node.devices
            )

        await self._until(replaced, REPLACE_S)
        placement = self._choose()
        if placement is None:
            self._enter(Phase.WAITING)
            left = len(self._usable())
            self.journal.event("wait", cause=f"{left} devices are left, and the run needs {config.elastic.min_devices}")
            await self._until(lambda: self._stop or self._choose() is not None, config.elastic.wait_s)
            placement = self._choose()
            if placement is None:
                raise Stopped(1, Phase.FAILED)
        restore = await self._restore_from()
        before = self.placement.layout if self.placement is not None else None
        if before is not None and before != placement.layout:
            self._pace = Pace(config.elastic.hang_deviations, first_s=config.elastic.first_step_limit_s)
            self.journal.event("reshape", before=before.describe(), after=placement.layout.describe())
        self.generation += 1
        self.placement, self._turn, self._evidence = placement, False, []
        self._looks.clear()
        self._assign(placement, restore)
        self._enter(Phase.FORMING)
        self.journal.event(
            "form",
            generation=self.generation,
            world_size=placement.layout.world_size,
            layout=placement.layout.describe(),
            step=restore["step"] if restore else None,
            cause="memory" if restore else "checkpoint or new run",
            seconds=time.monotonic() - began,
        )

    def _choose(self) -> Placement | None:
        usable = self._usable()
        if len(usable) < self.config.elastic.min_devices:
            return None
        return place(self.config, self._active(usable), self.device, self.placement, self._turn)

    async def _restore_from(self) -> dict[str, Any] | None:
        """The newest state that memory holds, for the workers of each node; None if it must come from disk."""
        if not self._trained:
            return None
        nodes = self.roster.alive()
        for node in nodes:
            node.inventory = None
            node.send({"is": "inventory"})
        await self._until(lambda: all(node.inventory is not None for node in self.roster.alive()), LEAVE_S)
        held = {node.name: node.inventory for node in self.roster.alive() if node.inventory is not None}
        for generation, world_size in reversed(self._trained):
            found = recoverable_step(world_size, generation, held)
            if found is not None:
                step, holders = found
                self.journal.lost_steps += max(0, self._step - step)
                self._step = step
                return {"step": step, "generation": generation, "holders": holders}
        return None

    def _assign(self, placement: Placement, restore: dict[str, Any] | None) -> None:
        names = list(dict.fromkeys(device.node for device in placement.devices))
        first = placement.devices[0]
        first_node = self.roster.nodes[first.node]
        store = [first_node.host, first_node.workers[first.index].store_port]
        for rank, device in enumerate(placement.devices):
            node = self.roster.nodes[device.node]
            partner = self.roster.nodes[names[(names.index(device.node) + 1) % len(names)]]
            worker = node.workers[device.index]
            worker.begin(self.generation)
            node.send(
                {
                    "is": "assign",
                    "device": device.index,
                    "generation": self.generation,
                    "rank": rank,
                    "world_size": placement.layout.world_size,
                    "local_rank": device.index,
                    "store": store,
                    "overrides": list(placement.overrides),
                    "restore": self._sources(restore, device.node),
                    "partner": list(partner.replicas) if len(names) > 1 else None,
                    "ranks": [list(device) for device in placement.devices] if placement else [],
            "controller": self._address,
            "elapsed_s": time.monotonic() - self._started_s,
                    "believe": sorted(self._believe),
                }
            )

    def _sources(self, restore: dict[str, Any] | None, here: str) -> dict[str, Any] | None:
        if restore is None:
            return None
        sources = []
        for rank, (name, kind) in sorted(restore["holders"].items()):
            host, port = ("", 0) if name == here else self.roster.nodes[name].replicas
            sources.append([rank, kind, host, port])
        return {"step": restore["step"], "generation": restore["generation"], "sources": sources}

    def _members(self) -> list[Worker]:
        assert self.placement is not None
        return [worker for device in self.placement.devices if (worker := self.roster.worker(device)) is not None]

    def _inside(self) -> list[Worker]:
        """Workers that have not left the generation."""
        return [worker for worker in self._members() if worker.generation == self.generation and not worker.outcome]

    def _kill(self, workers: list[Worker]) -> None:
        for worker in workers:
            worker.killed = True
            self.roster.nodes[worker.device.node].send({"is": "kill", "device": worker.device.index})

    async def _train(self) -> None:
        """Watches one generation to its end. Raises Stopped when it was the last."""
        assert self.placement is not None
        world = self.placement.layout.world_size
        limit = self.config.elastic.first_step_limit_s

        def formed() -> bool:
            return bool(self._evidence) or all(w.training or w.outcome for w in self._members())

        if not await self._until(formed, limit):
            self._accuse_silent("was not ready to train in time")
        if not self._evidence:
            self._enter(Phase.TRAINING)
            if self.config.elastic.replicate_every_steps:
                self._trained.append((self.generation, world))
            self.journal.event("resume", generation=self.generation, step=self._step, world_size=world)
        paused = False
        while not self._evidence:
            outcomes = [worker.outcome for worker in self._members()]
            if len(outcomes) == world and all(outcomes):
                if all(outcome is Outcome.PAUSED for outcome in outcomes):
                    return
                if all(outcome in (Outcome.FINISHED, Outcome.STOPPED) for outcome in outcomes):
                    self.journal.event("end", step=self._step)
                    raise Stopped(0, Phase.FINISHED)
                break
            if not paused and self._better_layout_now():
                paused = True
                self._enter(Phase.PAUSING)
                for node in self.roster.alive():
                    node.send({"is": "pause", "generation": self.generation})
            await self._until(lambda: bool(self._evidence), TICK_S)
            await self._look_for_hangs()
            self._evidence += find_slow(self._members(), self._slow, self.config.elastic.slow_ratio, world)
        await self._recover()

    def _better_layout_now(self) -> bool:
        """Whether devices that joined make a larger world."""
        if self.phase is not Phase.TRAINING or self._stop or self.placement is None:
            return False
        assigned = set(self.placement.devices)
        if all(device in assigned for device in self._usable()):
            return False
        better = self._choose()
        return better is not None and better.layout.world_size > self.placement.layout.world_size

    def _accuse_silent(self, why: str) -> None:
        for worker in self._members():
            if not worker.training and worker.outcome is None:
                rank = self._rank(worker.device)
                self._evidence.append(Evidence(Kind.HANG, worker.device.node, worker.device, rank, message=why))

    async def _look_for_hangs(self) -> None:
        members = self._members()
        if self.phase not in (Phase.TRAINING, Phase.PAUSING) or not members or self._evidence:
            return
        ages = [worker.age_s for worker in members if worker.outcome is None]
        if not ages or min(ages) < 0 or min(ages) <= self._pace.limit_s():
            return
        hung = await self._find_hung([worker.device for worker in members])
        if hung and not self._evidence:
            looks = {str(device): look for device, look in self._looks.items()}
            self.journal.keep_stacks(self.generation, looks)
            for device, why in hung.items():
                self._evidence.append(Evidence(Kind.HANG, device.node, device, self._rank(device), message=why))

    async def _find_hung(self, members: list[Device]) -> dict[Device, str]:
        """Who holds the others up. A process that is stopped is known at once; else all are asked twice, and if any of
        them has moved in between, the step was only slow."""
        first = await self._look(members, LOOK_S)
        stopped = {device: "is stopped" for device, look in first.items() if look.get("state") in STOPPED}
        if stopped or self._evidence:
            return stopped
        await asyncio.sleep(LOOK_S)
        second = await self._look(members, PATIENT_S)
        answered = {device: look for device, look in second.items() if "stack" in look}
        moved = any(look["collectives"] != first.get(device, {}).get("collectives") for device, look in answered.items())
        if moved or self._evidence:
            self._pace.add(max(worker.age_s for worker in self._members()))
            return {}
        return find_hung(members, answered)

    async def _look(self, members: list[Device], timeout_s: float) -> dict[Device, dict[str, Any]]:
        """Stacks and collectives of the workers that answer in time, and the system's word on each process."""
        self._looks.clear()
        for device in members:
            self.roster.nodes[device.node].send({"is": "look", "device": device.index})

        def known() -> bool:
            looks = self._looks.values()
            stopped = any(look.get("state") in STOPPED for look in looks)
            return stopped or bool(self._evidence) or sum("stack" in look for look in looks) == len(members)

        await self._until(known, timeout_s)
        return dict(self._looks)

    async def _recover(self) -> None:
        """A fault was seen: all leave, the evidence is judged, what is at fault is removed."""
        assert self.placement is not None
        began = time.monotonic()
        self.journal.event(
            "detect",
            generation=self.generation,
            step=self._step,
            cause="; ".join(f"{e.device or e.node}: {e.kind.value} {e.message[:200]}".strip() for e in self._evidence),
        )
        self._enter(Phase.ABORTING)
        for node in self.roster.alive():
            node.send({"is": "abort", "generation": self.generation})
        # Who hangs will not leave; its replacement can be forked meanwhile.
        hung = {item.device for item in self._evidence if item.kind is Kind.HANG}
        self._kill([worker for worker in self._inside() if worker.device in hung])
        await asyncio.sleep(SETTLE_S)
        if all(item.kind is Kind.CONNECTION for item in self._evidence):
            # Somebody's peer is gone, and who is not known yet: a silent node is known by its silence.
            await self._until(
                lambda: any(item.kind is not Kind.CONNECTION for item in self._evidence),
                self.config.elastic.lost_after_s,
            )
        if not await self._until(lambda: not self._inside(), LEAVE_S):
            self._kill(self._inside())
            await self._until(lambda: not self._inside(), LEAVE_S)
        verdict = self.ledger.judge(blame(self._evidence, self.placement.devices))
        self.journal.event("blame", fault=verdict.fault.value, cause=verdict.reason, seconds=time.monotonic() - began)
        self._act_on(verdict)

    def _act_on(self, verdict: Verdict) -> None:
        self._fruitless += 1
        if verdict.stops_run:
            self.journal.fail(verdict)
            raise Stopped(2 if verdict.fault is Fault.USER else 1, Phase.FAILED)
        if self._fruitless > self.config.elastic.max_fruitless:
            self.journal.say(f"given up after {self._fruitless} recoveries without a step: {verdict.reason}")
            raise Stopped(1, Phase.FAILED)
        for step, devices in self._doubted.items():
            if len(devices) > 1 and step not in self._believe:
                # The fault stayed with the samples when the work moved: no device's doing.
                self._believe.add(step)
                for device in devices:
                    self.ledger.counts.pop(device, None)
                    self.ledger.removed.pop(device, None)
        self._turn = any(item.kind in (Kind.NOT_FINITE, Kind.RAISED) for item in verdict.evidence)
        for device in verdict.devices:
            if device in self.ledger.removed:
                self.journal.event("remove", node=device.node, device=device.index, cause=verdict.reason)
                node = self.roster.nodes.get(device.node)
                if node is not None:
                    node.send({"is": "retire", "device": device.index})
                    node.workers.pop(device.index, None)
        self.journal.remember(self.ledger.to_json())
        if self._stop:
            raise Stopped(1, Phase.FAILED)

    async def _tick(self) -> None:
        elastic, last_beat, last_status = self.config.elastic, 0.0, 0.0
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            if self.phase in (Phase.TRAINING, Phase.WAITING):  # a start takes the time that a recovery needs
                while self._to_restart:
                    self._restart_agent(self._to_restart.pop())
            if now - last_beat >= elastic.heartbeat_s:
                last_beat = now
                for node in self.roster.alive():
                    node.send({"is": "beat"})
                self._forget_old()
            for node in self.roster.alive():
                if now - node.heard_s > elastic.lost_after_s:
                    channel = node.channel
                    self._lost(node, Kind.NODE_SILENT)
                    if channel is not None:
                        channel.close()
            if now - last_status >= 1.0:
                last_status = now
                self.journal.write_status(self.status())

    def _forget_old(self) -> None:
        """Copies of older generations go when every worker has made a step of this one."""
        if self.phase is Phase.TRAINING and len(self._trained) > 1 and self._trained[-1][0] == self.generation:
            first = min((worker.step for worker in self._members()), default=0)
            if first > self._resumed_at() + 1:
                self._trained = self._trained[-1:]
                for node in self.roster.alive():
                    node.send({"is": "forget", "generation": self.generation})

    def _resumed_at(self) -> int:
        return self.journal.resumed_step

    def status(self) -> dict[str, Any]:
        """What elastic.json holds."""
        placement = self.placement
        assigned = set(placement.devices) if placement else set()
        return {
            "state": self.phase.value,
            "generation": self.generation,
            "step": self._step,
            "world_size": placement.layout.world_size if placement else 0,
            "layout": placement.layout.describe() if placement else "",
            "nodes": [
                {
                    "name": node.name,
                    "state": "lost"
                    if node.channel is None
                    else ("active" if any(d.node == node.name for d in assigned) else "spare"),
                    "devices": list(node.devices),
                    "agent_pid": node.pid,
                    "workers": {str(index): worker.pid for index, worker in node.workers.items()},
                }
                for node in self.roster.nodes.values()
            ],
            "excluded": [
                {"node": device.node, "device": device.index, "reason": reason, "permanent": True}
                for device, reason in self.ledger.removed.items()
            ],
            "ranks": [list(device) for device in placement.devices] if placement else [],
            "controller": self._address,
            "elapsed_s": time.monotonic() - self._started_s,
        }
