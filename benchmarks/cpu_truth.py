"""Compares the planner with real runs on this machine's CPU: calibrated on one process, it predicts layouts of several.

    python benchmarks/cpu_truth.py [--folder runs/cpu_truth] [--save]

``bench comm`` (2 and 4 processes over gloo) and one-process ``bench step`` runs calibrate a description of this machine
(``plan --calibrate``); then every layout of ``LAYOUTS`` is predicted, and run by ``bench scaling``, one by one. No time
of a layout enters the calibration. What is already in the folder is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import spearmanr

from llm_parallel.bench.environment import environment
from llm_parallel.config.tree import RunConfig
from llm_parallel.planner.calibrate import calibrate_command
from llm_parallel.planner.hardware import load_cluster
from llm_parallel.planner.shapes import shape_of, strategy_of
from llm_parallel.planner.steptime import step_time

RESULTS = Path(__file__).parent / "results"
MODEL = {
    "num_layers": 8, "hidden_size": 256, "ffn_hidden_size": 768, "num_attention_heads": 8, "num_query_groups": 8,
    "head_dim": 32, "max_seq_length_tokens": 256,
}  # fmt: skip
SEQ, BATCH, VOCAB = 256, 8, 4096
STEPS, WARMUP = 9, 3
COLLECTIVES, SIZES = "all_reduce,all_gather,reduce_scatter,send_recv", "64,4K:16M:8"
TRIES, MOST_FOREIGN = 2, 0.05
"""How often a measurement is repeated while other programs take more than that share of the cores; then it is kept."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "1 process": {},
    "TP 2": {"tp": 2, "sequence_parallel": False},
    "TP 2 + SP": {"tp": 2},
    "TP 4": {"tp": 4, "sequence_parallel": False},
    "TP 4 + SP": {"tp": 4},
    "PP 2": {"pp": 2},
    "PP 4": {"pp": 4},
    "PP 2 x VPP 2": {"pp": 2, "vpp": 2},
    "CP 2": {"cp": 2},
    "DP 2": {"dp": 2},
    "DP 4": {"dp": 4},
    "DP 8": {"dp": 8},
    "TP 2 x PP 2": {"tp": 2, "pp": 2},
    "DP 2 x CP 2": {"dp": 2, "cp": 2},
    "TP 2 x PP 2 x DP 2": {"tp": 2, "pp": 2, "dp": 2},
}
ALONE: dict[str, list[str]] = {
    "whole": [],
    "half": ["model.num_attention_heads=4", "model.num_query_groups=4", "model.ffn_hidden_size=384"],
    "short": ["data.seq_length_tokens=128"],
    "shallow": ["model.num_layers=4"],
}
"""One-process steps to calibrate on: matrix products half as wide, samples half as long, half the layers. Two processes
that run the first one at the same time show how much the cores slow each other."""


def run(*commands: Sequence[str]) -> float:
    """Runs commands at the same time, with one thread for each process; raises SystemExit if one fails.

    Returns the share of the cores that other programs used meanwhile."""
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    began, busy, mine = time.monotonic(), _busy_s(), _children_s()
    started = [
        subprocess.Popen([sys.executable, "-m", "llm_parallel.cli", *command], env={**os.environ, **threads},
                         stdin=subprocess.DEVNULL)
        for command in commands
    ]  # fmt: skip
    for process in started:
        if process.wait():
            sys.exit(f"{process.args} ended with status {process.returncode}")
    whole = (time.monotonic() - began) * (os.cpu_count() or 1)
    return max(0.0, _busy_s() - busy - (_children_s() - mine)) / whole


def _busy_s() -> float:
    """Seconds that all cores have been busy since the machine started."""
    user, nice, system, _, _, irq, soft = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def quiet(made: Sequence[Path], *commands: Sequence[str]) -> None:
    """Runs commands that make files unless these exist, and again if other programs used too much of the machine."""
    if all(path.exists() for path in made):
        return
    for attempt in range(TRIES):
        share = run(*commands)
        print(f"{made[0].name}: others used {share:.0%} of the cores", flush=True)
        made[0].with_suffix(".others").write_text(f"{share:.3f}")
        if share <= MOST_FOREIGN:
            return
        if attempt < TRIES - 1:
            for path in made:
                path.unlink()
    print(f"{made[0].name} was measured on a busy machine {TRIES} times; the last is kept")


def prepare(folder: Path) -> Path:
    """A run file of the model on tokens of this machine's Python library, in ``folder``."""
    run_file = folder / "run.yaml"
    if run_file.exists():
        return run_file
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text"
    text.mkdir(exist_ok=True)
    for source in sorted(Path(os.__file__).parent.glob("[a-p]*.py")):
        (text / f"{source.stem}.txt").write_text(source.read_text(encoding="utf-8", errors="ignore"))
    run(["prepare", str(text), "--out", str(folder / "tokens"), "--train-vocab", str(VOCAB), "--workers", "1"])
    tree = {
        "run_dir": str(folder / "run"),
        "device": "cpu",
        "model": {**MODEL, "vocab_size": VOCAB},
        "data": {"train": [str(folder / "tokens")], "seq_length_tokens": SEQ},
        "train": {"global_batch_size": BATCH, "micro_batch_size": 1, "steps": STEPS, "threads_per_process": 1},
        "optim": {"lr": 1e-3},
    }
    run_file.write_text(yaml.safe_dump(tree))
    return run_file


