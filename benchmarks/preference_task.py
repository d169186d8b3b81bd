"""What every method of learning from preferences and rewards makes of the four-digit task, and what it costs.

A model of 115,008 parameters is fine-tuned on answers of annotators of whom three in ten are right. Each method then
begins with it: dpo, kto and rrhf from 640 questions with 4 sampled and judged answers each, the others in rounds of
questions that they have not seen. Given is the share of right sampled answers to 200 held-out questions, its mean over
the seeds with the standard error of that mean, and the processor time of training (for a method in rounds with
generation and judging), summed over the processes.

    .venv/bin/python benchmarks/preference_task.py [--methods dpo kto rrhf reject grpo ppo] [--seeds 0 1 2]
        [--layouts "one process" "TP2 PP2"] [--out FILE.md]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measured_on import sentence  # noqa: E402
from tests.support.preference_task import LAYOUTS, SETTINGS, fine_tuned, tune  # noqa: E402


def measured(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """The table's lines."""
    tuned, before = fine_tuned(folder / "sft")
    lines = [
        "| method | layout | before | mean | standard error | each seed | processor-seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind in arguments.methods:
        for layout in arguments.layouts:
            shares, seconds = [], []
            for seed in arguments.seeds:
                setting, place = SETTINGS[kind], folder / f"{kind}-{layout}-{seed}"
                right, spent = tune(kind, setting, layout, seed, tuned, place)
                shares.append(right)
                seconds.append(sum(spent))
            error = f"{stdev(shares) / len(shares) ** 0.5:.3f}" if len(shares) > 1 else "none of one seed"
            listed = ", ".join(f"{share:.3f}" for share in shares)
            lines.append(
                f"| {kind} | {layout} | {before:.3f} | {mean(shares):.3f} | {error} | {listed} | {mean(seconds):.1f} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
    return lines


def main() -> None:
    """Measures, and prints the table after what the runs say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        lines = measured(arguments, Path(folder))
    text = "\n".join([*lines, "", sentence()]) + "\n"
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
