"""Ways in which a SLURM job ends, each caused on a real cluster, and what the next start of its run finds.

python -m tests.slurm.endings FOLDER [WAY …]      prints the table of launch/README.md; FOLDER must not exist yet
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from llm_launch.live_run import LiveRun
from llm_launch.supervised_job import REQUEUE_S
from tests.slurm import accounting
from tests.slurm.accounting import Accounted
from tests.slurm.cluster import CONTROL_GROUPS, Cluster, until
from tests.slurm.submitted import Submitted
from tests.support.commands import Corpus

LIMIT_S = 600.0
"""A hang ends here; nothing is measured by it."""
KINDS = {"low": ("REQUEUE", 0), "grace": ("REQUEUE", 30), "cancel": ("CANCEL", 0), "cancelgrace": ("CANCEL", 30)}
PARTITIONS = (
    "PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE\n"
    + "".join(
        f"PartitionName={name} Nodes=ALL PriorityTier=1 PreemptMode={mode} GraceTime={seconds} State=UP\n"
        for name, (mode, seconds) in KINDS.items()
    )
    + "PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF State=UP\n"
)
WATCHED = (
    "SelectTypeParameters=CR_Core_Memory\nJobAcctGatherType=jobacct_gather/linux\nJobAcctGatherFrequency=task=1\n"
    "JobAcctGatherParams=OverMemoryKill,UsePss\n"
)
"""Slurm itself measures the memory of a step, and ends the whole step where it is too much."""
QUALITIES = "PreemptType=preempt/qos\nPreemptMode=REQUEUE\n"


@dataclass
class Ended:
    """How a job ended, and what came of it."""

    way: str
    job: str = ""
    """State and exit code, and how often it was requeued, by ``scontrol show job``."""
    accounts: list[str] = field(default_factory=list)
    """State and exit code of each start, by ``sacct -D``; empty without accounting."""
    status: str = ""
    """What ``llm-parallel status`` says."""
    made: int = 0
    """The last step before the end."""
    first: int = 0
    """The first step of the next start; 0 if it makes none."""
    steps: list[int] = field(default_factory=list)
    log: str = ""

    def row(self) -> str:
        """A line of the table."""
        said = re.sub(r" on n\S+?\)", ")", self.status)
        first = str(self.first) if self.first else "none: it is finished"
        cells = (self.way, self.job, ", ".join(self.accounts), re.sub(r"job \d+", "job N", said), str(self.made), first)
        return "| " + " | ".join(cells) + " |"


Act = Callable[[Submitted], None]


@dataclass(frozen=True)
class Way:
    """act: brings the end about; job: the state expected; goes_on: whether the next start comes by itself; lost: steps
    that may be made again; options: of submit; more: of slurm.conf."""

    act: Act
    job: str
    goes_on: bool = False
    lost: int = 0
    options: Sequence[str] = ()
    more: str = PARTITIONS
    mends: Act | None = None
    """What has to be done before the next start."""
    accounts: str = ""
    """The state by ``sacct``, if it is another."""


def _wait_for_line(submitted: Submitted, text: str) -> None:
    until(lambda: text in submitted.log(), LIMIT_S, f"{text!r} in the log")


def _over(submitted: Submitted) -> None:
    def over() -> bool:
        return submitted.cluster.job(submitted.job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING")

    until(over, LIMIT_S, "the job's end")


def _requeued(submitted: Submitted) -> None:
    def waits() -> bool:
        job = submitted.cluster.job(submitted.job)
        return job["Restarts"] == "1" and job["JobState"] != "COMPLETING"

    until(waits, LIMIT_S, "the requeue")


def _cancel(at: str) -> Act:
    def act(submitted: Submitted) -> None:
        if at:
            _wait_for_line(submitted, at)
        else:
            submitted.reach(5)
        submitted.cluster.run(["scancel", submitted.job])
        _over(submitted)
        # What could requeue it has to be gone.
        until(lambda: not submitted.cluster.tasks(), LIMIT_S, "the end of all its processes")

    return act


def _warn(submitted: Submitted) -> None:
    submitted.reach(5)
    submitted.cluster.run(["scancel", "--signal=USR1", "--batch", submitted.job])
    _requeued(submitted)


def _warn_without_slurmctld(submitted: Submitted) -> None:
    """The launcher has asked for a requeue in vain before slurmctld comes back."""
    _without_slurmctld(submitted)
    submitted.cluster.start_slurmctld()
    _requeued(submitted)


def _without_slurmctld(submitted: Submitted) -> None:
    submitted.reach(5)
    tasks = submitted.cluster.tasks()
    script = [p for p in tasks if any(part.endswith("/slurm_script") for part in p.cmdline())]
    script = [p for p in script if p.ppid() not in [other.pid for other in script]]
    assert len(script) == 1, tasks
    submitted.cluster.stop_slurmctld()
    script[0].send_signal(signal.SIGUSR1)
    until(lambda: bool(submitted.events("stopped")), LIMIT_S, "the save")
    _wait_for_line(submitted, "does not answer yet")


def _preempt(by: str = "--partition=high") -> Act:
    def act(submitted: Submitted) -> None:
        submitted.reach(5)
        cluster = submitted.cluster
        options = ["--parsable", by, "--nodes=4", "--exclusive", "--output=/dev/null"]
        urgent = cluster.run(["sbatch", *options, "--wrap=sleep 1"])
        until(lambda: cluster.job(urgent)["JobState"] == "COMPLETED", LIMIT_S, "the urgent job's end")
        (_over if submitted.cluster.job(submitted.job)["Restarts"] == "0" else _requeued)(submitted)

    return act


def _suspend(submitted: Submitted) -> None:
    """Long enough for every heartbeat to be missed."""
    submitted.reach(5)
    submitted.cluster.run(["scontrol", "suspend", submitted.job])
    made = max(submitted.steps())
    assert submitted.status().startswith("suspended (SLURM job "), submitted.status()
    submitted.cluster.run(["scontrol", "resume", submitted.job])
    submitted.reach(made + 3)


def _crash(every: bool) -> Act:
    def act(submitted: Submitted) -> None:
        submitted.reach(5)
        cluster = submitted.cluster
        for node in cluster.nodes if every else cluster.nodes[-1:]:
            cluster.crash(node)
        if every:
            for node in cluster.nodes:
                cluster.boot(node)
            _requeued(submitted)
        else:
            submitted.goes_on_with(3)

    return act


def _warn_until_it_gives_up(submitted: Submitted) -> None:
    """slurmctld is away until the launcher has given up, and takes the batch script's status when it is back."""
    _without_slurmctld(submitted)
    until(lambda: "slurmctld has not answered for " in submitted.log(), REQUEUE_S + LIMIT_S, "the launcher's end")
    submitted.cluster.start_slurmctld()
    _over(submitted)


