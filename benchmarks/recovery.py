"""Time from a fault to the next optimizer step of a real training run, by kind of fault, with the steps that it cost.

    python benchmarks/recovery.py [--rounds 3] [--save]

Four agents of one machine with one process each train a small Llama; faults come one after the other in one run, and
the losses are held against an undisturbed run's. On two cores the processes share what four devices would each have.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from llm_launch.drill import LiveRun, unix_time

RUNS = {
    "DP 4": ["parallel.dp=4"],
    "TP 2 x DP 2": ["parallel.tp=2", "parallel.dp=2"],
    "PP 2 x DP 2": ["parallel.pp=2", "parallel.dp=2"],
}
KINDS = ("kill", "stop", "agent", "node")


def prepare(folder: Path) -> Path:
    """Token files of the repository's own documents, and a run file."""
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
        "train": {"global_batch_size": 8, "threads_per_process": 1},
        "optim": {"lr": 3e-3, "min_lr": 3e-3, "schedule": "constant"},
        "log": {"tensorboard": False, "plots": False},
        "elastic": {"strikes": 1000},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(tree))
    return path


def drill(run_file: Path, folder: Path, name: str, rounds: int) -> dict[str, Any]:
    """All kinds of faults in one run of one layout."""
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
            fault_s = run.cause(kind, 1 + number % 3)
            step = run.first_step_after(fault_s)
            detected = next(e for e in run.events("detect") if unix_time(e) >= fault_s - 0.01)
            made = [record for record in run.steps() if record["step"] >= step["step"]]
            rows[kind].append(
                {
                    "detected_s": unix_time(detected) - fault_s,
                    "next_step_s": unix_time(step) - fault_s,
                    "steps_lost": sum(unix_time(r) < unix_time(step) for r in made),
                    "step_before": before,
                }
            )
        pairs = [(reference.losses()[step], loss) for step, loss in run.losses().items() if step in reference.losses()]
        worst = max(abs(a - b) for a, b in pairs)
        times = [r["perf/step_time"] for r in run.steps()]
        return {"faults": rows, "worst_loss_difference": worst, "median_step_s": statistics.median(times)}
    finally:
        run.close()


def main() -> None:
    """Drills, prints a table, and saves it where results are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/recovery_cpu_DATE.json")
    parser.add_argument("--layout", action="append", choices=list(RUNS))
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    results: dict[str, Any] = {}
    started, load = time.time(), os.getloadavg()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_file = prepare(folder)
        for layout in arguments.layout or RUNS:
            results[layout] = drill(run_file, folder, layout, arguments.rounds)
            found = results[layout]
            print(f"\n{layout}: step {found['median_step_s']:.3f} s; worst loss difference in the first 60 steps "
                  f"{found['worst_loss_difference']:.1e}")  # fmt: skip
            print("| fault | detected, median s | next step, median s (all) | steps made again, most |")
            print("| --- | --- | --- | --- |")
            for kind, rows in results[layout]["faults"].items():
                nexts = [row["next_step_s"] for row in rows]
                print(f"| {kind} | {statistics.median(row['detected_s'] for row in rows):.2f} |"
                      f" {statistics.median(nexts):.2f} ({', '.join(f'{x:.2f}' for x in nexts)}) |"
                      f" {max(row['steps_lost'] for row in rows)} |", flush=True)  # fmt: skip
    if arguments.save:
        record = {
            "command": " ".join(["python", *sys.argv]),
            "chip": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load_before": load,
            "date": date.today().isoformat(),
            "commit": subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
            ).stdout.strip(),
            "torch": torch.__version__,
            "seconds": time.time() - started,
            "results": results,
        }
        path = Path(__file__).parent / "results" / f"recovery_cpu_{date.today().isoformat()}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
