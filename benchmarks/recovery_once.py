"""Faults that a run meets once: time to the next optimizer step or to its end, steps lost, and losses beside the
undisturbed run's.

    python -m benchmarks.recovery_once [--rounds 3] [--kind flip …] [--save]

What ``recovery.py`` causes again and again in one run leaves the devices in place. Here each fault has runs of its own
(DP 4, four agents of one machine): a flipped bit and a device at a fifth of its speed, which are removed; the same
exception in every process, which ends the run; SIGTERM, the time limit, and a lost launcher with a damaged newest
checkpoint on the disk, without and with the loss of memory, after each of which a second start goes on.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.recovery import prepare, save, timings, worst_difference
from llm_launch.drill import LiveRun, unix_time
from llm_launch.vault import forget_run
from llm_parallel.config.tree import ElasticConfig
from llm_parallel.errors import EXIT_STOPPED

STEPS = 60
FAULT_AT = 20
LAYOUT = "parallel.dp=4"
Start = Callable[..., LiveRun]
Row = dict[str, Any]


def removed(kind: str, overrides: tuple[str, ...], start: Start, reference: LiveRun, rank: int) -> Row:
    """A fault after which the device must leave the run."""
    run = start(LAYOUT, "train.steps=100000", "elastic.strikes=2", *overrides)
    run.reach(FAULT_AT)
    device = list(run.worker(rank)[:2])
    found = timings(run, run.cause(kind, rank, **({"left": 1} if kind == "flip" else {})))
    run.until(lambda: run.events("remove"), 120.0, "the removal")
    run.reach(STEPS, 300.0)
    run.stop()
    status = run.wait()
    right = [[e["node"], e["device"]] for e in run.events("remove")] == [device]
    return {**found, "status": status, "right_device": right, "loss_difference": worst_difference(reference, run)}


def mistake(start: Start, reference: LiveRun, rank: int) -> Row:
    """The same exception in every process."""
    run = start(LAYOUT)
    run.reach(FAULT_AT)
    at = run.steps()[-1]["step"] + 5
    for each in range(4):
        run.cause("raise", each, from_step=at)
    run.until(lambda: run.steps()[-1]["step"] >= at, 60.0, f"step {at}")
    raised = unix_time(run.steps()[-1])
    status = run.wait(60.0)
    traced = "DrillError" in (run.run_dir / "launch.log").read_text()
    return {"ended_s": time.time() - raised, "status": status, "right_device": not run.events("remove") and traced,
            "loss_difference": worst_difference(reference, run)}  # fmt: skip


def second_start(how: str, start: Start, reference: LiveRun, rank: int) -> Row:
    """A fault that ends the first start, after which a second start resumes the run."""
    damaged = how.startswith("damaged")
    disk = ["checkpoint.interval_steps=10"] if damaged else []
    limit = ["train.time_limit_s=20", "train.steps=100000"] if how == "time limit" else []
    run = start(LAYOUT, *disk, *limit)
    ended: Row = {}  # how long an end took is known where it was asked for
    if damaged:
        run.until((run.run_dir / "checkpoints" / f"iter_{FAULT_AT:07d}").exists, 120.0, "a second checkpoint")
        run.process.kill()
        run.process.wait()
        damage(max((run.run_dir / "checkpoints").glob("iter_???????")))
        if how == "damaged, memory lost":  # as after a power cut of all nodes
            forget_run(Path(ElasticConfig().replica_dir), run.run_dir)
    else:
        if how == "SIGTERM":
            run.reach(FAULT_AT)
            run.stop()
        began = time.time()
        assert run.wait() == EXIT_STOPPED
        ended = {"ended_s": time.time() - began} if how == "SIGTERM" else {}
    before, began = run.steps()[-1]["step"], time.time()
    again = start(LAYOUT, *disk, f"train.steps={max(STEPS, before + 20)}", name=run.run_dir.name)
    first = again.until(lambda: next((r for r in again.steps() if unix_time(r) > began), None), 120.0, "a step")
    status = again.wait()
    return {**ended, "next_step_s": unix_time(first) - began, "steps_lost": before + 1 - first["step"],
            "status": status, "right_device": not again.events("remove"),
            "loss_difference": worst_difference(reference, again)}  # fmt: skip


def damage(folder: Path) -> None:
    """Flips one bit of the largest file."""
    path = max(folder.glob("*.distcp"), key=lambda found: found.stat().st_size)
    with path.open("r+b") as handle:
        handle.seek(path.stat().st_size // 2)
        byte = handle.read(1)[0]
        handle.seek(-1, os.SEEK_CUR)
        handle.write(bytes([byte ^ 16]))


KINDS: dict[str, Callable[[Start, LiveRun, int], Row]] = {
    "flip": partial(removed, "flip", ("elastic.checksum_every_steps=1",)),
    "slow": partial(removed, "slow", ("elastic.probe_every_steps=2",)),
    "mistake everywhere": mistake,
    "SIGTERM": partial(second_start, "SIGTERM"),
    "time limit": partial(second_start, "time limit"),
    "damaged": partial(second_start, "damaged"),
    "damaged, memory lost": partial(second_start, "damaged, memory lost"),
}


def main() -> None:
    """Causes the faults, prints a table, and saves it under benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kind", action="append", choices=list(KINDS))
    parser.add_argument("--save", action="store_true", help="keep it in benchmarks/results/recovery_cpu_DATE.json")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_file = prepare(folder)
        runs: list[LiveRun] = []

        def start(*overrides: str, name: str = "") -> LiveRun:
            steps = [] if any(text.startswith("train.steps=") for text in overrides) else [f"train.steps={STEPS}"]
            runs.append(LiveRun.start(run_file, [*overrides, *steps], folder / (name or f"run{len(runs)}"), 4, 4))
            return runs[-1]

        reference = start(LAYOUT)
        reference.wait(600)
        print(
            "| fault | seconds to detection, verdict, next step, end | steps lost | loss difference | as it has to be |"
        )
        print("| --- | --- | --- | --- | --- |")
        for kind in arguments.kind or KINDS:
            rows[kind] = []
            for number in range(arguments.rounds):
                rows[kind].append(KINDS[kind](start, reference, 1 + number % 3))
                for run in runs[1:]:
                    run.close()
            print(f"| {kind} | {_medians(rows[kind])} | {max(row.get('steps_lost', 0) for row in rows[kind])} |"
                  f" {max(row['loss_difference'] for row in rows[kind]):.1e} | {_right(kind, rows[kind])} |",
                  flush=True)  # fmt: skip
    if arguments.save:
        save(f"one fault a run, DP 4: {', '.join(rows)}", {"faults": rows})


def _medians(rows: list[Row]) -> str:
    shown = []
    for name in ("detected_s", "blamed_s", "next_step_s", "ended_s"):
        values = [row[name] for row in rows if name in row]
        shown.append(f"{statistics.median(values):.2f}" if values else "-")
    return ", ".join(shown)


def _right(kind: str, rows: list[Row]) -> str:
    wanted = 1 if kind == "mistake everywhere" else 0
    good = sum(row["right_device"] and row["status"] == wanted for row in rows)
    return f"{good} of {len(rows)}"


if __name__ == "__main__":
    main()
