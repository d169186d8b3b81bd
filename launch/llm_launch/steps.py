"""Agents on the nodes of a SLURM job: by job steps that are watched and started again node by node, and by a small job
where SLURM has taken a node out of this one."""

from __future__ import annotations

import contextlib
import queue
import re
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from llm_launch.absence import SILENT, UNREACHED, Absence, absences
from llm_launch.agent_step import AgentStep
from llm_launch.slurm import SlurmError, SlurmJob, is_working
from llm_launch.starters import END_S, agent_command, copies_name
from llm_parallel.config.tree import RunConfig
from llm_parallel.lines import note

RETRY_S = 10.0
LONGEST_RETRY_S = 60.0
STEPS = 32
"""Steps at the start. A step of one node can end no other node's agent; above so many nodes, each step has several."""
SAID_LINES = 40
_NOT_REACHED = re.compile(rf"agent (\S+): ({UNREACHED} .+)")


def groups(names: Sequence[str], most: int = STEPS) -> list[list[str]]:
    """The nodes of each step at the start: at most ``most`` steps, in the order of the nodes, of sizes that differ by
    one at most."""
    count = min(most, len(names))
    return [list(names[len(names) * n // count : len(names) * (n + 1) // count]) for n in range(count)]


@dataclass(eq=False)
class Step:
    """One srun command with an agent on each of ``names``."""

    names: tuple[str, ...]
    process: subprocess.Popen[bytes]
    said: deque[str] = field(default_factory=lambda: deque(maxlen=SAID_LINES))
    """The last lines of its standard error."""

    def listen(self, unreached: Callable[[str, str], None]) -> int:
        """Passes on what the step says, until it ends; srun's exit status. unreached: is called with the node and the
        sentence of an agent that does not reach the controller."""
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for raw in stream:
                line = raw.decode("utf-8", "replace").rstrip()
                if not any(words in line for words in SILENT):
                    self.said.append(line)
                    note(line)
                if found := _NOT_REACHED.search(line):
                    unreached(found[1], found[2])
        return self.process.wait()


@dataclass
class SlurmStarter:
    """One agent on each node of a SLURM job.

    An agent that does not come, or is gone, is started again by a step of its own, as soon as SLURM lets it: at once
    where only the agent died, when the node is back where it crashed. A node that SLURM has taken out of the job, since
    it was down, comes back by a job of its own.
    """

    config: RunConfig
    run_file: Path
    job: SlurmJob
    names: list[str]
    devices: list[int]
    secret: str
    host: str
    port: int = 0
    step: AgentStep = field(default_factory=AgentStep)
    lost: Sequence[str] = ()
    """Those of ``names`` that SLURM has taken out of the job before this start of the launcher."""
    steps: list[Step] = field(default_factory=list)
    condemned: dict[str, str] = field(default_factory=dict)
    _newest: dict[str, Step] = field(default_factory=dict)
    _told: queue.SimpleQueue[Absence] = field(default_factory=queue.SimpleQueue)
    _jobs: dict[str, str] = field(default_factory=dict)
    """By node, the job that brings it back."""
    _ended: threading.Event = field(default_factory=threading.Event)
    _waiting: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.copies = copies_name(self.config)

    @property
    def expected(self) -> dict[str, int]:
        """Devices of each node."""
        return {name: len(self.devices) for name in self.names}

    def begin(self, port: int) -> None:
        """Starts an agent on each node."""
        self.port = port
        for names in groups([name for name in self.names if name not in self.lost]):
            self._run(names)
        for name in self.lost:
            self.start(name)

    def look(self) -> list[Absence]:
        """Agents that have ended, and nodes on which none can be started, since the last call."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._told.get_nowait())
        return found

    def _command(self, rescue: bool) -> list[str]:
        controller = f"{self.host}:{self.port}"
        argv = agent_command(self.config, self.run_file, controller, "auto", "auto", self.devices, self.copies)
        return self.step.command([*argv, "--rescue"] if rescue else argv)

    def _with_secret(self) -> SlurmJob:
        return replace(self.job, environment={**self.job.environment, "LLM_PARALLEL_SECRET": self.secret})

    def _run(self, names: Sequence[str]) -> Step:
        step = Step(tuple(names), self._with_secret().start_agents(self._command(rescue=True), names, self.step.srun))
        self.steps = [other for other in self.steps if other.process.poll() is None] + [step]
        self._newest.update(dict.fromkeys(names, step))
        threading.Thread(target=self._listen, args=(step,), daemon=True).start()
        return step

    def _listen(self, step: Step) -> None:
        status = step.listen(lambda node, text: self._told.put(Absence(node, f"its agent {text}")))
        if self._ended.is_set():
            return
        found = {item.node: item for item in absences(step.names, list(step.said), status)}
        for name in step.names:
            if self._newest.get(name) is step:
                self._told.put(found.get(name) or Absence(name, "", ended=True))
            elif name in found:
                self._told.put(replace(found[name], ended=False, late=True))

    def start(self, node: str) -> None:
        """Starts the agent of ``node`` again, in the background, until one runs."""
        if node not in self._waiting and node not in self.condemned and not self._ended.is_set():
            self._waiting.add(node)
            self._newest.pop(node, None)  # the end of its last step is known
            threading.Thread(target=self._keep_starting, args=(node,), daemon=True).start()

    def _keep_starting(self, node: str) -> None:
        pause_s = RETRY_S
        try:
            while not self._ended.is_set():
                began = time.monotonic()
                reason = self._why_not(node)
                if reason is None:
                    try:
                        self._run([node]).process.wait(RETRY_S)
                    except subprocess.TimeoutExpired:
                        return  # the agent runs; should its step end, that is told
                else:
                    self._told.put(Absence(node, reason))
                self._ended.wait(max(0.0, began + pause_s - time.monotonic()))
                pause_s = min(LONGEST_RETRY_S, 1.5 * pause_s)
        finally:
            self._waiting.discard(node)

    def _why_not(self, node: str) -> str | None:
        """Why no step can be started on ``node`` now; None if one can."""
        try:
            if node not in self.job.nodes():
                return self._bring_back(node)
            state = self.job.states_of([node]).get(node, "unknown")
            return None if is_working(state) else f"SLURM calls it {state}"
        except SlurmError as error:
            return f"SLURM does not answer: {error}"

    def _bring_back(self, node: str) -> str:
        """A job of its own for a node that SLURM has taken out of this one; what is to be said of it. A job that has
        begun cannot get a node back: `scontrol update` refuses to let it grow, unless a site has switched that on."""
        gone = "SLURM has taken it out of this job"
        number = self._jobs.get(node)
        if number is None:
            logs = Path(self.config.run_dir).resolve() / "logs"
            try:
                number = self._with_secret().submit_agent(self._command(rescue=False), node, logs, self.step.srun)
            except SlurmError as error:
                return f"{gone}, and a job of its own is refused: {error}; the job's next start can use the node again"
            self._jobs[node] = number
        state = self.job.state_of_job(number)
        if state in ("PENDING", "RUNNING", "CONFIGURING", "SUSPENDED", "COMPLETING"):
            return f"{gone}; job {number} ({state.lower()}) brings it back when SLURM has it again"
        del self._jobs[node]
        return f"{gone}, and job {number}, which was to bring it back, has ended ({state.lower() or 'unknown'})"

    def condemn(self, node: str, reason: str) -> None:
        """Drains the node, in the background; where that is not permitted it is kept out when the job is requeued."""
        if node not in self.condemned:
            self.condemned[node] = reason
            threading.Thread(target=self.job.drain, args=(node, f"llm-parallel: {reason}"), daemon=True).start()

    def end(self) -> None:
        """Waits for the steps to end, and ends those that do not."""
        self._ended.set()
        deadline = time.monotonic() + END_S
        for step in self.steps:
            try:
                step.process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                step.process.kill()
                step.process.wait()
        for number in self._jobs.values():
            self.job.cancel(number)
