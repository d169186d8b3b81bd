"""Time from a fault to the next optimizer step of a real training run, by kind of fault, with the steps that it cost.

    python benchmarks/recovery.py [--rounds 3] [--torchrun] [--save]

Four agents of one machine with one process each train a small Llama; faults come one after the other in one run, and
the losses are compared with those of an undisturbed run. On two cores, four processes share what four devices have.
With --torchrun the same training runs under four agents of torchrun too, turn by turn: elastic mode, tuned for fast
detection, its state in a checkpoint of every step; every fault there meets a fresh job, since a node that is lost does
not come back.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch

from llm_launch.live_run import LiveRun, read_lines, unix_time
from llm_parallel.bench.environment import chip_name, commit
from llm_parallel.config.load import load_config
from llm_parallel.files import atomic_write
from llm_parallel.train.preflight import with_vocabulary
from llm_parallel.worker.command import save_config

RUNS = {
    "DP 4": ["parallel.dp=4"],
    # Larger micro batches, as anyone takes for TP: with one sample each, most of a step (0.7 to 0.9 s of it, which no
    # recovery can be faster than) is waiting for one's turn on a core to exchange activations.
    "TP 2 x DP 2": ["parallel.tp=2", "parallel.dp=2", "train.micro_batch_size=3"],
    "PP 2 x DP 2": ["parallel.pp=2", "parallel.dp=2"],
}
KINDS = ("kill", "stop", "agent", "node", "store", "two", "during", "nan")
"""Faults of elastic runs: ``store`` loses the node of rank 0, which serves the generation's store; ``two`` kills a
worker and loses another node at the same time; ``during`` kills a second worker while the run recovers from the first
fault."""
TORCHRUN_KINDS = ("kill", "node", "agent", "stop")
TORCHRUN_LIMIT_S = 60.0
# Detection after two lost heartbeats of a second, and a round that closes a second after the last node came.
RENDEZVOUS = "join_timeout=60,last_call_timeout=1,close_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=2"


def prepare(folder: Path) -> Path:
    """Writes token files of the repository's own documents, and a run file."""
    documents = [name for name in ("README.md", "CONTRIBUTING.md", "DECISIONS.md") if Path(name).exists()]
    command = [sys.executable, "-m", "llm_parallel.cli", "prepare", *documents, "--out", str(folder / "docs")]
    subprocess.run([*command, "--train-vocab", "600"], check=True, capture_output=True)
    tree: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "device": "cpu",
        "model": {"preset": "debug"},
        "data": {
            "train": [{"path": str(folder / "docs")}],
            "tokenizer": str(folder / "tokenizer.model"),
            "seq_length_tokens": 64,
            "eval_fraction": 0,
        },
        "train": {"global_batch_size": 12, "threads_per_process": 1},
        "optim": {"lr": 3e-3, "min_lr": 3e-3, "schedule": "constant"},
        "log": {"tensorboard": False, "plots": False},
        "elastic": {"strikes": 1000},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(tree))
    return path


def strike(run: LiveRun, kind: str, rank: int) -> float:
    """Causes one fault; returns its Unix time."""
    other = rank % 3 + 1
    if kind == "store":
        return run.cause("node", 0)
    if kind in ("two", "during"):
        began = run.cause("kill", rank)
        time.sleep(0.15 if kind == "during" else 0.0)
        run.cause("node" if kind == "two" else "kill", other)
        return began
    return run.cause(kind, rank, **({"left": 1} if kind == "nan" else {}))


def timings(run: LiveRun, fault_s: float) -> dict[str, float]:
    """Seconds from a fault to its detection, to the verdict, and to the next optimizer step; and steps trained
    again."""
    step = run.first_step_after(fault_s)
    detected, blamed = (
        next((unix_time(e) for e in run.events(kind) if unix_time(e) >= fault_s - 0.01), float("nan"))
        for kind in ("detect", "blame")
    )
    made = [record for record in run.steps() if record["step"] >= step["step"]]
    return {
        "detected_s": detected - fault_s,
        "blamed_s": blamed - fault_s,
        "next_step_s": unix_time(step) - fault_s,
        "steps_lost": sum(unix_time(r) < unix_time(step) for r in made),
    }


