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
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_launch import wire
from llm_launch.agent_settings import AgentSettings
from llm_launch.copy_files import forget, forget_all_but, forget_stale, inventory, keep_alive
from llm_launch.copy_transfer import CopyServer
from llm_launch.health import GpuHealth, HostHealth, MemoryKills, open_nvml
from llm_launch.local import worker_defaults
from llm_launch.network import interface_of
from llm_launch.progress import ProgressPage
from llm_launch.slurm import SlurmError, SlurmJob
from llm_parallel.errors import UserError
from llm_parallel.lines import note

WORKER_MODULE = "llm_parallel.worker.elastic"
PRELOAD = (WORKER_MODULE, "llm_parallel.model.gpt", "torch.utils.tensorboard", "torch._dynamo")
"""torch._dynamo, because torch's optimizers load it."""
SLOTS = 256
CONNECT_S = 60.0
RECONNECT_S = 0.2
HEALTH_S = 30.0
CLAIM_S = 60.0
RESCUE_LIMIT_S = 1800.0
"""How long agents wait for SLURM to notice that the batch script's node is dead; its default is five minutes."""
RESCUE_S = 3.0
"""Time between two questions to SLURM whether that node is dead, asked by an agent without a controller."""


@dataclass
class Worker:
    """A forked process and its device."""

    number: int
    device: int
    channel: wire.Channel
    pid: int = 0
    generation: int = 0
    ready: bool = False
    killed: bool = False
    """Whether this agent has ended it; a controller that comes back must not give it work."""


