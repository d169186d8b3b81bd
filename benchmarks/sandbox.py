"""What a program costs in the sandbox, by mode: processor time of the worker and of who asks, and programs a second.

    python benchmarks/sandbox.py [--programs 200] [--workers 1] [--rounds 3] [--human-eval HumanEval.jsonl.gz]

A program is a function of one line with one assertion, or with ``--human-eval`` the right answers of HumanEval. The
modes take turns; median and spread over the rounds. ``unsafe`` is the same without protection.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import time
from pathlib import Path

import psutil

from llm_parallel.lines import say
from llm_parallel.tasks.sandbox import MODES, Job, Sandbox, SandboxFailed, Tested


def programs(path: Path | None, count: int) -> list[Job]:
    """The programs of one round."""
    if path is None:
        return [Tested("def same(x): return x", "assert same(1) == 1")] * count
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    return [
        Tested(
            row["prompt"] + row["canonical_solution"],
            row["test"] + "\ncheck(candidate)\n",
            row["prompt"],
            row["entry_point"],
        )
        for row in rows
    ]


def processor_s(own: psutil.Process) -> tuple[float, float]:
    """Processor-seconds of this process, and of the workers with what they have waited for."""
    mine, found = own.cpu_times(), 0.0
    for process in own.children(recursive=True):
        times = process.cpu_times()
        found += times.user + times.system + times.children_user + times.children_system
    return mine.user + mine.system, found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--human-eval", type=Path)
    options = parser.parse_args()
    jobs, own = programs(options.human_eval, options.programs), psutil.Process()
    boxes, rows = [], {}
    for mode in MODES:
        try:
            boxes.append(Sandbox(mode, workers=options.workers))
        except SandboxFailed as error:
            say(f"{mode}: {error}")
    for box in boxes:
        box.run_many(jobs[: 4 * options.workers])
        rows[box.mode] = []
    for _ in range(options.rounds):
        for box in boxes:
            begin, (mine, theirs) = time.perf_counter(), processor_s(own)
            results = box.run_many(jobs)
            wall = time.perf_counter() - begin
            mine_after, theirs_after = processor_s(own)
            wrong = [result for result in results if result.status != "passed"]
            assert not wrong, wrong[:3]
            rows[box.mode].append(
                (1e3 * (theirs_after - theirs) / len(jobs), 1e3 * (mine_after - mine) / len(jobs), len(jobs) / wall)
            )
    for name, found in rows.items():
        worker, asks, rate = zip(*found)
        spread = f"{min(worker):.2f} to {max(worker):.2f}"
        say(
            f"{name}: worker {statistics.median(worker):.2f} ({spread}) ms of a processor a program, who asks "
            f"{statistics.median(asks):.2f} ms, {statistics.median(rate):.0f} programs a second "
            f"({min(rate):.0f} to {max(rate):.0f})"
        )
    for box in boxes:
        box.close()


if __name__ == "__main__":
    main()
