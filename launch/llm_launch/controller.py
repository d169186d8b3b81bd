"""One controller per run: knows every agent, plans each generation, sees faults, decides who is to blame.

It trains nothing, and what a next start must know is in the run folder. A generation is a layout, an assignment of
ranks to devices, and a fresh store; whatever changes any of them begins the next one.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from llm_launch.assign import assign
from llm_launch.blame import Device, Evidence, Fault, Kind, Verdict, blame, few
from llm_launch.copy_catalog import CopyCatalog
from llm_launch.door import WAITING
from llm_launch.fleet import TICK_S, Fleet
from llm_launch.hang import find_slow, kind_of_hang
from llm_launch.journal import MEMORY_NAME, Journal
from llm_launch.ledger import Ledger
from llm_launch.needs import needs_of
from llm_launch.placement import Placement, Trained, crowded, fingerprint, place
from llm_launch.snapshot import snapshot, used_up
from llm_launch.starters import AgentStarter
from llm_launch.states import EXIT_TOO_FEW, Outcome, Phase, check_transition
from llm_launch.ticker import Ticker
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import EXIT_STOPPED, EXIT_USER_ERROR

LEAVE_S = 1.0
"""Time for workers to leave a generation that was given up; one that has not left by then is killed."""
SETTLE_S = 0.05
"""Time between the first sign of a fault and the verdict, in which other signs of the same fault arrive."""
STOP_WAIT_S = 10.0
"""Time for devices to come back when the run was asked to end and its state is in memory only."""
REPLACE_S = 3.0
"""Time for a killed worker's replacement to be forked before the plan is made without its device."""


def _last_multiple(step: int, interval: int | None) -> int:
    return step // interval * interval if interval else 0


class Stopped(Exception):
    """The run is over. status: its exit status; keep: whether memory copies are still needed."""

    def __init__(self, status: int, phase: Phase, keep: bool = True) -> None:
        self.status, self.phase, self.keep = status, phase, keep


