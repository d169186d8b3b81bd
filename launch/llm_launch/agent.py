"""One agent per node: keeps a worker ready on every device, passes messages between them and the controller, tells it
when one ends, and ends them all when it is cut off.

    python -m llm_launch.agent --controller HOST:PORT --node NAME --run-dir DIR …      (secret: LLM_PARALLEL_SECRET)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import threading
import time
import traceback
from dataclasses import asdict
from functools import partial
from typing import Any

from llm_launch import wire
from llm_launch.absence import UNREACHED
from llm_launch.agent_settings import AgentSettings
from llm_launch.copy_files import Claim, forget, forget_all_but, forget_stale, inventory
from llm_launch.copy_transfer import CopyServer
from llm_launch.door import raise_file_limit
from llm_launch.health import GpuHealth, HostHealth, open_nvml
from llm_launch.needs import lacking
from llm_launch.node_workers import NodeWorkers, kill, process_state
from llm_launch.slurm import SlurmError, SlurmJob, switches_above
from llm_parallel.errors import EXIT_USER_ERROR, UserError
from llm_parallel.files import open_to_append
from llm_parallel.lines import note

CONNECT_S = 60.0
UNREACHED_S = 20.0
"""Time after which an agent says that it does not reach the controller."""
PATIENCE_S = 20.0
"""Time that files may take to appear on this node before it counts as one that lacks them: caches of NFS keep an older
state for seconds."""
FINAL_S = 60.0
"""Time after which nothing more is expected of the others if all nodes lack something."""
LOOK_S = 2.0
MOUNT_S = 30.0
"""Time for a file system to answer."""
RECONNECT_S = 0.2
QUEUED_S = 30.0
"""Time for which a controller may be busy with strangers who came before."""
HEALTH_S = 30.0
CLAIM_S = 60.0
RESCUE_LIMIT_S = 1800.0
"""How long agents wait for SLURM to notice that the batch script's node is dead; its default is five minutes."""
RESCUE_S = 3.0
"""Time between two questions to SLURM whether that node is dead, asked by an agent without a controller."""


