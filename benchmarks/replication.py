"""What copying the training state into memory after every step costs: the same run with and without, turn by turn.

    python benchmarks/replication.py [--rounds 3] [--steps 12] [--save]

A Llama of about 100 M parameters on two nodes of this machine with one process each (DP 2). A copy is each process's
share of fp32 weights and moments into its own memory and, while the next step computes, to the other node.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.recovery import prepare
from llm_launch.drill import LiveRun
from llm_parallel.bench.environment import chip_name, commit

MODEL = ["model.num_layers=12", "model.hidden_size=768", "model.ffn_hidden_size=2048", "model.num_attention_heads=12",
         "model.num_query_groups=12", "model.preset=null", "model.vocab_size=16384"]  # fmt: skip
WARMUP = 3


def step_seconds(run_file: Path, folder: Path, every: int, steps: int) -> list[float]:
    """Seconds of each step of one run, without the first ones."""
    overrides = [*MODEL, "parallel.dp=2", f"train.steps={steps + WARMUP}", f"elastic.replicate_every_steps={every}",
                 "train.global_batch_size=8", "train.micro_batch_size=4", "data.seq_length_tokens=256",
                 "elastic.checksum_every_steps=0", "elastic.probe_every_steps=0"]  # fmt: skip
    run = LiveRun.start(run_file, overrides, folder, 2, 2)
    try:
        run.reach(steps + WARMUP - 1, 900.0)
        return [record["perf/step_time"] for record in run.steps() if record["step"] > WARMUP]
    finally:
        run.close()


def main() -> None:
    """Measures, prints, and optionally saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/replication_cpu_DATE.json")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[int, list[float]] = {0: [], 1: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_file = prepare(folder)
        for number in range(arguments.rounds):
            for every in (0, 1) if number % 2 == 0 else (1, 0):
                seconds = step_seconds(run_file, folder / f"{number}-{every}", every, arguments.steps)
                found[every].append(statistics.median(seconds))
                print(f"round {number}, copies {'after every step' if every else 'never'}: "
                      f"{found[every][-1]:.3f} s a step, load {os.getloadavg()[0]:.1f}", flush=True)  # fmt: skip
    ratios = [with_ / without - 1 for without, with_ in zip(found[0], found[1])]
    print(f"copies cost {statistics.median(ratios):+.1%} of a step, median of {len(ratios)} paired rounds "
          f"({', '.join(f'{ratio:+.1%}' for ratio in ratios)}), on {chip_name()}, {os.cpu_count()} cores")  # fmt: skip
    if arguments.save:
        record: dict[str, Any] = {
            "command": "python benchmarks/replication.py", "chip": chip_name(), "cores": os.cpu_count(),
            "date": date.today().isoformat(), "commit": commit(), "step_s": found, "cost": ratios,
        }  # fmt: skip
        path = Path(__file__).parent / "results" / f"replication_cpu_{date.today().isoformat()}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