def measure_alone(folder: Path, run_file: Path) -> list[Path]:
    """Results of bench comm and of one-process steps."""
    found = []
    for ranks in (2, 4):
        path = folder / f"comm{ranks}"
        found.append(path.with_suffix(".json"))
        quiet(found[-1:], ["bench", "comm", "--processes", str(ranks), "--ops", COLLECTIVES, "--sizes", SIZES,
                           "--out", str(path)])  # fmt: skip
    for name, changes in ALONE.items():
        path = folder / f"step_{name}"
        found.append(path.with_suffix(".json"))
        quiet(found[-1:], _step(run_file, changes, path))
    pair = [folder / "step_beside_1", folder / "step_beside_2"]
    found += [path.with_suffix(".json") for path in pair]
    quiet(found[-2:], *(_step(run_file, [], path) for path in pair))
    for path in found[-2:]:
        path.write_text(json.dumps({**json.loads(path.read_text()), "processes_beside": len(pair) - 1}, indent=1))
    return found


def _step(run_file: Path, changes: Sequence[str], out: Path) -> list[str]:
    return ["bench", "step", str(run_file), *changes, "--providers", "ours", "--rounds", "7", "--steps", "1",
            "--out", str(out)]  # fmt: skip


def measure_layouts(folder: Path) -> list[dict[str, str]]:
    """A row of bench scaling for every layout."""
    changes = [{f"parallel.{name}": value for name, value in layout.items()} for layout in LAYOUTS.values()]
    tree = {"base": "run.yaml", "steps": STEPS, "warmup": WARMUP, "repeats": 1, "series": {"layouts": changes}}
    sweep = folder / "sweep.yaml"
    sweep.write_text(yaml.safe_dump(tree))
    rows = []
    for index in range(len(LAYOUTS)):
        out = folder / f"layout_{index}.csv"
        quiet([out], ["bench", "scaling", str(sweep), "--index", str(index), "--out", str(out)])
        with out.open(newline="") as handle:
            rows += list(csv.DictReader(handle))
    return rows


def compare(folder: Path, alone: Sequence[Path], rows: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Calibrates, predicts every layout, and compares that with what was measured."""
    description = folder / "machine.yaml"
    calibrate_command([str(path) for path in alone], None, str(description))
    cluster = load_cluster(str(description))
    found = []
    for index, (name, row) in enumerate(zip(LAYOUTS, rows, strict=True)):
        config = RunConfig.model_validate_json(row["config"])
        time_ = step_time(shape_of(config.model), strategy_of(config, int(row["world_size"])), cluster)
        measured = float(row["step_time_s"])
        found.append({
            "layout": name, "processes": int(row["world_size"]), "predicted_s": time_.total, "measured_s": measured,
            "measured_min_s": float(row["step_time_min_s"]), "measured_max_s": float(row["step_time_max_s"]),
            "others_share_of_cores": float((folder / f"layout_{index}.others").read_text()),
            "error": time_.total / measured - 1, "predicted_parts_s": time_.parts(),
        })  # fmt: skip
    several = [item for item in found if item["processes"] > 1]
    errors = [item["error"] for item in several]
    return {
        "environment": environment(),
        "command": "python benchmarks/cpu_truth.py --save",
        "model": {**MODEL, "vocab_size": VOCAB},
        "work": {"global_batch": BATCH, "micro_batch": 1, "seq": SEQ, "precision": "fp32", "threads_per_process": 1},
        "measured": f"median step of {STEPS - WARMUP} after {WARMUP}, real pretrain runs over gloo, one by one",
        "calibrated_on": "bench comm of 2 and 4 processes and one-process bench steps; of no layout",
        "description": yaml.safe_load(description.read_text()),
        "layouts": found,
        "mape": statistics.mean(map(abs, errors)),
        "bias": statistics.mean(errors),
        "rank_correlation": float(
            spearmanr([item["predicted_s"] for item in several], [item["measured_s"] for item in several]).statistic
        ),
    }


def table(result: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    where = result["environment"]
    lines = [
        f"{where['chip']}, {where['cores']} cores, {where['date']}, commit {where['commit']}; {result['measured']}",
        f"calibrated on {result['calibrated_on']}",
        "| layout | processes | predicted s | measured s (min to max) | error | others' share of cores |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {item['layout']} | {item['processes']} | {item['predicted_s']:.3f} | {item['measured_s']:.3f} "
        f"({item['measured_min_s']:.3f} to {item['measured_max_s']:.3f}) | {item['error']:+.1%} | "
        f"{item['others_share_of_cores']:.0%} |"
        for item in result["layouts"]
    ]
    lines.append(
        f"{len(result['layouts']) - 1} layouts of several processes: mean absolute error {result['mape']:.1%}, bias "
        f"{result['bias']:+.1%}, rank correlation {result['rank_correlation']:.3f}"
    )
    return "\n".join(lines)


def main() -> None:
    """Measures what the folder lacks, compares, and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/cpu_truth"))
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/cpu_truth_DATE.json")
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    run_file = prepare(folder)
    result = compare(folder, measure_alone(folder, run_file), measure_layouts(folder))
    print(table(result))
    if asked.save:
        out = RESULTS / f"cpu_truth_{date.today()}.json"
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {out}")


if __name__ == "__main__":
    main()