def _grow(submitted: Submitted) -> None:
    """A process beside a worker takes memory until the kernel ends the worker, whose score says so, in a job that has
    less than that. The run goes on."""
    submitted.reach(5)
    state = json.loads((submitted.run / "elastic.json").read_text())
    pid = next(iter(state["nodes"][0]["workers"].values()))
    command = [sys.executable, "-m", "tests.slurm.memory_hog", str(pid)]
    subprocess.run(command, check=True, timeout=LIMIT_S, cwd=Path(__file__).parents[2])
    submitted.wait(lambda: len(submitted.events("resume")) > 1, "a recovery")
    assert "the node had no memory left" in str(submitted.events("blame")[0]["cause"])
    submitted.reach(max(submitted.steps()) + 3)


def _without_memory(submitted: Submitted) -> None:
    _over(submitted)
    (fail,) = submitted.events("fail")
    assert "given up after" in str(fail["cause"]), fail
    assert any(words in str(fail["cause"]) for words in ("no memory left", "exceeded memory limit", "oom-kill")), fail


def _more_memory(submitted: Submitted) -> None:
    """Smaller micro batches, as the user would give."""
    path = submitted.run / "submit.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["train"].update(global_batch_size=8, micro_batch_size=1)
    path.write_text(yaml.safe_dump(tree))


def _change_copy(submitted: Submitted, steps: int) -> None:
    path = submitted.run / "submit.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["train"]["steps"] = steps
    path.write_text(yaml.safe_dump(tree))


def _mistake(submitted: Submitted) -> None:
    _change_copy(submitted, -1)
    submitted.cluster.run(["scontrol", "release", submitted.job])
    _over(submitted)


def _error(submitted: Submitted) -> None:
    """The same exception in every process."""
    submitted.reach(5)
    with subprocess.Popen(["true"]) as nobody:
        live = LiveRun(submitted.run, nobody, _secret(submitted.cluster))
        step = max(submitted.steps()) + 30
        for rank in range(4):
            live.cause("raise", rank, from_step=step)
    _over(submitted)


def _secret(cluster: Cluster) -> str:
    for process in cluster.tasks():
        with suppress(psutil.Error):
            found = process.environ().get("LLM_PARALLEL_SECRET")
            if found:
                return found
    raise AssertionError("no agent runs")


