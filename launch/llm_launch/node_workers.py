"""The workers of a node: forked by a zygote, watched, and forked anew where one has ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_launch import wire
from llm_launch.agent_settings import AgentSettings
from llm_launch.health import MemoryKills
from llm_launch.local import worker_defaults
from llm_launch.network import interface_of
from llm_launch.progress import ProgressPage
from llm_parallel.files import open_to_append

WORKER_MODULE = "llm_parallel.worker.elastic"
PRELOAD = (WORKER_MODULE, "llm_parallel.model.gpt", "torch.utils.tensorboard", "torch._dynamo")
"""torch._dynamo, because torch's optimizers load it."""
SLOTS = 256
FORK_AGAIN_S = 2.0
REPORT_S = 1.0
"""Time for the zygote to report the end of a worker, which takes it milliseconds."""
STOPPED_S, STOPPED_LOOK_S = 5.0, 0.5
"""After how long a process that stands still by a signal or a debugger is told of, and time between looks for one."""
FORK_LIMIT_S = 60.0
"""Time for the zygote to fork a worker, which takes it milliseconds."""


@dataclass
class Worker:
    """A forked process and its device."""

    number: int
    device: int
    channel: wire.Channel | None
    """None while its connection is being opened."""
    pid: int = 0
    generation: int = 0
    ready: bool = False
    killed: bool = False
    """Whether this agent has ended it; a controller that comes back must not give it work."""
    still: tuple[float, int] | None = None
    """Since when it is stopped, and the processor time that it had used by then; None: it is not."""

    def send(self, message: wire.Message) -> None:
        """To the process, if it has connected."""
        if self.channel is not None:
            self.channel.send(message)


