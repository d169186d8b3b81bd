"""Questions and requests to SLURM: the job's nodes, agents on them, time left, requeue, drain.

SLURM starts processes and assigns nodes. The controller decides who is alive, who is to blame and what runs next,
since SLURM notices a dead node after half a minute at best. Every call has a time limit, and one that fails because
slurmctld is away raises SlurmError, which callers survive.
"""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

CALL_S = 10.0
REQUEUE_TRIES = 3
AWAY_S = 60.0
"""How long a slurmctld that does not answer is told what a job on hold needs."""
WORKING_STATES = ("allocated", "mixed", "idle", "draining")
NO_STEPS = ("4294967291", "4294967290")
"""What some versions of SLURM give as the step of a batch script, and of a shell that salloc opens on a node."""
_FIELD = re.compile(r"(?:^| )([A-Za-z:/_]+)=")


class SlurmError(Exception):
    """A SLURM command failed or did not answer."""


class SlurmAway(SlurmError):
    """slurmctld did not answer; it may later."""


AWAY = ("unable to contact", "timed out", "connection failure", "connection refused", "zero bytes", "not responding")
"""Parts of the messages of SLURM's commands when slurmctld does not answer, in lower case."""


class Fate(Enum):
    """What SLURM is about to do with the job."""

    RUNNING = "running"
    PREEMPTED = "preempted"
    """It runs, in the grace time before its nodes are given to another job."""
    QUEUED = "queued"
    """It is in the queue again, and only this start of it has not ended yet."""
    OVER = "over"
    """It was cancelled or ended already, and only this start of it has not ended yet."""


