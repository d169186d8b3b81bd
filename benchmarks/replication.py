"""Measures what copying the training state into memory costs a step, in one run that copies beside every second step.

    python -m benchmarks.replication [--pairs 10] [--batch 48] [--save]

A Llama of about 100 M parameters on two nodes of this machine with one process each (DP 2). A copy is each process's
share of fp32 weights and moments into its own memory and, while the next step computes, to the other node. Copies are
made every two steps, so each step with a copy has a neighbour without one: runs of their own differ by more than a copy
costs. The seconds of a copy do not depend on the batch, so its share of a step does: 48 samples of 256 tokens are few
for such a model.
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
from llm_launch.drill import LiveRun, unix_time
from llm_parallel.bench.environment import chip_name, commit

MODEL = ["model.num_layers=12", "model.hidden_size=768", "model.ffn_hidden_size=2048", "model.num_attention_heads=12",
         "model.num_query_groups=12", "model.preset=null", "model.vocab_size=16384"]  # fmt: skip
EVERY, SEQ = 2, 256
WARMUP = 5
"""Steps that do not count: both slots of every file must have been written once, since a first write allocates
pages."""


def step_pairs(run_file: Path, folder: Path, pairs: int, batch: int) -> list[tuple[float, float]]:
    """Seconds of steps with a copy beside them, and of the steps that follow them without one."""
    last = WARMUP + EVERY * pairs
    overrides = [*MODEL, "parallel.dp=2", f"train.steps={last + 1}", f"elastic.replicate_every_steps={EVERY}",
                 f"train.global_batch_size={batch}", "train.micro_batch_size=4", f"data.seq_length_tokens={SEQ}",
                 "elastic.checksum_every_steps=0", "elastic.probe_every_steps=0",
                 "elastic.lost_after_s=20"]  # fmt: skip
    run = LiveRun.start(run_file, overrides, folder, 2, 2)
    try:
        run.reach(last, 3000.0)
        ends = {record["step"]: unix_time(record) for record in run.steps()}
    finally:
        run.close()
    seconds = {step: ends[step] - ends[step - 1] for step in range(2, last + 1)}
    # The copy of an even step is made during the odd one after it.
    return [(seconds[step], seconds[step + 1]) for step in range(WARMUP, last, EVERY)]


def main() -> None:
    """Measures, prints, and saves if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10, help="timed pairs of steps")
    parser.add_argument("--batch", type=int, default=48, help="global batch size in samples of 256 tokens")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/replication_cpu_DATE.json")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        found = step_pairs(prepare(Path(name)), Path(name) / "run", arguments.pairs, arguments.batch)
    ratios = [with_ / without - 1 for with_, without in found]
    extra = statistics.median(with_ - without for with_, without in found)
    tokens = arguments.batch * SEQ
    print(f"{tokens:,} tokens a step of {statistics.median(without for _, without in found):.2f} s: a copy "
          f"takes {extra:.2f} s, {statistics.median(ratios):+.1%} (median of {len(ratios)} neighbouring pairs, "
          f"{min(ratios):+.1%} to {max(ratios):+.1%}), on {chip_name()}, {os.cpu_count()} cores, load "
          f"{os.getloadavg()[0]:.1f}")  # fmt: skip
    if arguments.save:
        options = f"--pairs {arguments.pairs} --batch {arguments.batch}"
        record: dict[str, Any] = {
            "command": f"python -m benchmarks.replication {options} --save", "chip": chip_name(),
            "cores": os.cpu_count(), "date": date.today().isoformat(), "commit": commit(), "tokens_per_step": tokens,
            "step_s": [{"with a copy": with_, "without": without} for with_, without in found],
            "cost": statistics.median(ratios), "seconds_of_a_copy": extra,
        }  # fmt: skip
        path = Path(__file__).parent / "results" / f"replication_cpu_{date.today().isoformat()}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
