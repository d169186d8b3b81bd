"""A real Slurm of several nodes on this machine, for tests: every daemon is Slurm's own.

``Cluster`` runs all nodes on the loopback interface. A node that crashes there closes its connections, which is what a
killed process does; ``tests.slurm.namespaces`` has nodes that fall silent.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
UP_S = 120.0
"""A hang ends here; nothing is measured by it."""
ROUNDS = 10
# Slurm of Debian 12 (22.05) refuses to run without a cgroup plugin; only CONTROL_GROUPS uses this one.
CGROUP = "CgroupPlugin=cgroup/v1\nConstrainRAMSpace=yes\nConstrainSwapSpace=yes\nAllowedSwapSpace=0\n"
CONTROL_GROUPS = (
    "ProctrackType=proctrack/cgroup\nTaskPlugin=task/cgroup\nSelectTypeParameters=CR_Core_Memory\n"
    "JobAcctGatherType=jobacct_gather/cgroup\n"
)
"""Further lines of slurm.conf: the kernel ends processes of a job that needs more memory than it asked for."""
GROUPS = Path("/sys/fs/cgroup")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType={storage}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=5
MinJobAge=600
SchedulerParameters=sched_interval=1,bf_interval=2,batch_sched_delay=0,sched_min_interval=100000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """What this machine lacks for a Slurm of its own."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: slurm-wlm and munge)"
    return None if os.geteuid() == 0 else "only root can make devices and run jobs of other users"


def until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Waits for a condition. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {timeout_s:g} s")
        time.sleep(0.05)


def why_no_groups() -> str | None:
    """What this machine lacks for ``CONTROL_GROUPS``."""
    if not os.access(GROUPS / "memory", os.W_OK):
        return f"{GROUPS}/memory is no hierarchy of control groups (version 1) that can be written"
    return None