def worst_difference(reference: LiveRun, run: LiveRun) -> float:
    """Largest difference from the undisturbed run's losses over the steps of both."""
    expected = reference.losses()
    return max(abs(expected[step] - loss) for step, loss in run.losses().items() if step in expected)


def drill(run_file: Path, folder: Path, name: str, rounds: int) -> dict[str, Any]:
    """Causes all kinds of faults in one run of one layout."""
    reference = LiveRun.start(run_file, [*RUNS[name], "train.steps=60"], folder / f"{name}-undisturbed", 4, 4)
    reference.wait(600)
    run = LiveRun.start(run_file, [*RUNS[name], "train.steps=100000"], folder / name, 4, 4)
    rows: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    try:
        run.reach(10)
        for number in range(rounds * len(KINDS)):
            kind = KINDS[number % len(KINDS)]
            run.until(
                lambda: run.status().get("world_size") == 4 and run.status()["state"] == "training", 120, "4 ranks"
            )
            run.reach(run.steps()[-1]["step"] + 6)
            before = run.steps()[-1]["step"]
            fault_s = strike(run, kind, 1 + number % 3)
            rows[kind].append({**timings(run, fault_s), "step_before": before})
        worst = worst_difference(reference, run)
        times = [r["perf/step_time"] for r in run.steps()]
        return {"faults": rows, "worst_loss_difference": worst, "median_step_s": statistics.median(times)}
    finally:
        run.close()


class Torchrun:
    """Four torchrun agents with one process each, which torchrun takes for four nodes."""

    def __init__(self, run_file: Path, folder: Path, overrides: list[str]) -> None:
        self.folder = folder
        folder.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        config = load_config(run_file, [*overrides, f"run_dir={folder}", "train.steps=100000",
                                        "checkpoint.interval_steps=1", "checkpoint.keep_last=2"])  # fmt: skip
        save_config(with_vocabulary(config), folder / "config.yaml")
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:4", "--nproc-per-node=1"]  # torchrun
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--max-restarts=10"]
        command += ["--monitor-interval=0.05"]
        training = ["-m", "llm_parallel.worker", str(folder / "config.yaml")]
        # Without this variable torchrun 2.13 does not recover: its shared store keeps the lost world's addresses.
        env = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.agents = []
        for number in range(4):
            rendezvous = f"--rdzv-conf={RENDEZVOUS},is_host={int(number == 0)}"
            with (folder / f"agent{number}.log").open("w") as log:
                argv = [*command, rendezvous, *training]
                self.agents.append(subprocess.Popen(argv, env=env, stdout=log, stderr=log))

    def steps(self) -> list[dict[str, Any]]:
        """Records of the steps."""
        return [record for record in read_lines(self.folder / "metrics.jsonl") if "train/grad_norm" in record]

    def workers(self, number: int) -> list[psutil.Process]:
        """Processes of one agent."""
        return psutil.Process(self.agents[number].pid).children(recursive=True)

    def recover_s(self, kind: str) -> float | None:
        """Seconds from the fault to the next step of the process group that formed after it; None if that takes too
        long."""
        self._until(lambda: len(self.steps()) >= 8, 120.0)
        # Not the agent that serves torchrun's store: with that the job ends.
        victims = self.workers(2)
        if kind in ("node", "agent"):
            victims = [psutil.Process(self.agents[2].pid), *(victims if kind == "node" else [])]
        fault_s = time.time()
        for process in victims:
            process.suspend() if kind == "stop" else process.kill()

        def next_step() -> float | None:
            records = read_lines(self.folder / "metrics.jsonl")
            start = max((unix_time(r) for r in records if r.get("event") == "run_start"), default=0.0)
            made = (unix_time(r) for r in self.steps() if unix_time(r) > start)
            return next(made, None) if start > fault_s else None

        self._until(lambda: next_step() is not None, TORCHRUN_LIMIT_S)
        found = next_step()
        return None if found is None else found - fault_s

    def _until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.05)
        return False

    def close(self) -> None:
        """Ends every process."""
        found = [process for number in range(4) for process in self._all(number)]
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for agent in self.agents:
            agent.wait()

    def _all(self, number: int) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [*self.workers(number), psutil.Process(self.agents[number].pid)]
        marker = str(self.folder / "config.yaml")
        return [p for p in psutil.process_iter(["cmdline"]) if marker in (p.info["cmdline"] or [])]


