"""Bring-up and recovery under a real Slurm of four nodes on this machine, beside torchrun under srun and plain srun.

    python -m benchmarks.slurm_times [--rounds 3] [--save]

Bring-up is the time from the moment in which a held job is released to its first optimizer step. Then a process of one
node is killed, and later everything on another node; recovery is the time from the kill to the next step of the process
group that formed after it. Every contender trains the same model on the same data with the same batch, one process a
node. torchrun has a checkpoint after every step and the settings of ``benchmarks/recovery.py`` with which it recovers
fastest; plain srun starts one ``llm-parallel pretrain`` a node and has no recovery. Rounds are interleaved.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import statistics
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measured_on import measured_on, sentence
from benchmarks.recovery import RENDEZVOUS
from llm_launch.live_run import read_lines, unix_time
from llm_parallel.config.load import load_config
from llm_parallel.train.preflight import preflight
from llm_parallel.worker.command import save_config
from tests.slurm.cluster import Cluster, why_not
from tests.slurm.conftest import make_corpus
from tests.support.commands import Corpus, write_run_file

RESULTS = Path(__file__).parent / "results"
NODES = 4
STEPS_BETWEEN = 10
LIMIT_S = 60.0
"""What takes longer is not waited for, unless ``--limit-s`` says so."""
Times = dict[str, float | None]


class Job(ABC):
    """One job of a contender, from its release to its end."""

    recovers = True

    def __init__(self, cluster: Cluster, corpus: Corpus, name: str, limit_s: float) -> None:
        self.cluster, self.folder, self.limit_s = cluster, cluster.folder / name, limit_s
        sections: dict[str, Any] = {
            "parallel": {"dp": NODES},
            "data": {"eval_fraction": 0.0, "seq_length_tokens": 64},
            "train": {"steps": 100_000, "global_batch_size": 3 * NODES},
            "optim": {"schedule": "constant"},
        }
        self.run_file = write_run_file(corpus, self.folder, **sections | self.sections())
        self.number = self.submit()

    def sections(self) -> dict[str, Any]:
        """What its run file says beside the others'."""
        return {}

    def submit(self) -> str:
        """Hands it to Slurm on hold; its number."""
        script = self.folder / "job.sh"
        script.write_text(f"#!/bin/bash\n{self.script()}\n")
        options = [f"--nodes={NODES}", "--ntasks-per-node=1", "--exclusive", "--no-kill", "--no-requeue", "--hold"]
        return self.cluster.run(["sbatch", "--parsable", *options, f"--output={self.folder}/log", str(script)])

    @abstractmethod
    def script(self) -> str:
        """Of its batch job."""

    @property
    def records(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "run" / "metrics.jsonl")

    def steps(self) -> list[float]:
        """Unix times of the steps so far."""
        return [unix_time(record) for record in self.records if "train/loss" in record]

    def bring_up_s(self) -> float | None:
        """From its release to its first step."""
        begin = time.time()
        self.cluster.run(["scontrol", "release", self.number])
        return self.waited(lambda: next(iter(self.steps()), None), begin)

    def next_step_s(self, strike: Callable[[], None]) -> float | None:
        """From a fault to the next step of the process group that formed after it."""
        before = len(self.steps())
        if self.waited(lambda: 1.0 if len(self.steps()) >= before + STEPS_BETWEEN else None, 0.0) is None:
            return None
        fault_s = time.time()
        strike()

        def found() -> float | None:
            starts = [unix_time(record) for record in self.records if record.get("event") == "run_start"]
            formed = max((start for start in starts if start > fault_s), default=None)
            return None if formed is None else next((at for at in self.steps() if at > formed), None)

        return self.waited(found, fault_s)

    def waited(self, found: Callable[[], float | None], begin: float) -> float | None:
        """The time that ``found`` gives, after ``begin``; None if it gives none within the limit."""
        deadline = time.monotonic() + self.limit_s
        while (at := found()) is None:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.02)
        return at - begin

    def workers(self, node: str) -> list[psutil.Process]:
        """Its processes on a node that train."""
        found = []
        for process in self.cluster.tasks():
            with suppress(psutil.Error):
                if process.environ().get("SLURMD_NODENAME") == node and self.trains(process):
                    found.append(process)
        return found

    def trains(self, process: psutil.Process) -> bool:
        """Whether a process of its job on a node is one that trains."""
        return "llm_parallel.worker" in process.cmdline()

    def kill_worker(self, node: str) -> None:
        """Kills what trains on one node; its parent lives."""
        victims = self.workers(node)
        if not victims:
            raise RuntimeError(f"nothing trains on {node}; see {self.folder}")
        for process in victims:
            process.kill()

    def end(self) -> None:
        """Cancels it, and waits until its nodes are free."""
        self.cluster.run(["scancel", self.number])
        self.cluster.wait_for_nodes(NODES, ("idle",))