@dataclass(frozen=True)
class SlurmJob:
    """The job that this process runs in. restart_count: how often it was requeued before this run of it."""

    job_id: str
    restart_count: int
    node: str
    environment: Mapping[str, str]

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> SlurmJob | None:
        """None outside of a job."""
        job_id = environment.get("SLURM_JOB_ID")
        if not job_id:
            return None
        if environment.get("SLURM_ARRAY_TASK_ID"):
            # The number of an array's last task is that of the whole array too: a requeue would be one of all tasks.
            job_id = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
        restarts = int(environment.get("SLURM_RESTART_COUNT") or 0)
        node = environment.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]
        return cls(job_id, restarts, node, environment)

    @property
    def may_lead(self) -> bool:
        """Whether this was started once: by the batch script, from the shell of ``salloc``, or as the only task of a
        step (``srun --pty bash``). The tasks of a step would each start the run."""
        step = self.environment.get("SLURM_STEP_ID")
        alone = self.environment.get("SLURM_STEP_NUM_TASKS") == "1"
        return step is None or "SLURM_PROCID" not in self.environment or step in NO_STEPS or alone

    @property
    def gpus_per_node(self) -> int:
        """GPUs that SLURM gave on this node; 0 if it gave none."""
        return int(self.environment.get("SLURM_GPUS_ON_NODE") or 0)

    def nodes(self) -> list[str]:
        """Names of the nodes that the job has now; the environment only knows those that it began with."""
        names = self._show().get("NodeList", "")
        return [] if names in ("", "(null)") else self._call(["scontrol", "show", "hostnames", names]).split()

    def addresses(self, nodes: Sequence[str]) -> dict[str, str]:
        """IPv4 address of each node, as slurmctld reaches it."""
        found = {}
        for record in self._records(["scontrol", "show", "node", ",".join(nodes), "-o"]):
            found[record["NodeName"]] = socket.gethostbyname(record.get("NodeAddr", record["NodeName"]))
        return found

    def node_states(self) -> dict[str, str]:
        """State of each node of the job in SLURM's words, such as ``mixed``, ``down*``, ``draining``."""
        nodes = self.nodes()
        lines = self._call(["sinfo", "-N", "-h", "-n", ",".join(nodes), "-o", "%N %T"]).splitlines() if nodes else []
        return {name: state for name, _, state in (line.partition(" ") for line in lines)}

    def seconds_left(self) -> float | None:
        """Seconds to the job's time limit; None if it has none."""
        text = self._call(["squeue", "-h", "-j", self.job_id, "-o", "%L"])
        return parse_time(text)

    def is_this_run(self) -> bool:
        """Whether the job runs and was not requeued since this run of it began."""
        return self.fate() in (Fate.RUNNING, Fate.PREEMPTED)

    def fate(self) -> Fate:
        """See ``Fate``. Raises SlurmError."""
        job = self._show()
        state = job.get("JobState")
        if int(job.get("Restarts", "0")) != self.restart_count:
            return Fate.OVER if state == "CANCELLED" else Fate.QUEUED
        if state != "RUNNING":
            return Fate.OVER
        return Fate.RUNNING if job.get("PreemptTime", "None") in ("None", "Unknown") else Fate.PREEMPTED

    def batch_host_is_dead(self) -> bool:
        """Whether SLURM has given up the node that the batch script runs on."""
        host = self._show().get("BatchHost", "")
        state = self._call(["sinfo", "-N", "-h", "-n", host, "-o", "%T"]).splitlines() if host else []
        return bool(state) and state[0].rstrip("*").startswith(("down", "fail", "powered"))

    def start_agents(
        self, argv: Sequence[str], nodes: Sequence[str], more: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        """One step with one task on each of ``nodes``, which outlives the loss of any of them. ``more``: further
        options of srun, which win over those here."""
        count = str(len(nodes))
        options = [
            "--no-kill",
            "--kill-on-bad-exit=0",
            "--overlap",
            "--unbuffered",
            "--nodes",
            count,
            "--ntasks",
            count,
        ]
        options += ["--ntasks-per-node=1", "--nodelist", ",".join(nodes), "--job-name", "agents"]
        if self.gpus_per_node:
            options += [f"--gpus-per-node={self.gpus_per_node}"]
        cores = self.environment.get("SLURM_CPUS_ON_NODE")
        options += [f"--cpus-per-task={cores}"] if cores else []
        # A group of its own: a signal for the batch script is not one for the agents.
        return subprocess.Popen(
            ["srun", *options, *more, *argv],
            env=self._step_environment(),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _step_environment(self) -> dict[str, str]:
        """Without what the batch job's options put there, which a step of fewer nodes must not inherit."""
        stale = ("SLURM_NNODES", "SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE",
                 "SLURM_TASKS_PER_NODE", "SLURM_CPUS_PER_TASK", "SLURM_JOB_NODELIST", "SLURM_NODELIST")  # fmt: skip
        return {name: value for name, value in self.environment.items() if name not in stale}

    def requeue(self, exclude: Sequence[str] = ()) -> None:
        """Asks that the job goes back into the queue, held if there are nodes to ``exclude``; SLURM ends this run of it
        then. Nothing happens to a job that was cancelled meanwhile: ``fate`` tells.

        Raises SlurmError if it can't be done, as for jobs submitted with --no-requeue.
        """
        # "Incomplete": SLURM itself leaves a job alone that was cancelled a moment ago.
        self._call(["scontrol", "requeuehold" if exclude else "requeue", "Incomplete", self.job_id])

    def release(self, exclude: Sequence[str]) -> None:
        """Lets a job that waits, held, run again, but never on the nodes ``exclude``. Raises SlurmError."""
        try:
            self._insist(["scontrol", "update", f"jobid={self.job_id}", f"ExcNodeList={','.join(exclude)}"])
        finally:
            self._insist(["scontrol", "release", self.job_id])

    def _insist(self, argv: Sequence[str]) -> None:
        """Tries again: a job that SLURM is just ending may refuse a change, and slurmctld may be away."""
        deadline, refusals = time.monotonic() + AWAY_S, 0
        while True:
            try:
                self._call(argv)
                return
            except SlurmError as error:
                refusals += not isinstance(error, SlurmAway)
                if refusals >= REQUEUE_TRIES or time.monotonic() > deadline:
                    raise
                time.sleep(1.0)

    def drain(self, node: str, reason: str) -> bool:
        """Asks that ``node`` gets no new jobs; False if this user may not."""
        try:
            self._call(["scontrol", "update", f"nodename={node}", "state=drain", f"reason={reason[:200]}"])
        except SlurmError:
            return False
        return True

    def _show(self) -> dict[str, str]:
        records = self._records(["scontrol", "show", "job", self.job_id, "-o"])
        if not records:
            raise SlurmError(f"scontrol knows no job {self.job_id}")
        return records[0]

    def _records(self, argv: Sequence[str]) -> list[dict[str, str]]:
        return [parse_record(line) for line in self._call(argv).splitlines() if line.strip()]

    def _call(self, argv: Sequence[str]) -> str:
        return call(argv, self.environment)


def call(argv: Sequence[str], environment: Mapping[str, str]) -> str:
    """Output of a command of SLURM, which ignores the signals of this process's group. Raises SlurmError."""
    try:
        done = subprocess.run(
            argv,
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=CALL_S,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise SlurmError(f"{argv[0]} is not installed here") from None
    except subprocess.TimeoutExpired:
        raise SlurmAway(f"{' '.join(argv)} did not answer within {CALL_S:g} s") from None
    if done.returncode < 0:  # as SLURM does with all processes of a job that it ends
        raise SlurmAway(f"{' '.join(argv)} was ended by signal {-done.returncode}")
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[:500]
        away = any(words in said.lower() for words in AWAY)
        raise (SlurmAway if away else SlurmError)(f"{' '.join(argv)}: {said}")
    return done.stdout.strip()


def parse_record(line: str) -> dict[str, str]:
    """Fields of one line of ``scontrol show … -o``; values may contain spaces, but no `` Name=``."""
    found = list(_FIELD.finditer(line))
    ends = [match.start() for match in found[1:]] + [len(line)]
    return {match.group(1): line[match.end() : end].strip() for match, end in zip(found, ends)}


def parse_time(text: str) -> float | None:
    """Seconds of SLURM's [days-][[hours:]minutes:]seconds or minutes; None for UNLIMITED and what is no time."""
    text = text.strip()
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        return None
    days, *rest = match.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is not None:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 1:
        hours, minutes, seconds = 0, parts[0], 0
    else:
        hours, minutes, seconds = ([0] * (3 - len(parts)) + parts)[:3]
    return float(((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)


def switches_above(environment: Mapping[str, str]) -> str:
    """The network switches above this node, from the top down with points between them; "" where SLURM knows none."""
    address, pattern = environment.get("SLURM_TOPOLOGY_ADDR", ""), environment.get("SLURM_TOPOLOGY_ADDR_PATTERN", "")
    return address.rpartition(".")[0] if pattern.startswith("switch") else ""