HELD = ("--sbatch=--hold",)
PART = ("--nodes=1", "--shared", "--cpus=4", "--mem=1500M")
LARGE = (*PART, "elastic.max_fruitless=2", "train.global_batch_size=40000", "train.micro_batch_size=10000")
"""Far more activations than ``PART`` has memory for."""
WAYS = {
    "all steps": Way(_over, "COMPLETED 0:0", options=("train.steps=20",)),
    "scancel while it starts": Way(_cancel("elastic | SLURM job"), "CANCELLED"),
    "scancel while it waits for devices": Way(_cancel("elastic | waiting"), "CANCELLED",
                                              options=("elastic.min_devices=5",),
                                              mends=lambda s: _few_again(s)),
    "scancel while it trains": Way(_cancel(""), "CANCELLED"),
    "time limit": Way(_warn, "requeued", True, accounts="REQUEUED"),
    "time limit, slurmctld away": Way(_warn_without_slurmctld, "requeued", True, accounts="REQUEUED"),
    "time limit, slurmctld away for good": Way(_warn_until_it_gives_up, "FAILED 3:0"),
    "preempted (REQUEUE)": Way(_preempt(), "requeued", True, 1, ("--partition=low",), accounts="PREEMPTED"),
    "preempted (REQUEUE) with a grace time": Way(_preempt(), "requeued", True, 0, ("--partition=grace",),
                                                 accounts="REQUEUED"),
    "preempted (CANCEL)": Way(_preempt(), "PREEMPTED", False, 1, ("--partition=cancel",)),
    "preempted (CANCEL) with a grace time": Way(_preempt(), "requeued", True, 0, ("--partition=cancelgrace",),
                                                accounts="REQUEUED"),
    "preempted by a QOS with a grace time": Way(_preempt("--qos=urgent"), "requeued", True, 0, ("--qos=scavenger",),
                                                QUALITIES, accounts="REQUEUED"),
    "suspended and resumed": Way(_suspend, "RUNNING", True),
    "a node lost": Way(_crash(False), "RUNNING", True, 1),
    "all nodes lost, and back": Way(_crash(True), "requeued", True, 1, accounts="NODE_FAIL"),
    "a user's mistake": Way(_mistake, "FAILED 2:0", options=HELD, mends=lambda s: _change_copy(s, 100_000)),
    "an error of the program": Way(_error, "FAILED 1:0", False, 1, ("elastic.drills=true",)),
    "out of memory, one process once": Way(_grow, "RUNNING", True, 1, PART, CONTROL_GROUPS),
    "out of memory, again and again": Way(_without_memory, "FAILED 1:0", False, 0, LARGE, CONTROL_GROUPS,
                                          mends=_more_memory),
    "out of memory, the whole step": Way(_without_memory, "FAILED 1:0", False, 0, LARGE, WATCHED,
                                         mends=_more_memory),
}  # fmt: skip


def _few_again(submitted: Submitted) -> None:
    path = submitted.run / "submit.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["elastic"]["min_devices"] = 1
    path.write_text(yaml.safe_dump(tree))


def end(name: str, cluster: Cluster, corpus: Corpus) -> Ended:
    """Runs a job, ends it in this way, and starts it again where it does not go on by itself."""
    way, found = WAYS[name], Ended(name)
    submitted = Submitted(cluster, corpus, *way.options, folder=re.sub(r"\W+", "-", name))
    way.act(submitted)
    job = cluster.job(submitted.job)
    requeued = f"requeued, {job['JobState']}" if job["Restarts"] != "0" else f"{job['JobState']} {job['ExitCode']}"
    found.job, found.status, before = requeued, submitted.status(), submitted.steps()
    found.made = max(before, default=0)
    if isinstance(cluster, Accounted):
        found.accounts = cluster.accounts(submitted.job)
    if not way.goes_on:
        (way.mends or (lambda _: None))(submitted)
        submitted.again()
        if way.options == HELD:  # as its batch file says
            cluster.run(["scontrol", "release", submitted.job])
    if name == "all steps":
        _over(submitted)
        assert cluster.job(submitted.job)["JobState"] == "COMPLETED", submitted.log()
    else:
        submitted.reach(found.made + 3)
        submitted.stop()
    found.steps, found.log = submitted.steps(), submitted.log()
    found.first = found.steps[len(before)] if len(found.steps) > len(before) else 0
    return found


def bring_up(folder: Path, more: str) -> Cluster:
    """A cluster, with accounting where that is installed."""
    if accounting.why_not() is not None:
        return Cluster(folder, more=more)
    return Accounted(folder, more=more)


def prepare(cluster: Cluster, more: str) -> None:
    """Makes the qualities of service that the configuration needs."""
    if more == QUALITIES:
        for words in (
            "add qos scavenger gracetime=30 preemptmode=requeue priority=1",
            "add qos urgent priority=9",
            "modify qos urgent set preempt=scavenger",
        ):
            cluster.run(["sacctmgr", "-i", *words.split()])


def main(folder: Path, names: Sequence[str]) -> None:
    """Prints the table."""
    from tests.slurm.conftest import make_corpus

    folder.mkdir(parents=True)
    folder.chmod(0o755)
    corpus = make_corpus(folder)
    print(
        "| way | job, by scontrol | starts, by sacct -D | `llm-parallel status` | last step | next start's first step |"
    )
    print("| --- | --- | --- | --- | ---: | ---: |")
    with ExitStack() as stack:
        clusters: dict[str, Cluster] = {}
        for name in names or WAYS:
            more = WAYS[name].more
            if "lost" in name or more not in clusters:
                stack.close()
                clusters = {more: stack.enter_context(bring_up(folder / f"c{os.urandom(3).hex()}", more))}
                prepare(clusters[more], more)
            try:
                print(end(name, clusters[more], corpus).row(), flush=True)
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
                clusters = {}


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