class Ours(Job):
    """``llm-parallel submit``."""

    def submit(self) -> str:
        options = ["--nodes", str(NODES), "--gpus-per-node", "0", "--sbatch=--hold"]
        command = [sys.executable, "-m", "llm_parallel.cli", "submit", str(self.run_file), *options]
        return self.cluster.run(command, timeout_s=300).split("job ", 1)[1].split(";")[0]

    def trains(self, process: psutil.Process) -> bool:
        parent = process.parent()
        here = "llm_launch.zygote" in process.cmdline()
        return here and parent is not None and "llm_launch.zygote" in parent.cmdline()


class Torchrun(Job):
    """An agent of torchrun on each node, by srun."""

    def sections(self) -> dict[str, Any]:
        # As many replicas as there are processes: a world of torchrun begins and goes on with those that are there.
        return {"checkpoint": {"interval_steps": 1, "keep_last": 2}, "parallel": {"dp": None}}

    def script(self) -> str:
        config = self.folder / "run" / "config.yaml"
        config.parent.mkdir()
        save_config(preflight(load_config(self.run_file, [], notice=lambda _: None)), config)
        program = [sys.executable, "-m", "torch.distributed.run"]  # torchrun, which may stand in another environment
        command = [f"--nnodes=1:{NODES}", "--nproc-per-node=1"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{_free_port()}", "--max-restarts=10"]
        command += ["--monitor-interval=0.05", "-m", "llm_parallel.worker", str(config)]
        hosts = f"--rdzv-conf={RENDEZVOUS},is_host=$((SLURM_PROCID == 0))"
        inner = f"exec {shlex.join(program)} {hosts} {shlex.join(command)}"
        # Without this variable torchrun 2.13 does not recover: its shared store keeps the lost world's addresses.
        return f"export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1\nsrun --no-kill bash -c {shlex.quote(inner)}"


class Srun(Job):
    """One process a node, by srun alone."""

    recovers = False

    def script(self) -> str:
        place = f"RANK=$SLURM_PROCID LOCAL_RANK=0 WORLD_SIZE={NODES} LOCAL_WORLD_SIZE=1"
        store = f"MASTER_ADDR=127.0.0.1 MASTER_PORT={_free_port()}"
        command = shlex.join([sys.executable, "-m", "llm_parallel.cli", "pretrain", str(self.run_file)])
        return f"srun bash -c {shlex.quote(f'{place} {store} exec {command}')}"


CONTENDERS: dict[str, type[Job]] = {
    "llm-parallel submit": Ours, "torchrun under srun": Torchrun, "pretrain under srun": Srun,
}  # fmt: skip
KINDS = ("bring-up", "process killed", "node lost")


def measure(cluster: Cluster, corpus: Corpus, name: str, number: int, limit_s: float) -> Times:
    """One round of one contender."""
    job = CONTENDERS[name](cluster, corpus, f"{CONTENDERS[name].__name__.lower()}-{number}", limit_s)
    try:
        found: Times = {KINDS[0]: job.bring_up_s()}
        if job.recovers and found[KINDS[0]] is not None:
            found[KINDS[1]] = job.next_step_s(lambda: job.kill_worker("n3"))
            found[KINDS[2]] = job.next_step_s(lambda: cluster.crash("n4"))
            cluster.boot("n4")
        return found
    finally:
        job.end()


def table(rows: dict[str, list[Times]]) -> str:
    """Medians and ranges, a line for each contender."""
    lines = [f"| contender | {' | '.join(f'{kind}, s' for kind in KINDS)} |", "| --- |" + " ---: |" * len(KINDS)]
    for name, rounds in rows.items():
        cells = [_cell([times[kind] for times in rounds if kind in times]) for kind in KINDS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not values:
        return "not measured"
    if not known:
        return "none within the limit"
    missing = f", {len(values) - len(known)} of {len(values)} not within the limit" if len(known) < len(values) else ""
    return f"{statistics.median(known):.2f} ({min(known):.2f} to {max(known):.2f}{missing})"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Prints the table and what it was measured on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", choices=list(CONTENDERS), help="may be given often")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="seconds after which a time is not waited for")
    parser.add_argument("--save", action="store_true", help="write a file under benchmarks/results")
    asked = parser.parse_args()
    if (reason := why_not()) is not None:
        raise SystemExit(f"this machine cannot have a Slurm: {reason}")
    os.environ["OMP_NUM_THREADS"] = "1"
    rows: dict[str, list[Times]] = {name: [] for name in asked.only or CONTENDERS}
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        corpus = make_corpus(folder)
        with Cluster(folder / "c", nodes=NODES) as cluster:
            for number in range(asked.rounds):
                for name, rounds in rows.items():
                    rounds.append(measure(cluster, corpus, name, number, asked.limit_s))
                    print(f"round {number + 1}, {name}: {rounds[-1]}", file=sys.stderr, flush=True)
    print(f"{table(rows)}\n\n{sentence('megatron-core')}")
    if asked.save:
        path = RESULTS / f"slurm_times_{datetime.now():%Y-%m-%d}.json"
        path.write_text(json.dumps({**measured_on("megatron-core"), "rounds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