class Agent:
    """State and tasks of one agent."""

    def __init__(self, settings: AgentSettings) -> None:
        self.settings = settings
        self.page = ProgressPage(slots=SLOTS)
        self.workers: dict[int, Worker] = {}
        self.wanted = set(settings.devices)
        self.controller: wire.Channel | None = None
        self.heard_s = time.monotonic()
        self.memory_kills = MemoryKills()
        self.copy_server = CopyServer(settings.host, settings.copies_dir, settings.secret)
        self._number = 0
        # Opened once: the run folder's file system may block, and an agent that blocks counts as lost.
        (settings.run_dir / "logs").mkdir(parents=True, exist_ok=True)
        log = settings.run_dir / "logs" / f"{settings.node}.log"
        self._workers_log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._zygote: subprocess.Popen[bytes] | None = None
        self._zygote_socket: socket.socket | None = None
        self._warm = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ending = False
        self._keep = True

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def run(self) -> int:
        """Serves until the run ends: 0 if the controller ended it, 1 if no controller can be reached."""
        await self._start_zygote()
        self._spawn(asyncio.to_thread(forget_stale, self.settings.copies_dir))
        self._spawn(self._beat())
        self._spawn(self._watch_health())
        status = 1
        while not self._ending:
            channel = await self._find_controller()
            if channel is None:
                break
            self.controller, self.heard_s = channel, time.monotonic()
            channel.send(self._hello())
            for worker in self.workers.values():
                self._announce(worker)
            status = await self._serve(channel)
            self.controller = None
        self._kill_all()
        if not self._keep:
            forget(self.settings.copies_dir)
        return status

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
        while True:
            await asyncio.sleep(RESCUE_S * (1.0 + random.random()))
            try:
                dead = await asyncio.to_thread(job.batch_host_is_dead)
                if dead and await asyncio.to_thread(job.is_this_run) and self._claims(job):
                    self._log("the node of the batch script is dead; putting the job back into the queue")
                    await asyncio.to_thread(job.requeue)
            except SlurmError as error:
                self._log(f"SLURM: {error}")

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
        while time.monotonic() < deadline:
            for host, port in self.settings.controllers:
                with contextlib.suppress(ConnectionError):
                    return await wire.connect(host, port, self.settings.secret)
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
        }

    async def _serve(self, channel: wire.Channel) -> int:
        while not self._ending:
            try:
                message = await channel.receive()
            except OSError:
                message = None
            if message is None:
                # The next controller makes a new plan; workers of the old one must not go on.
                self._log("the controller is gone; ending the workers here")
                self._kill_all()
                return 1
            self.heard_s = time.monotonic()
            if message["is"] != "beat":
                self._on_controller(message)
        return 0

    def _on_controller(self, message: wire.Message) -> None:
        kind = message["is"]
        if kind in ("assign", "inject", "look", "pardon", "value"):
            worker = self._by_device(message["device"], message.get("number"))
            if worker is not None:
                if kind == "assign":
                    worker.generation, worker.ready = message["generation"], False
                worker.channel.send(message)
                if kind == "look":
                    self._tell({"is": "state", "device": worker.device, "state": _process_state(worker.pid)})
        elif kind in ("abort", "pause", "stop"):
            for worker in self.workers.values():
                worker.channel.send(message)
        elif kind == "inventory":
            self._tell({"is": "inventory", "entries": inventory(self.settings.copies_dir)})
        elif kind == "forget":
            self._spawn(asyncio.to_thread(forget_all_but, self.settings.copies_dir, message["keep"]))
        elif kind in ("kill", "retire"):
            if kind == "retire":
                self.wanted.discard(message["device"])
            worker = self._by_device(message["device"], message.get("number"))
            if worker is not None:
                _kill(worker.pid)
        elif kind == "end":
            self._ending, self._keep = True, message["keep"]
            for worker in self.workers.values():
                worker.channel.send({"is": "end"})

    def _by_device(self, device: int, number: int | None = None) -> Worker | None:
        # What was meant for a process that has died must not reach its replacement.
        return next((w for w in self.workers.values() if w.device == device and number in (None, w.number)), None)

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
                self._kill_all()
                self.heard_s = now
            progress = {}
            for worker in self.workers.values():
                seen = self.page.read(worker.number % SLOTS)
                age = -1.0 if seen.stepped_s < 0 else now - seen.stepped_s
                times = [age, seen.step_s, seen.probe_s, now - seen.marked_s, seen.own_s]
                progress[worker.device] = [seen.generation, seen.step, *times]
            self._tell({"is": "beat", "progress": progress})
            self.memory_kills.look()

    async def _watch_health(self) -> None:
        nvml = await asyncio.to_thread(open_nvml)
        watched: list[GpuHealth | HostHealth] = [HostHealth([self.settings.run_dir, self.settings.copies_root])]
        watched += [GpuHealth(nvml, device) for device in self.settings.devices] if nvml is not None else []
        while True:
            for item in watched:
                for finding in await asyncio.to_thread(item.look):
                    self._tell({"is": "health", **asdict(finding)})
            with contextlib.suppress(OSError, UserError):  # a worker that makes its first copy says what is wrong
                keep_alive(self.settings.copies_dir)
            await asyncio.sleep(HEALTH_S)

    async def _start_zygote(self) -> None:
        ours, theirs = socket.socketpair()
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", "llm_launch.zygote", str(theirs.fileno())],
            pass_fds=(theirs.fileno(), self.page.fd),
            env={**os.environ, **self._environment()},
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        wire.send(ours, {"is": "import", "modules": list(PRELOAD)})
        self._zygote_socket = ours
        reader, writer = await asyncio.open_connection(sock=ours)
        channel = wire.Channel(reader, writer)
        self._spawn(self._watch_zygote(channel))

    def _environment(self) -> dict[str, str]:
        interface = interface_of(self.settings.host)
        named = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}
        defaults = {**worker_defaults(os.environ, len(self.settings.devices)), **named}
        return {name: value for name, value in defaults.items() if name not in os.environ}

    async def _watch_zygote(self, channel: wire.Channel) -> None:
        while not self._ending:
            try:
                message = await channel.receive()
            except OSError:
                message = None
            if message is None:
                break
            if message["is"] == "warm":
                self._warm = True
                for device in sorted(self.wanted):
                    self._fork(device)
            elif message["is"] == "forked":
                worker = self.workers.get(message["worker"])
                if worker is not None:
                    worker.pid = message["pid"]
            elif message["is"] == "exited":
                self._on_exit(message["pid"], message["status"])
        if not self._ending:
            # Workers die with the zygote that forked them.
            self._warm = False
            for worker in list(self.workers.values()):
                self._on_exit(worker.pid, -signal.SIGKILL)
            await self._start_zygote()

    def _fork(self, device: int) -> None:
        if not self._warm or self._by_device(device) is not None or self._ending:
            return
        assert self._zygote_socket is not None
        self._number += 1
        number = self._number
        ours, theirs = socket.socketpair()
        settings = self.settings
        environment = {
            "LLM_PARALLEL_RUN_DIR": str(settings.run_dir),
            "LLM_PARALLEL_RUN_FILE": settings.run_file,
            "LLM_PARALLEL_NODE": settings.node,
            "LLM_PARALLEL_REPLICA_DIR": str(settings.copies_dir),
            "LLM_PARALLEL_PROGRESS_FD": str(self.page.fd),
            "LLM_PARALLEL_SLOT": str(number % SLOTS),
        }
        request = wire.encode({"is": "fork", "worker": number, "module": WORKER_MODULE, "environment": environment})
        socket.send_fds(self._zygote_socket, [request], [theirs.fileno(), self._workers_log])
        theirs.close()
        self._spawn(self._serve_worker(number, device, ours))

    async def _serve_worker(self, number: int, device: int, control: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=control)
        worker = Worker(number, device, wire.Channel(reader, writer))
        self.workers[number] = worker
        while True:
            try:
                message = await worker.channel.receive()
            except OSError:
                message = None
            if message is None:
                return  # the zygote reports how it ended
            if message["is"] in ("ready", "left"):
                worker.ready = True
            if message["is"] == "ready":
                worker.pid = message["pid"]  # the zygote's own report may come later
                self._announce(worker)
            else:
                self._tell({**message, "device": device, "number": number})

    def _announce(self, worker: Worker) -> None:
        if worker.ready and not worker.killed:
            message = {"is": "worker", "device": worker.device, "pid": worker.pid, "number": worker.number}
            self._tell({**message, "generation": worker.generation})

    def _on_exit(self, pid: int, status: int) -> None:
        worker = next((worker for worker in self.workers.values() if worker.pid == pid), None)
        if worker is None:
            return
        del self.workers[worker.number]
        worker.channel.close()
        starved = status == -signal.SIGKILL and self.memory_kills.look()
        message = {"is": "exit", "device": worker.device, "status": status, "generation": worker.generation}
        self._tell({**message, "host_memory": starved})
        if worker.device in self.wanted:
            self._fork(worker.device)

    def _kill_all(self) -> None:
        for worker in self.workers.values():
            worker.killed = True
            _kill(worker.pid)

    def _log(self, text: str) -> None:
        """To the terminal, and to a file: the terminal of a SLURM step is gone with the batch script's node."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):
            note(f"agent {self.settings.node}: {text}")
            with (self.settings.run_dir / "logs" / "agents.log").open("a") as log:
                log.write(f"{stamp} {self.settings.node}: {text}\n")


def _process_state(pid: int) -> str:
    """The system's letter for what a process does: R, S, D, T (stopped), Z."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "X"


def _kill(pid: int) -> None:
    if pid > 0:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def main() -> None:
    """Runs one agent until the run is over or the controller is gone."""
    agent = Agent(AgentSettings.parse())
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    async def serve() -> int:
        # SIGTERM is reported to the controller, which decides: when SLURM preempts a job it sends the signal to the
        # agents' step alone. It sends another while an agent requeues the job, which must not be interrupted.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, agent.tell_of_term)
        return await agent.run()

    raise SystemExit(asyncio.run(serve()))


if __name__ == "__main__":
    main()