class Agent:
    """State and tasks of one agent."""

    def __init__(self, settings: AgentSettings) -> None:
        self.settings = settings
        self.controller: wire.Channel | None = None
        self.heard_s = time.monotonic()
        self.here = NodeWorkers(settings, self._tell, self._log, self._spawn)
        self._claim = Claim(settings.copies_dir)
        self.copy_server = CopyServer(settings.host, settings.copies_dir, settings.secret)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._broken = False
        self._keep = True
        self._look: tuple[threading.Thread, list[str | None]] | None = None
        """A look at what this node lacks, and its answer."""

    def _spawn(self, coroutine: Any, vital: bool = True) -> None:
        """Runs a task beside the others. If a vital one dies this agent ends, and another is started: without its sign
        of life the controller would call the node silent, and without its zygote no worker could be replaced."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, vital))

    def _ended(self, vital: bool, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        self._log("".join(traceback.format_exception(error)))
        if vital and not self.here.ending:
            self._log(f"ends, since a task of it failed: {error}")
            self.here.ending, self._broken = True, True
            self.here.kill_all()
            if self.controller is not None:
                self.controller.close()

    async def run(self) -> int:
        """Serves until the run ends: 0 if the controller ended it, 1 if no controller can be reached."""
        first = await self._find_controller()
        if first is None or not await self._is_fit(first):
            return 1
        with contextlib.suppress(OSError, UserError):
            self._claim.renew()
        await self.here.start()
        self._spawn(asyncio.to_thread(forget_stale, self.settings.copies_dir), vital=False)
        self._spawn(self._beat())
        self._spawn(self._watch_health(), vital=False)
        status = 1
        while not self.here.ending:
            channel = first or await self._find_controller()
            first = None
            if channel is None:
                break
            self.controller, self.heard_s = channel, time.monotonic()
            channel.send(self._hello())
            for worker in self.here.workers.values():
                self.here.announce(worker)
            status = await self._serve(channel)
            self.controller = None
        self.here.kill_all()
        if not self._keep:
            forget(self.settings.copies_dir)
        return 1 if self._broken else status

    async def _is_fit(self, channel: wire.Channel) -> bool:
        """Waits until this node has all that the run needs, and tells the controller what it lacks; False if the
        controller is gone before, or the run has ended. A shared file system may be mounted late."""
        channel.send({"is": "here", "node": self.settings.node})
        try:
            needs = await channel.receive()
            began, told = time.monotonic(), ("", False)
            while needs is not None and needs["is"] == "needs":
                lacks = await self._lacking(needs)
                if lacks is None:
                    return True
                passed_s = time.monotonic() - began
                if passed_s > PATIENCE_S and told != (lacks, passed_s > FINAL_S):
                    told = lacks, passed_s > FINAL_S
                    self._log(f"waits: {lacks}")
                    channel.send({"is": "absent", "node": self.settings.node, "cause": lacks, "final": told[1]})
                with contextlib.suppress(asyncio.TimeoutError):
                    needs = await asyncio.wait_for(channel.receive(), LOOK_S)
        except OSError:
            pass
        return False

    async def _lacking(self, needs: wire.Message) -> str | None:
        """What this node lacks. A mount that does not answer holds up a thread of its own, not this agent."""
        if self._look is None:  # one that still waits is waited for, so that threads do not pile up
            found: list[str | None] = []
            thread = threading.Thread(target=lambda: found.append(lacking(needs)), daemon=True)
            self._look = thread, found
            thread.start()
        thread, found = self._look
        deadline = time.monotonic() + MOUNT_S
        while thread.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        if thread.is_alive():
            return f"a file system of the run does not answer there for {MOUNT_S:g} s"
        self._look = None
        return found[0] if found else "its files could not be looked at"

    async def _find_controller(self) -> wire.Channel | None:
        deadline = time.monotonic() + CONNECT_S
        rescue = asyncio.get_running_loop().create_task(self._rescue()) if self.settings.rescue else None
        try:
            return await self._try_controllers(deadline + (RESCUE_LIMIT_S if rescue is not None else 0.0))
        finally:
            if rescue is not None:
                rescue.cancel()

    async def _rescue(self) -> None:
        """If the batch script's node is dead, the job has no controller and never gets one. Any agent that learns
        from SLURM that the node is dead puts the job back into the queue."""
        job = SlurmJob.from_environment(os.environ)
        if job is None:
            return
        said = ""
        while True:
            await asyncio.sleep(RESCUE_S * (1.0 + random.random()))
            try:
                dead = await asyncio.to_thread(job.batch_host_is_dead)
                if dead and await asyncio.to_thread(job.is_this_run) and self._claims(job):
                    self._log("the node of the batch script is dead; putting the job back into the queue")
                    await asyncio.to_thread(job.requeue)
            except SlurmError as error:
                if said != f"SLURM: {error}":  # an image without SLURM's commands says it every time
                    self._log(said := f"SLURM: {error}")

    def _claims(self, job: SlurmJob) -> bool:
        """Whether this agent may requeue the job, since a second requeue would end the next start. The claim is a file
        in the run folder; one that is older than ``CLAIM_S`` is ignored."""
        claim = self.settings.run_dir / "logs" / f"requeue-{job.job_id}-{job.restart_count}"
        with contextlib.suppress(OSError):
            if time.time() - claim.stat().st_mtime > CLAIM_S:
                claim.unlink()
        try:
            claim.touch(exist_ok=False)
        except OSError:
            return False
        return True

    async def _try_controllers(self, deadline: float) -> wire.Channel | None:
        began, said = time.monotonic(), False
        while time.monotonic() < deadline:
            for host, port in self.settings.controllers:
                try:
                    return await wire.connect(host, port, self.settings.secret, queued_s=QUEUED_S)
                except ConnectionError as error:
                    if not said and time.monotonic() - began > UNREACHED_S:
                        said = True
                        self._log(f"{UNREACHED} {host}:{port}: {error.__cause__ or error}")
            await asyncio.sleep(RECONNECT_S)
        return None

    def _hello(self) -> wire.Message:
        settings = self.settings
        return {
            "is": "hello",
            "node": settings.node,
            "host": settings.host,
            "devices": list(settings.devices),
            "copies": list(self.copy_server.address),
            "pid": os.getpid(),
            "switches": switches_above(os.environ),
        }

    async def _serve(self, channel: wire.Channel) -> int:
        while not self.here.ending:
            try:
                message = await channel.receive()
            except OSError:
                message = None
            if message is None:
                # The next controller makes a new plan; workers of the old one must not go on.
                self._log("the controller is gone; ending the workers here")
                self.here.kill_all()
                return 1
            self.heard_s = time.monotonic()
            if message["is"] != "beat":
                self._on_controller(message)
        return 0

    def _on_controller(self, message: wire.Message) -> None:
        kind = message["is"]
        if kind in ("assign", "inject", "look", "pardon", "value", "partner"):
            worker = self.here.by_device(message["device"], message.get("number"))
            if worker is not None:
                if kind == "assign":
                    worker.generation, worker.ready = message["generation"], False
                worker.send(message)
                if kind == "look":
                    self._tell({"is": "state", "device": worker.device, "state": process_state(worker.pid)})
        elif kind in ("abort", "pause", "stop"):
            for worker in self.here.workers.values():
                worker.send(message)
        elif kind == "inventory":
            self._tell({"is": "inventory", "entries": inventory(self.settings.copies_dir)})
        elif kind == "forget":
            self._spawn(asyncio.to_thread(forget_all_but, self.settings.copies_dir, message["keep"]), vital=False)
        elif kind in ("kill", "retire"):
            if kind == "retire":
                self.here.wanted.discard(message["device"])
            worker = self.here.by_device(message["device"], message.get("number"))
            if worker is not None:
                worker.killed = True
                kill(worker.pid)
        elif kind == "end":
            self.here.ending, self._keep = True, message["keep"]
            for worker in self.here.workers.values():
                worker.send({"is": "end"})

    def tell_of_term(self) -> None:
        """Reports to the controller that this agent got SIGTERM."""
        self._tell({"is": "terminated"})

    def _tell(self, message: wire.Message) -> None:
        if self.controller is not None:
            self.controller.send({**message, "node": self.settings.node})

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.settings.heartbeat_s)
            now = time.monotonic()
            if self.controller is not None and now - self.heard_s > self.settings.lost_after_s:
                self._log(f"nothing heard from the controller for {now - self.heard_s:.1f} s; ending the workers here")
                self.controller.close()
                self.here.kill_all()
                self.heard_s = now
            self._tell({"is": "beat", "progress": self.here.progress(now)})
            for worker in self.here.stopped(now):
                self._tell({"is": "stopped", "device": worker.device, "number": worker.number})
            self.here.memory_kills.look()

    async def _watch_health(self) -> None:
        nvml = await asyncio.to_thread(open_nvml)
        watched: list[GpuHealth | HostHealth] = [HostHealth([self.settings.run_dir, self.settings.copies_root])]
        watched += [GpuHealth(nvml, device) for device in self.settings.devices] if nvml is not None else []
        while True:
            for item in watched:
                for finding in await asyncio.to_thread(item.look):
                    self._tell({"is": "health", **asdict(finding)})
            with contextlib.suppress(OSError, UserError):  # a worker that makes its first copy says what is wrong
                self._claim.renew()
            await asyncio.sleep(HEALTH_S)

    def _log(self, text: str) -> None:
        """To the terminal, and to a file: the terminal of a SLURM step is gone with the batch script's node."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):
            note(f"agent {self.settings.node}: {text}")
            with os.fdopen(open_to_append(self.settings.run_dir / "logs" / "agents.log"), "a") as log:
                log.write(f"{stamp} {self.settings.node}: {text}\n")


def main() -> None:
    """Runs one agent until the run is over or the controller is gone."""
    raise_file_limit()
    try:
        agent = Agent(AgentSettings.parse())
    except UserError as error:
        note(str(error))
        raise SystemExit(EXIT_USER_ERROR) from None
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    async def serve() -> int:
        # SIGTERM is reported to the controller, which decides: when SLURM preempts a job it sends the signal to the
        # agents' step alone. It sends another while an agent requeues the job, which must not be interrupted.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, agent.tell_of_term)
        return await agent.run()

    raise SystemExit(asyncio.run(serve()))


if __name__ == "__main__":
    main()
