"""``llm-parallel bench step``: times a training step on one device and compares it with peers. layout_step.py does so
on several devices.

Each contender lives in its own process (megatron-core on a CPU needs a function mode that would slow the others, and
peaks of memory stay apart). On a CPU they take turns: every round times each of them once, in rotated order, so that
all see the same machine. On a GPU, which rarely holds them all, they come one after the other and then again in
reversed order. Ratios are medians over rounds of the same number.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_launch.local import available_cores
from llm_parallel.bench.contenders import chosen
from llm_parallel.bench.environment import crowded, environment
from llm_parallel.bench.gate import load_result, slower_than, write_result
from llm_parallel.bench.layout_step import layout_command
from llm_parallel.bench.requests import StepRequest
from llm_parallel.bench.step_request import LOSS_TOLERANCE, after_step, label, peak_of, read_request
from llm_parallel.bench.turns import Finding, one_after_the_other, taking_turns
from llm_parallel.config.rules import check_config, num_processes
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError
from llm_parallel.lines import say
from llm_parallel.metrics.peaks import Peak
from llm_parallel.model.flops import CONVENTIONS, flops_per_token, parameter_count
from llm_parallel.screen import say_next, show
from llm_parallel.train.preflight import check_kernels, expected_device

REFERENCE = "ours"
MEMORY = {
    "cuda": "torch's CUDA allocator",
    "cpu": "growth of the process's resident set over what it was before the model was built",
}


def step_command(request: StepRequest) -> int:
    """Measures, prints a table, and writes the files that were asked for. Exit status 1 if our trainer is slower than
    the baseline allows, or a contender failed. Raises UserError for what can't be measured."""
    if request.rounds < 1 or request.steps < 1:
        raise UserError(f"--rounds {request.rounds} and --steps {request.steps} must both be at least 1")
    if request.processes is not None and request.processes < 1:
        raise UserError(f"--processes {request.processes} must be at least 1")
    if request.processes != 1 and (request.processes or num_processes(read_request(request))) > 1:
        return layout_command(request)
    if request.baseline:
        load_result(request.baseline)
    load, config = os.getloadavg()[0], one_process_config(request)
    names = chosen(request.providers, config)
    tokens = config.train.global_batch_size * config.data.seq_length_tokens
    say(
        f"{parameter_count(config.model).total / 1e6:,.1f} M parameters, {config.train.precision}, {tokens:,} tokens a "
        f"step ({config.train.global_batch_size} x {config.data.seq_length_tokens}, micro batch "
        f"{config.train.micro_batch_size}); {', '.join(names)}"
    )
    measure = one_after_the_other if config.device == "cuda" else taking_turns
    findings = measure(names, config, request.rounds, request.steps, request.trace)
    peak = peak_of(config)
    rows = as_rows(findings, config, request.rounds, peak)
    result = {
        "environment": environment(),
        "crowded": crowded(1, available_cores(), load),
        "command": request.command,
        "order": "rotated each round" if config.device == "cpu" else "one after the other, twice, second time reversed",
        "mfu": {"convention": CONVENTIONS["model"], "peak": peak.describe()},
        "memory": MEMORY[config.device],
        "config": config.model_dump(mode="json"),
        "rows": rows,
    }
    show(table(result))
    if request.out:
        write_result(Path(request.out), result)
    failed = int(any(row["median_ms"] is None for row in rows))
    if request.baseline:
        failed |= slower_than(request.baseline, result, request.min_ratio)
    say_next(after_step(request))
    return failed


def one_process_config(request: StepRequest) -> RunConfig:
    """The checked configuration of one process, with device and vocabulary filled in. Raises UserError."""
    config = read_request(request)
    if num_processes(config) != 1:
        raise UserError(
            f"parallel describes {num_processes(config)} processes and --processes is 1; set parallel.tp=1 "
            "parallel.pp=1 parallel.cp=1 parallel.dp=1, or leave --processes out"
        )
    device = expected_device(config)
    check_config(config, 1, device)  # type: ignore[arg-type]
    check_kernels(config, device)
    return config.model_copy(update={"device": device})


def as_rows(findings: Mapping[str, Finding], config: RunConfig, rounds: int, peak: Peak) -> list[dict[str, Any]]:
    """A row for each contender, in the format that ``bench.gate`` compares."""
    tokens = config.train.global_batch_size * config.data.seq_length_tokens
    flops = flops_per_token(config.model, config.data.seq_length_tokens)
    reference = findings.get(REFERENCE) or next(iter(findings.values()))
    rows = []
    for name, found in findings.items():
        row: dict[str, Any] = {
            "operator": "train_step", "shape": label(config), "dtype": config.train.precision, "mode": "step",
            "provider": name, "median_ms": None, "note": found.problem or "",
        }  # fmt: skip
        if found.seconds:
            milliseconds = sorted(1e3 * value for value in found.seconds)
            median = statistics.median(milliseconds)
            rate = tokens / median * 1e3
            row |= {
                "median_ms": median, "min_ms": milliseconds[0], "max_ms": milliseconds[-1], "rounds": rounds,
                "tokens_per_s": rate, "mfu": rate * flops / 1e12 / peak.tflops if peak.tflops else None,
                "peak_mib": found.peak_bytes / 2**20, "first_losses": found.losses, "split_s": found.split,
                "seconds": found.seconds,
            }  # fmt: skip
        if found.seconds and reference.seconds:
            worst = max(abs(a - b) / abs(b) for a, b in zip(found.losses, reference.losses))
            row["loss_difference"] = worst
            if worst <= LOSS_TOLERANCE[config.train.precision]:
                pairs = zip(reference.seconds, found.seconds)
                row["ours_over_it"] = statistics.median(theirs / mine for mine, theirs in pairs)
            else:
                row["note"] = f"its loss is another ({worst:.1e}): not compared"
        rows.append(row)
    return rows


def table(result: Mapping[str, Any]) -> str:
    """Rows as Markdown, and what they were measured on."""
    where, rows = result["environment"], result["rows"]
    heads = ("contender", "tokens/s (median)", "spread", "ours / it", "MFU", "peak MiB", "loss differs by", "split")
    lines = [
        f"\nmeasured on {where['chip']}, {where['date']}, commit {where['commit']}, load "
        f"{where['load_average_1_min']}; {result['order']}",
        f"MFU: {result['mfu']['convention']}; {result['mfu']['peak']}",
        f"peak memory: {result['memory']}",
        *([f"NOTE: {result['crowded']}"] if result.get("crowded") else []),
        "| " + " | ".join(heads) + " |",
        "|" + " --- |" * len(heads),
    ]
    for row in rows:
        if row["median_ms"] is None:
            lines.append(f"| {row['provider']} | failed: {row['note']} |" + " |" * 6)
            continue
        per_ms = row["tokens_per_s"] * row["median_ms"]
        ratio = f"{row['ours_over_it']:.3f}" if "ours_over_it" in row else row["note"]
        whole = sum(row["split_s"].values())
        split = ", ".join(f"{name} {value / whole:.0%}" for name, value in row["split_s"].items())
        mfu = f"{row['mfu']:.1%}" if row["mfu"] is not None else "n/a"
        lines.append(
            f"| {row['provider']} | {row['tokens_per_s']:,.0f} | {per_ms / row['max_ms']:,.0f} to "
            f"{per_ms / row['min_ms']:,.0f} | {ratio} | {mfu} | {row['peak_mib']:,.0f} | "
            f"{row.get('loss_difference', float('nan')):.1e} | {split} |"
        )
    return "\n".join(lines)