class Controller:
    """State and tasks of the controller of one run."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        starter: AgentStarter,
        device: Literal["cpu", "cuda"],
        newest_step: Callable[[], int] = lambda: 0,
    ) -> None:
        """``newest_step``: finds the step of the newest complete checkpoint, 0 if there is none."""
        self.config, self.starter, self.device, self._newest_step = config, starter, device, newest_step
        self.journal = Journal(run_dir, config.elastic, starter.secret)
        remembered = self.journal.remembered()
        self.ledger, trained = self._recall(remembered)
        self.fleet = Fleet(config.elastic, starter.secret, self.journal)
        self.fleet.needs = needs_of(config, run_dir / "config.yaml")
        self.fleet.roster.order = list(starter.expected)
        self._model = fingerprint(config)
        self.copies = CopyCatalog(self.fleet, self.journal, self._model, newest_step())
        self.copies.remember(trained, remembered.get("model"))
        self._ticker = Ticker(self.fleet, self.copies, starter, self.stop, self._write_status)
        self._started_s = time.monotonic()
        self.stop_asked = False
        self._trained = False
        self._turn = False
        self._believe: set[int] = set()
        self._slow: dict[Device, int] = {}
        self._stuck: set[Device] = set()
        """Devices whose killed process was waited for in vain."""

    def _recall(self, remembered: dict[str, Any]) -> tuple[Ledger, list[Trained]]:
        """What an earlier start kept. A file of another form is said and not believed; faults that stay show again."""
        elastic = self.config.elastic
        limits = (elastic.strikes, 3600.0 * elastic.strike_hours, elastic.probe_every_steps)
        try:
            trained = [Trained.read(item) for item in remembered.get("trained", [])]
            return Ledger.from_json(remembered, *limits), trained
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            what, why = f"{MEMORY_NAME} of the run folder", f"{type(error).__name__}: {error}"
            self.journal.say(
                f"{what} is not what an earlier start wrote ({why}); removed devices and strikes are forgotten"
            )
            return Ledger.from_json({}, *limits), []

    async def listen(self, host: str, port: int = 0) -> int:
        """Begins to accept agents; the port."""
        self.fleet.door.most = max(WAITING, 2 * len(self.starter.expected))  # they all come at once
        return await self.fleet.listen(host, port)

    async def run(self) -> int:
        """From the first agent to the run's end; the exit status."""
        loop = asyncio.get_running_loop()
        work, ticker = loop.create_task(self._work()), loop.create_task(self._ticker.run())
        try:
            watched = {work, ticker} | ({self.fleet.admitting} if self.fleet.admitting is not None else set())
            done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():  # without signs of life every agent would end its workers a moment later
                trace = "".join(traceback.format_exception(done.pop().exception()))
                self.journal.event("fail", fault="launcher", cause=f"a task of the launcher failed:\n{trace}")
                raise Stopped(1, Phase.FAILED)
            work.result()
            raise AssertionError("the work ends by Stopped alone")
        except Stopped as end:
            self._enter(end.phase)
            for node in self.fleet.roster.alive():
                node.send({"is": "end", "keep": end.keep})
            self.fleet.attendance.dismiss()
            await asyncio.sleep(TICK_S)
            return end.status
        finally:
            for task in (work, ticker):
                task.cancel()
            self._write_status()

    async def _work(self) -> None:
        wait_s, expected = self.config.elastic.wait_s, self.starter.expected
        await self.fleet.attendance.gather(expected, wait_s, self.fleet.until, lambda: self.stop_asked)
        while True:
            await self._form()
            await self._train()

    def _write_status(self) -> None:
        self.journal.write_status(snapshot(self.fleet, self.ledger, self._started_s, self.config))

    def close(self) -> None:
        """Closes the files."""
        self.journal.close()

    def stop(self) -> None:
        """Asks the run to save and end, whatever it has to recover from first."""
        self.stop_asked = True
        self._pass_on_stop()
        self.fleet.changed.set()

    def _pass_on_stop(self) -> None:
        for node in self.fleet.roster.alive() if self.stop_asked else ():
            node.send({"is": "stop"})

    @property
    def _nothing_to_save(self) -> bool:
        """Whether to end at once: no step was made in this start, so all is where the start found it."""
        return self.stop_asked and not self._trained

    def _enter(self, phase: Phase) -> None:
        if phase is not self.fleet.phase:
            check_transition(self.fleet.phase, phase)
            self.fleet.phase = phase
            self._write_status()

    def _hopeless(self) -> bool:
        """Whether no device is there, and none will come."""
        return self.fleet.attendance.hopeless(self.starter.expected)

    def _usable(self) -> list[Device]:
        """Devices with a worker that is ready, without those removed, in the order of ``Roster.alive``."""
        removed = {*self.ledger.removed, *self.fleet.unfit}
        return [
            device
            for node in self.fleet.roster.alive()
            for device in (Device(node.name, index) for index in sorted(node.ready()))
            if device not in removed
        ]

    def _active(self, usable: list[Device]) -> list[Device]:
        """Usable devices without those of spare nodes; each lost node lets a spare node in."""
        spares = self.config.elastic.spare_nodes
        names = list(dict.fromkeys(device.node for device in usable))
        lost = max(0, len(self.starter.expected) - len(names))
        held_back = set(names[len(names) - max(0, spares - lost) :]) if spares > lost else set()
        return [device for device in usable if device.node not in held_back]

    async def _form(self) -> None:
        if self._nothing_to_save:
            raise Stopped(EXIT_STOPPED, Phase.STOPPED)
        config, began = self.config, time.monotonic()
        await self._until_replaced()
        placement = self._choose()
        if placement is None:
            placement = await self._wait_for_devices()
        restore = await self.copies.find()
        if restore is None and await self._wait_for_copies():
            return await self._form()
        if not set(placement.devices) <= set(self._usable()):
            return await self._form()  # one died meanwhile
        self.copies.go_on_from(restore)
        before = self.fleet.placement.layout if self.fleet.placement is not None else None
        if before is not None and before != placement.layout:
            self.fleet.new_pace()
            self.journal.event("reshape", before=before.describe(), after=placement.layout.describe())
        if (cause := crowded(config, placement.layout)) and before != placement.layout:
            self.journal.event("crowded", cause=cause)
        self._turn = False
        self.fleet.begin(placement)
        assign(self.fleet, self.copies, restore, time.monotonic() - self._started_s, sorted(self._believe))
        self._pass_on_stop()  # workers forked since the request have not received it
        self._enter(Phase.FORMING)
        self.journal.event(
            "form",
            generation=self.fleet.generation,
            world_size=placement.layout.world_size,
            layout=placement.layout.describe(),
            step=restore.step if restore else None,
            cause="memory" if restore else "checkpoint or new run",
            seconds=time.monotonic() - began,
        )

    async def _wait_for_devices(self) -> Placement:
        """Waits until a layout fits on the devices that are there. Raises Stopped if none does."""
        self._enter(Phase.WAITING)
        elastic, fleet, wait_s = self.config.elastic, self.fleet, self.config.elastic.wait_s
        if fleet.placement is None:  # the time in which nodes were to join counts
            wait_s = max(0.0, self._started_s + wait_s - time.monotonic())
        if not self._hopeless():
            left = len(self._usable())
            self.journal.event("wait", cause=f"{left} devices are left, and the run needs {elastic.min_devices}")
            await fleet.until(lambda: self.stop_asked or self._hopeless() or self._choose() is not None, wait_s)
        if self.stop_asked and self._trained:
            await fleet.until(lambda: self._choose() is not None, STOP_WAIT_S)
        placement = self._choose()
        if self._nothing_to_save:
            raise Stopped(EXIT_STOPPED, Phase.STOPPED)
        if placement is None and self.stop_asked:
            self.journal.say(f"asked to end, and too few devices are left to save step {fleet.step}")
            raise Stopped(EXIT_TOO_FEW, Phase.FAILED)
        if placement is None and self._hopeless():
            self.journal.fail(Verdict(Fault.ENVIRONMENT, fleet.attendance.why()))
            raise Stopped(1, Phase.FAILED)
        if placement is None:
            raise Stopped(EXIT_TOO_FEW, Phase.FAILED)
        return placement

    async def _until_replaced(self) -> None:
        """Waits for the replacements of killed workers, which are forked in milliseconds; for a process that the system
        cannot end (state D, a frozen control group, a stopped zygote) only once."""
        self._stuck -= set(self._usable())

        def missing() -> set[Device]:
            warm = self.fleet.roster.warm()
            lacking = {Device(node.name, index) for node in warm for index in set(node.devices) - set(node.ready())}
            return lacking - set(self.ledger.removed) - self._stuck

        if not await self.fleet.until(lambda: not missing(), REPLACE_S):
            self._stuck |= (late := missing())
            names = few([str(device) for device in sorted(late)])
            self.journal.event("stuck", cause=f"no process can be started on {names}, and the run goes on without")

    async def _wait_for_copies(self) -> bool:
        """Whether lost nodes came back with their memory copies: a node's memory survives the death of its agent. The
        wait is as long as making the steps since the newest checkpoint again would take."""
        elastic, step = self.config.elastic, self.fleet.step
        saved = max(self.copies.disk_step, _last_multiple(step, self.config.checkpoint.interval_steps))
        seconds = min(elastic.wait_s, (step - saved) * self.fleet.pace.median_s())
        gone = {node.name for node in self.fleet.roster.nodes.values()} - self._alive()
        if not self.copies.trained or not gone or seconds < TICK_S:
            return False
        self._enter(Phase.WAITING)
        self.journal.event("wait", step=step, cause=f"memory copies are on lost nodes: {few(sorted(gone))}",
                           seconds=seconds)  # fmt: skip
        deadline = time.monotonic() + seconds
        while gone and not self._nothing_to_save and (left := deadline - time.monotonic()) > 0:
            await self.fleet.until(partial(self._is_back, gone), left)
            gone -= self._alive()
            if await self.copies.find() is not None:
                return True
        return False

    def _is_back(self, gone: set[str]) -> bool:
        """Whether one of these nodes is connected again, or a stop has ended the wait."""
        return self._nothing_to_save or bool(gone & self._alive())

    def _alive(self) -> set[str]:
        return {node.name for node in self.fleet.roster.alive()}

    def _choose(self) -> Placement | None:
        usable = self._usable()
        if len(usable) < self.config.elastic.min_devices:
            return None
        return place(self.config, self._active(usable), self.device, self.fleet.placement, self._turn)

    async def _train(self) -> None:
        """Watches one generation to its end. Raises Stopped when it was the last."""
        assert self.fleet.placement is not None
        world = self.fleet.placement.layout.world_size
        limit = self.config.elastic.first_step_limit_s

        def formed() -> bool:
            ready = all(w.training or w.outcome for w in self.fleet.workers())
            return bool(self.fleet.evidence) or ready or self._nothing_to_save

        if not await self.fleet.until(formed, limit):
            self._accuse_silent("was not ready to train in time")
        if self._nothing_to_save:
            raise Stopped(EXIT_STOPPED, Phase.STOPPED)
        if not self.fleet.evidence:
            self._trained = True
            self.ledger.formed()
            self._enter(Phase.TRAINING)
            if self.config.elastic.replicate_every_steps:
                self.copies.begin(self.fleet.placement)
                self._remember()
            self.journal.event("resume", generation=self.fleet.generation, step=self.fleet.step, world_size=world)
        paused, layout = False, self.fleet.placement.layout
        alone = layout.tp * layout.cp * layout.pp == 1
        while not self.fleet.evidence:
            outcomes = [worker.outcome for worker in self.fleet.workers()]
            if len(outcomes) == world and all(outcomes):
                if all(outcome is Outcome.PAUSED for outcome in outcomes):
                    return
                if all(outcome in (Outcome.FINISHED, Outcome.STOPPED) for outcome in outcomes):
                    await self._end(done=all(outcome is Outcome.FINISHED for outcome in outcomes))
                break
            if not paused and self._better_layout_now():
                paused = True
                self._enter(Phase.PAUSING)
                for node in self.fleet.roster.alive():
                    node.send({"is": "pause", "generation": self.fleet.generation})
            await self.fleet.until(lambda: bool(self.fleet.evidence), self.fleet.tick_s)
            await self._look_for_hangs()
            self.fleet.evidence += find_slow(self.fleet.workers(), self._slow, self.config.elastic.slow_ratio, alone)
        await self._recover()

    async def _end(self, done: bool) -> None:
        """All have saved, perhaps a step not heard of yet. Copies in memory go if their step is complete on disk."""
        saved = await asyncio.to_thread(self._newest_step)
        keep = saved < self.fleet.step
        self.fleet.step = max(self.fleet.step, saved)
        kept = f"the newest complete checkpoint is of step {saved}; memory copies are kept" if keep else None
        self.journal.event("end" if done else "stopped", step=self.fleet.step, cause=kept)
        raise Stopped(0 if done else EXIT_STOPPED, Phase.FINISHED if done else Phase.STOPPED, keep)

    def _better_layout_now(self) -> bool:
        """Whether devices that joined allow a larger world."""
        if self.fleet.phase is not Phase.TRAINING or self.stop_asked or self.fleet.placement is None:
            return False
        assigned = set(self.fleet.placement.devices)
        if all(device in assigned for device in self._usable()):
            return False
        better = self._choose()
        return better is not None and better.layout.world_size > self.fleet.placement.layout.world_size

    def _accuse_silent(self, why: str) -> None:
        for worker in self.fleet.workers():
            if not worker.training and worker.outcome is None:
                rank = self.fleet.rank(worker.device)
                self.fleet.evidence.append(Evidence(Kind.HANG, worker.device.node, worker.device, rank, message=why))

    async def _look_for_hangs(self) -> None:
        workers = self.fleet.workers()
        if self.fleet.phase not in (Phase.TRAINING, Phase.PAUSING) or not workers or self.fleet.evidence:
            return
        ages = [worker.age_s for worker in workers if worker.outcome is None]
        if not ages or min(ages) < 0 or min(ages) <= self.fleet.pace.limit_s():
            return
        hung = await self.fleet.find_hung([worker.device for worker in workers])
        if hung and not self.fleet.evidence:
            looks = {str(device): look for device, look in self.fleet.looks.items()}
            self.journal.keep_stacks(self.fleet.generation, looks)
            for device, why in hung.items():
                kind = kind_of_hang(self.fleet.looks.get(device, {}))
                self.fleet.evidence.append(Evidence(kind, device.node, device, self.fleet.rank(device), message=why))

    async def _recover(self) -> None:
        """A fault was seen: all leave, the evidence is judged, what is at fault is removed."""
        assert self.fleet.placement is not None
        began = time.monotonic()
        self.journal.event(
            "detect",
            generation=self.fleet.generation,
            step=self.fleet.step,
            cause=few(
                [f"{e.device or e.node}: {e.kind.value} {e.message[:200]}".strip() for e in self.fleet.evidence], "; "
            ),
        )
        self._enter(Phase.ABORTING)
        for node in self.fleet.roster.alive():
            node.send({"is": "abort", "generation": self.fleet.generation})
        # A hung worker cannot leave; killed at once, its replacement is forked meanwhile.
        hung = {item.device for item in self.fleet.evidence if item.kind in (Kind.HANG, Kind.STALL)}
        self.fleet.kill([worker for worker in self.fleet.inside() if worker.device in hung])
        await asyncio.sleep(SETTLE_S)
        if all(item.kind is Kind.CONNECTION for item in self.fleet.evidence):
            # A peer is gone, and not yet known: a node that fell silent is noticed after lost_after_s.
            await self.fleet.until(
                lambda: any(item.kind is not Kind.CONNECTION for item in self.fleet.evidence),
                self.config.elastic.lost_after_s,
            )
        if not await self.fleet.until(lambda: not self.fleet.inside(), LEAVE_S):
            self.fleet.kill(self.fleet.inside())
            await self.fleet.until(lambda: not self.fleet.inside(), LEAVE_S)
        for item in self.fleet.evidence:
            if item.kind is Kind.COPY_LOST:
                self.copies.distrust(item.copy)
        self.ledger.made_steps(self.fleet.made_steps, self.fleet.placement.devices)
        verdict = self.ledger.judge(blame(self.fleet.evidence, self.fleet.placement.devices))
        self.journal.event("blame", fault=verdict.fault.value, cause=verdict.reason, seconds=time.monotonic() - began)
        self._act_on(verdict)

    def _act_on(self, verdict: Verdict) -> None:
        broken = verdict.fault is Fault.NETWORK and self._trained
        self.fleet.fruitless += not (broken and self.fleet.broken_for_s() < self.config.elastic.wait_s)
        if verdict.fault is Fault.SETUP:
            self.fleet.exclude(verdict.nodes[0], verdict.reason)
            if self._choose() is None:  # the run would wait for what does not come
                verdict = verdict.of_all_nodes()
        if verdict.stops_run:
            self.journal.fail(verdict)
            raise Stopped(EXIT_USER_ERROR if verdict.fault is Fault.USER else 1, Phase.FAILED)
        if self.fleet.fruitless > self.config.elastic.max_fruitless:
            words = self.fleet.attendance.words_of(verdict.nodes)
            self.journal.fail(verdict.given_up(self.fleet.fruitless, words))
            raise Stopped(1, Phase.FAILED)
        for step, devices in self.fleet.doubted.items():
            if len(devices) > 1 and step not in self._believe:
                # The fault followed the samples to another device, so no device is at fault.
                self._believe.add(step)
                for device in devices:
                    self.ledger.acquit(device)
        self._turn = any(item.kind in (Kind.NOT_FINITE, Kind.RAISED) for item in verdict.evidence)
        for device in verdict.devices:
            if device in self.ledger.removed:
                self.journal.event("remove", node=device.node, device=device.number, cause=verdict.reason)
                node = self.fleet.roster.nodes.get(device.node)
                if node is not None:
                    node.send({"is": "retire", "device": device.number})
                    node.workers.pop(device.number, None)
        self._remember()
        for name, reason in used_up(self.fleet, self.ledger).items():
            self.starter.condemn(name, reason)

    def _remember(self) -> None:
        """Keeps for the next start what it must know: strikes, removals, and which memory copies to look for."""
        self.journal.remember(
            {**self.ledger.to_json(), "model": self._model, "trained": [t.as_list() for t in self.copies.trained]}
        )