class Cluster:
    """Slurm with nodes n1 to n<nodes> on the loopback interface; ``more``: further lines for its configuration."""

    accounting = "accounting_storage/none"

    def __init__(self, folder: Path, nodes: int = 4, gpus: int = 0, more: str = "") -> None:
        self.folder, self.gpus, self.more = folder, gpus, more
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.port = free_ports(nodes + 1)
        self.conf = folder / "slurm.conf"

    @property
    def env(self) -> dict[str, str]:
        """This process's environment, with which Slurm's commands find the cluster."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        return {**kept, "SLURM_CONF": str(self.conf)}

    def up(self) -> None:
        """Starts every daemon and waits until all nodes are idle."""
        self._write_files()
        self._start_controller()
        for name in self.nodes:
            self._start_node(name)
        self.wait_for_nodes(len(self.nodes), ("idle",))

    def _start_controller(self) -> None:
        self._start_munge()
        self.start_slurmctld()

    def _start_munge(self) -> None:
        munge = ("munge.sock", "munge.key", "munged.log", "munged.pid", "munged.seed")
        kinds = ("socket", "key-file", "log-file", "pid-file", "seed-file")
        self.run(["munged", *(f"--{kind}={self.folder / name}" for kind, name in zip(kinds, munge))])

    def start_slurmctld(self) -> None:
        """Starts it, for the first time or after ``stop_slurmctld``, and waits until it listens."""
        self.run(["slurmctld", "-f", str(self.conf)])
        until(self._controller_listens, UP_S, "slurmctld's start")

    def stop_slurmctld(self) -> None:
        """Ends slurmctld, which writes its state; jobs go on, and nobody answers questions about them."""
        pid = int((self.folder / "run" / "slurmctld.pid").read_text())
        process = psutil.Process(pid)
        process.terminate()
        psutil.wait_procs([process], timeout=UP_S)

    def _controller_listens(self) -> bool:
        return listens(self.port)

    def _start_node(self, node: str) -> None:
        self.run(["slurmd", "-f", str(self.conf), "-N", node])

    def _write_files(self) -> None:
        for name in ("run", "log", "state", "gpu", *(f"spool-{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        (self.folder / "cgroup.conf").write_text(CGROUP)
        gres, listed = "", ""
        if self.gpus:
            for number in range(self.gpus):  # they must be character devices to be given to jobs
                os.mknod(self.folder / "gpu" / f"nvidia{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
            gres = f" Gres=gpu:{self.gpus}"
            listed = f"NodeName={self._all()} Name=gpu File={self.folder}/gpu/nvidia[0-{self.gpus - 1}]\n"
        (self.folder / "gres.conf").write_text(listed)
        common = CONFIGURATION.format(folder=self.folder, controller=self._controller(), storage=self.accounting)
        self.conf.write_text(common + self._node_lines(gres) + self.more)

    def _all(self) -> str:
        return f"n[1-{len(self.nodes)}]"

    def _controller(self) -> str:
        return f"{socket.gethostname().split('.')[0]}(127.0.0.1)"

    def _node_lines(self, gres: str) -> str:
        first, last = self.port + 1, self.port + len(self.nodes)
        return (
            f"SlurmctldPort={self.port}\nCommunicationParameters=NoInAddrAny,NoCtldInAddrAny\n"
            f"NodeName={self._all()} NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=8 "
            f"RealMemory=4000{gres} State=UNKNOWN\n"
        )

    def run(self, argv: Sequence[str], timeout_s: float = 30.0, check: bool = True) -> str:
        """Output of a command in the cluster's environment."""
        done = subprocess.run(argv, env=self.env, capture_output=True, text=True, timeout=timeout_s, cwd=self.folder)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(argv)}: status {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def states(self) -> dict[str, str]:
        """State of each node."""
        lines = self.run(["sinfo", "-N", "-h", "-o", "%N %T"], check=False).splitlines()
        return {name: state for name, _, state in (line.partition(" ") for line in lines)}

    def wait_for_nodes(self, count: int, states: Sequence[str], timeout_s: float = UP_S) -> None:
        """Waits until ``count`` nodes are in one of ``states``."""
        until(lambda: sum(state in states for state in self.states().values()) == count, timeout_s, f"{count} {states}")

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of ``scontrol show job``."""
        words = self.run(["scontrol", "show", "job", job_id, "-o"]).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def tasks(self) -> list[psutil.Process]:
        """Processes of its jobs, on whatever node: who could still put a job back into the queue."""
        found = []
        for process in psutil.process_iter(["pid"]):
            with contextlib.suppress(psutil.Error, OSError):
                if any(self._is_task(process, node) for node in self.nodes):
                    found.append(process)
        return found

    def crash(self, node: str) -> None:
        """Kills the node's slurmd and everything that runs in its jobs, at once."""
        victims = []
        for process in psutil.process_iter(["pid"]):
            with contextlib.suppress(psutil.Error, OSError):
                if self._is_slurmd(process, node):
                    victims.append(process)
                elif self._is_task(process, node):
                    parent = process.parent()
                    is_step = parent is not None and parent.name() == "slurmstepd"
                    victims += [parent, process] if is_step and parent is not None else [process]
        # All at once, as a crash is: srun's shepherd would end the whole step if it outlived srun by a moment.
        for end in (psutil.Process.suspend, psutil.Process.kill):
            for victim in victims:
                with contextlib.suppress(psutil.NoSuchProcess):
                    end(victim)

    def boot(self, node: str) -> None:
        """Starts a crashed node again."""
        # A node that is back before Slurm missed it would leave its job in COMPLETING.
        self.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=crashed"])
        self._start_node(node)
        self.run(["scontrol", "update", f"nodename={node}", "state=resume"], check=False)

    def _is_slurmd(self, process: psutil.Process, node: str) -> bool:
        line = process.cmdline()
        return line[:1] == ["slurmd"] and str(self.conf) in line and node in line

    def _is_task(self, process: psutil.Process, node: str) -> bool:
        env = process.environ()
        return env.get("SLURM_CONF") == str(self.conf) and env.get("SLURMD_NODENAME") == node and "SLURM_JOB_ID" in env

    def down(self) -> None:
        """Ends every process of the cluster, whatever state it is in."""
        # What is killed may have started another a moment before.
        for _ in range(ROUNDS):
            mine = [p for p in psutil.process_iter(["pid"]) if self._is_mine(p)]
            if not mine:
                self._remove_groups()
                return
            for process in mine:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(mine, timeout=10)
        raise RuntimeError(f"{mine} will not end")

    def _remove_groups(self) -> None:
        """Control groups of its nodes. Those of another cluster that runs hold processes, and stay."""
        for node in self.nodes if CONTROL_GROUPS in self.more else ():
            for group in sorted(GROUPS.glob(f"*/slurm_{node}/**/"), key=lambda path: -len(path.parts)):
                with contextlib.suppress(OSError):
                    group.rmdir()

    def _is_mine(self, process: psutil.Process) -> bool:
        if process.pid == os.getpid():
            return False
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            if process.name() == "slurmstepd":  # it clears its environment
                return Path(process.cwd()).is_relative_to(self.folder)
            if process.name() in ("munged", "slurmctld", "slurmd"):
                return any(str(self.folder) in part for part in process.cmdline())
            return process.environ().get("SLURM_CONF") == str(self.conf)
        return False

    def __enter__(self) -> Cluster:
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.down()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_ports(count: int) -> int:
    """First of ``count`` free ports in a row."""
    while True:
        first = 20000 + secrets.randbelow(20000)
        if not any(listens(first + number) for number in range(count)):
            return first
