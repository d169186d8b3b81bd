"""Questions and requests to SLURM: the job's nodes, agents on them, time left, requeue, drain.

SLURM starts processes and assigns nodes. The controller decides who is alive, who is to blame and what runs next,
since SLURM notices a dead node after half a minute at best. Every call has a time limit, and one that fails because
slurmctld is away raises SlurmError, which callers survive.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from llm_launch.variables import number_in

CALL_S = 10.0
REQUEUE_TRIES = 3
AWAY_S = 60.0
"""How long a slurmctld that does not answer is told what a job on hold needs."""
WORKING_STATES = ("allocated", "mixed", "idle", "draining", "completing", "reserved", "maint", "planned")
"""Words for nodes on which a step of a running job can be started."""
PROMPT = {"PYTHONUNBUFFERED": "1"}
"""For lines that arrive when they are printed. srun's own --unbuffered gives every task a terminal, for which programs
draw bars and colours."""
ONE_TASK = {"SLURM_OOM_KILL_STEP": "0"}
"""Where a site has switched OOMKillStep on (SLURM 23.11 and later), one process that the kernel ends for lack of memory
would end the step, and all agents of it. This is srun's --oom-kill-step, which older versions do not know."""
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
        """None outside of a job. Raises UserError if a variable of the job is not a number."""
        job_id = environment.get("SLURM_JOB_ID")
        if not job_id:
            return None
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        if array and task:
            # The number of an array's last task is that of the whole array too: a requeue would be one of all tasks.
            job_id = f"{array}_{task}"
        restarts = number_in(environment, "SLURM_RESTART_COUNT", 0)
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
        return number_in(self.environment, "SLURM_GPUS_ON_NODE", 0)

    def nodes(self) -> list[str]:
        """Names of the nodes that the job has now; the environment only knows those that it began with."""
        names = self._show().get("NodeList", "")
        return [] if names in ("", "(null)") else self._call(["scontrol", "show", "hostnames", names]).split()

    def first_nodes(self) -> list[str]:
        """Names of the nodes that this start of the job began with."""
        names = self.environment.get("SLURM_JOB_NODELIST", "")
        return self._call(["scontrol", "show", "hostnames", names]).split() if names else []

    def taken(self, gone: Sequence[str]) -> list[str]:
        """Those of the nodes ``gone``, which are not the job's any more, that are down: SLURM has taken them out of the
        job. The others were given back by a user."""
        states = self.states_of(gone)
        return [name for name in gone if not is_working(states.get(name, ""))]

    def addresses(self, nodes: Sequence[str]) -> dict[str, str]:
        """Name or address of each node by which SLURM reaches it."""
        records = self._records(["scontrol", "show", "node", ",".join(nodes), "-o"]) if nodes else []
        return {record["NodeName"]: record.get("NodeAddr") or record["NodeName"] for record in records}

    def node_states(self) -> dict[str, str]:
        """State of each node of the job in SLURM's words, such as ``mixed``, ``down*``, ``draining``."""
        return self.states_of(self.nodes())

    def states_of(self, nodes: Sequence[str]) -> dict[str, str]:
        """The same of any nodes."""
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
        """One step with one task on each of ``nodes``, which outlives the loss of any of them once it runs. ``more``:
        further options of srun, which win over those here. Its standard error is a pipe."""
        count = str(len(nodes))
        # The environment as it is here, whatever --export the job was submitted with. No number of CPUs or GPUs: that
        # of this node may be more than another has, and a step without one may use all that the job has on each node.
        options = ["--no-kill", "--kill-on-bad-exit=0", "--overlap", "--export=ALL", "--cpu-bind=none"]
        options += ["--nodes", count, "--ntasks", count, "--ntasks-per-node=1", "--nodelist", ",".join(nodes)]
        if "SLURM_GPUS" in self.environment and self.gpus_per_node:
            # A step of a job that asked for a total (--gpus=16) would ask for that total on its nodes.
            options += [f"--gpus-per-node={self.gpus_per_node}"]
        # A group of its own: a signal for the batch script is not one for the agents.
        return subprocess.Popen(
            ["srun", *options, "--job-name", "agents", *more, *argv],
            env=self._step_environment(),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def _step_environment(self) -> dict[str, str]:
        """Without what the batch job's options put there, which a step of fewer nodes must not inherit."""
        stale = ("SLURM_NNODES", "SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE",
                 "SLURM_TASKS_PER_NODE", "SLURM_CPUS_PER_TASK", "SLURM_JOB_NODELIST", "SLURM_NODELIST", "SLURM_GPUS",
                 "SLURM_GPUS_PER_TASK", "SLURM_NTASKS_PER_GPU", "SLURM_CPUS_PER_GPU",
                 "SLURM_TRES_PER_TASK")  # fmt: skip
        kept = {name: value for name, value in self.environment.items() if name not in stale}
        return {**kept, **PROMPT, **ONE_TASK}

    def submit_agent(self, argv: Sequence[str], node: str, logs: Path, more: Sequence[str] = ()) -> str:
        """A job of its own with an agent on ``node``, in this job's partition, account and quality of service, for the
        rest of its time; the job's number. ``more``: further options of srun. It waits in the queue while SLURM does
        not have the node. Raises SlurmError where that is not allowed."""
        mine = self._show()
        named = {"partition": "Partition", "account": "Account", "qos": "QOS", "reservation": "Reservation",
                 "chdir": "WorkDir"}  # fmt: skip
        options = [f"--{option}={mine[name]}" for option, name in named.items()
                   if mine.get(name) not in (None, "", "(null)")]  # fmt: skip
        left = self.seconds_left()
        options += [f"--time={max(1, int(left / 60))}"] if left is not None else []
        options += [f"--gpus-per-node={self.gpus_per_node}"] if self.gpus_per_node else []
        shares = {"cpus-per-task": "SLURM_CPUS_PER_TASK", "mem": "SLURM_MEM_PER_NODE"}
        parts = [f"--{option}={self.environment[name]}" for option, name in shares.items() if name in self.environment]
        options += ["--exclusive", "--mem=0"] if mine.get("OverSubscribe") == "NO" else parts
        options += [f"--nodelist={node}", "--nodes=1", "--no-requeue", "--export=ALL"]
        log = str(logs).replace("%", "%%") + f"/agent-{node}-%j.out"
        options += [f"--job-name=agent-of-{self.job_id}", f"--output={log}"]
        step = ["srun", "--nodes=1", "--ntasks=1", "--export=ALL", "--cpu-bind=none", *more, *argv]
        kept = {name: value for name, value in self.environment.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        job = replace(self, environment={**kept, **_configuration(self.environment), **PROMPT, **ONE_TASK})
        return job._call(["sbatch", "--parsable", *options, "--wrap", f"exec {shlex.join(step)}"]).split(";")[0]

    def state_of_job(self, number: str) -> str:
        """SLURM's word for what a job does; "" if it is not known any more. Raises SlurmAway."""
        try:
            records = self._records(["scontrol", "show", "job", number, "-o"])
        except SlurmAway:
            raise
        except SlurmError:
            return ""
        return records[0].get("JobState", "") if records else ""

    def cancel(self, number: str) -> None:
        """Cancels another job of this user, if it can be done."""
        with contextlib.suppress(SlurmError):
            self._call(["scancel", number])

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


def _configuration(environment: Mapping[str, str]) -> dict[str, str]:
    """Where the commands find the cluster, if the environment says it."""
    return {"SLURM_CONF": environment["SLURM_CONF"]} if "SLURM_CONF" in environment else {}


def is_working(state: str) -> bool:
    """Whether a step can be started on a node in this state. SLURM puts signs behind its words: ``*`` does not answer,
    ``@`` a reboot is due, ``^`` it reboots, ``$`` maintenance, ``-`` planned for another job, ``~``, ``#``, ``!`` and
    ``%`` power is saved. A node that does not answer may do so before SLURM calls it down."""
    word = state.rstrip("*@^$-+~#!%")
    return word in WORKING_STATES and not state.endswith(("~", "#", "!", "%", "^"))


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