def torchrun_drill(run_file: Path, folder: Path, name: str, rounds: int) -> dict[str, list[float | None]]:
    """Recovery times of torchrun; None where it took longer than TORCHRUN_LIMIT_S."""
    found: dict[str, list[float | None]] = {}
    # A world of three has no place for TP 2 or PP 2.
    kinds = TORCHRUN_KINDS if name == "DP 4" else ("kill",)
    overrides = [text for text in RUNS[name] if not text.startswith("parallel.dp=")]
    for kind in kinds:
        found[kind] = []
        for number in range(rounds):
            job = Torchrun(run_file, folder / f"torchrun-{name}-{kind}-{number}", overrides)
            try:
                found[kind].append(job.recover_s(kind))
            finally:
                job.close()
        shown = ", ".join(f"{x:.1f}" if x is not None else f"not within {TORCHRUN_LIMIT_S:.0f}" for x in found[kind])
        print(f"torchrun, {name}, {kind}: next step after {shown} s", flush=True)
    return found


def main() -> None:
    """Causes the faults, prints a table, and saves it under benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="keep it in benchmarks/results/recovery_cpu_DATE.json")
    parser.add_argument("--layout", action="append", choices=list(RUNS))
    parser.add_argument("--torchrun", action="store_true", help="drill torchrun's elastic mode too")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_file = prepare(folder)
        for layout in arguments.layout or RUNS:
            started, load = time.time(), os.getloadavg()
            results[layout] = drill(run_file, folder, layout, arguments.rounds)
            found = results[layout]
            print(f"\n{layout}: step {found['median_step_s']:.3f} s; worst loss difference in the first 60 steps "
                  f"{found['worst_loss_difference']:.1e}")  # fmt: skip
            print("| fault | detected, median s | blamed | next step, median s (all) | steps made again, most |")
            print("| --- | --- | --- | --- | --- |")
            for kind, rows in results[layout]["faults"].items():
                nexts = [row["next_step_s"] for row in rows]
                print(f"| {kind} | {statistics.median(row['detected_s'] for row in rows):.2f} |"
                      f" {statistics.median(row['blamed_s'] for row in rows):.2f} |"
                      f" {statistics.median(nexts):.2f} ({', '.join(f'{x:.2f}' for x in nexts)}) |"
                      f" {max(row['steps_lost'] for row in rows)} |", flush=True)  # fmt: skip
            if arguments.torchrun:
                found["torchrun_s"] = torchrun_drill(run_file, folder, layout, arguments.rounds)
                for kind, theirs in found["torchrun_s"].items():
                    if None in theirs:
                        continue
                    ours = statistics.median(row["next_step_s"] for row in found["faults"][kind])
                    print(f"{layout}, {kind}: ours is {statistics.median(theirs) / ours:.1f} times as fast", flush=True)
            if arguments.save:
                save(layout, {**found, "seconds": time.time() - started, "load_before": load})


def save(layout: str, found: dict[str, Any]) -> None:
    """Adds the faults of one layout to the day's result file."""
    path = Path(__file__).parent / "results" / f"recovery_cpu_{date.today().isoformat()}.json"
    record = json.loads(path.read_text()) if path.exists() else {"results": {}}
    record |= {
        "chip": chip_name(),
        "cores": os.cpu_count(),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
    }
    command = shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    record["results"][layout] = {"command": command, "commit": commit(), **found}
    with atomic_write(path) as handle:
        handle.write(json.dumps(record, indent=1) + "\n")
    print(path.name, flush=True)


if __name__ == "__main__":
    main()