class NodeWorkers:
    """One process for each wanted device. tell: to the controller; log: for people; spawn: runs a task beside the
    agent's others, ``vital`` if the agent cannot do without it."""

    def __init__(
        self,
        settings: AgentSettings,
        tell: Callable[[wire.Message], None],
        log: Callable[[str], None],
        spawn: Callable[..., None],
    ) -> None:
        self.settings, self.tell, self.log, self.spawn = settings, tell, log, spawn
        self.page = ProgressPage(slots=SLOTS)
        self.workers: dict[int, Worker] = {}
        self.wanted = set(settings.devices)
        self.memory_kills = MemoryKills()
        self.ending = False
        self._number = 0
        self._log_fd = -1
        self._zygote: subprocess.Popen[bytes] | None = None
        self._zygote_socket: socket.socket | None = None
        self._warm = False
        self._looked_s = 0.0

    def _open_log(self) -> int:
        """Opened once: the run folder's file system may block, and an agent that blocks counts as lost. Workers without
        a log train as well."""
        log = self.settings.run_dir / "logs" / f"{self.settings.node}.log"
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            return open_to_append(log)
        except OSError as error:
            self.log(f"{log} cannot be opened ({error.strerror}); the workers here have no log")
            return os.open(os.devnull, os.O_WRONLY)

    def progress(self, now: float) -> dict[int, list[Any]]:
        """What each worker wrote last: generation, step, and times, of which those that began are ages at ``now``."""
        found = {}
        for worker in self.workers.values():
            seen = self.page.read(worker.number % SLOTS)
            age = -1.0 if seen.stepped_s < 0 else now - seen.stepped_s
            times = [age, seen.step_s, seen.probe_s, now - seen.marked_s, seen.own_s]
            found[worker.device] = [seen.generation, seen.step, *times]
        return found

    def stopped(self, now: float) -> list[Worker]:
        """Processes that have stood still for ``STOPPED_S``, stopped by a signal or a debugger, whatever they were at:
        while a generation forms, or a checkpoint is written, no step tells of it. One that is stopped and woken many
        times a second, so that it is slow, goes on."""
        if now - self._looked_s < STOPPED_LOOK_S:
            return []
        self._looked_s = now
        found = []
        for worker in self.workers.values():
            if process_state(worker.pid) not in ("T", "t"):
                worker.still = None
                continue
            used = processor_ticks(worker.pid)
            if worker.still is None or worker.still[1] != used:
                worker.still = now, used
            elif now - worker.still[0] >= STOPPED_S:
                found.append(worker)
        return found

    def by_device(self, device: int, number: int | None = None) -> Worker | None:
        """The process on a device, if it is the one that is meant."""
        # What was meant for a process that has died must not reach its replacement.
        return next((w for w in self.workers.values() if w.device == device and number in (None, w.number)), None)

    async def start(self) -> None:
        """Starts the zygote, which forks a worker on every device when it has imported everything."""
        self._log_fd = self._open_log() if self._log_fd < 0 else self._log_fd
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
        self.spawn(self._watch_zygote(channel))

    def _environment(self) -> dict[str, str]:
        interface = interface_of(self.settings.host)
        named = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}
        defaults = {**worker_defaults(os.environ, len(self.settings.devices)), **named}
        return {name: value for name, value in defaults.items() if name not in os.environ}

    async def _watch_zygote(self, channel: wire.Channel) -> None:
        while not self.ending:
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
            elif message["is"] == "failed":
                self._fork_failed(message["worker"], message["why"])
        if not self.ending:
            # Workers die with the zygote that forked them.
            self._warm = False
            for worker in list(self.workers.values()):
                self._on_exit(worker.pid, -signal.SIGKILL)
            await self.start()

    def _fork(self, device: int) -> None:
        if not self._warm or self.by_device(device) is not None or self.ending:
            return
        self._number += 1
        try:
            self._ask_for(self._number, device)
        except OSError as error:
            self._fork_failed(self._number, str(error), device)

    def _ask_for(self, number: int, device: int) -> None:
        """Has the zygote fork a worker. Raises OSError, as where this process has no descriptor left."""
        assert self._zygote_socket is not None
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
        socket.send_fds(self._zygote_socket, [request], [theirs.fileno(), self._log_fd])
        theirs.close()
        self.workers[number] = worker = Worker(number, device, None)
        self.spawn(self._serve_worker(worker, ours), vital=False)
        asyncio.get_running_loop().call_later(FORK_LIMIT_S, self._check_forked, worker)

    def _fork_failed(self, number: int, why: str, device: int | None = None) -> None:
        """A machine without a free process or descriptor has some again later."""
        worker = self.workers.pop(number, None)
        device = worker.device if worker is not None else device
        if worker is not None and worker.channel is not None:
            worker.channel.close()
        if device is not None and device in self.wanted:
            text = f"no process could be started: {why}; it is tried again every {FORK_AGAIN_S:g} s"
            self.tell({"is": "health", "code": "fork", "fatal": False, "device": device, "message": text})
            asyncio.get_running_loop().call_later(FORK_AGAIN_S, self._fork, device)

    def _check_forked(self, worker: Worker) -> None:
        """A zygote that somebody has stopped neither forks nor reports ends; another one takes its place."""
        if self.workers.get(worker.number) is worker and not worker.pid and self._zygote is not None:
            self.log(f"the zygote has not answered for {FORK_LIMIT_S:g} s and is replaced")
            self._zygote.kill()

    def _check_reported(self, worker: Worker) -> None:
        """A worker has ended, and a zygote that somebody has stopped neither says so nor forks another."""
        zygote = self._zygote
        unknown = self.workers.get(worker.number) is worker
        if unknown and zygote is not None and process_state(zygote.pid) in ("T", "t"):
            self.log("the zygote is stopped and is replaced")
            zygote.kill()

    async def _serve_worker(self, worker: Worker, control: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=control)
        worker.channel = wire.Channel(reader, writer)
        while True:
            try:
                message = await worker.channel.receive()
            except OSError:
                message = None
            if message is None:  # the zygote reports how it ended
                asyncio.get_running_loop().call_later(REPORT_S, self._check_reported, worker)
                return
            if message["is"] in ("ready", "left"):
                worker.ready = True
            if message["is"] == "ready":
                worker.pid = message["pid"]  # the zygote's own report may come later
                self.announce(worker)
            else:
                self.tell({**message, "device": worker.device, "number": worker.number})

    def announce(self, worker: Worker) -> None:
        """Offers a worker to the controller."""
        if worker.ready and not worker.killed:
            message = {"is": "worker", "device": worker.device, "pid": worker.pid, "number": worker.number}
            self.tell({**message, "generation": worker.generation})

    def _on_exit(self, pid: int, status: int) -> None:
        worker = next((worker for worker in self.workers.values() if worker.pid == pid), None)
        if worker is None:
            return
        del self.workers[worker.number]
        if worker.channel is not None:
            worker.channel.close()
        starved = status == -signal.SIGKILL and self.memory_kills.look()
        message = {"is": "exit", "device": worker.device, "status": status, "generation": worker.generation}
        self.tell({**message, "host_memory": starved})
        if worker.device in self.wanted:
            self._fork(worker.device)

    def kill_all(self) -> None:
        """Ends every worker."""
        for worker in self.workers.values():
            worker.killed = True
            kill(worker.pid)


def process_state(pid: int) -> str:
    """The system's letter for what a process does: R, S, D, T (stopped), Z."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "X"


def processor_ticks(pid: int) -> int:
    """Processor time that a process has used, in the system's ticks; 0 if there is no such process."""
    try:
        user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    except (OSError, ValueError):
        return 0
    return int(user) + int(system)


def kill(pid: int) -> None:
    """Ends a process, if there is one."""
    if pid > 0:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
