"""``llm-parallel bench step --processes N``: a training step of a whole layout, and where its time goes.

Ours train as ``pretrain`` does (same loop, loader, optimizer; nothing is saved). Without ``data.train`` they read
random tokens from files made for the purpose, so that reading counts too. Under data parallelism alone torch's DDP and
FSDP2 (replicas.py) run beside them.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm_launch.local import available_cores, launch_local
from llm_launch.worker import worker_environment
from llm_parallel.bench.dp_peers import chosen_in_layout
from llm_parallel.bench.environment import crowded, environment
from llm_parallel.bench.gate import load_result, slower_than, write_result
from llm_parallel.bench.requests import StepRequest
from llm_parallel.bench.step_request import LOSS_TOLERANCE, after_step, label, peak_of, read_request
from llm_parallel.config.rules import num_processes
from llm_parallel.config.tree import RunConfig
from llm_parallel.data.indexed import write_index
from llm_parallel.errors import UserError
from llm_parallel.jsonlines import read_jsonlines
from llm_parallel.lines import say
from llm_parallel.metrics.peaks import Peak
from llm_parallel.model.flops import CONVENTIONS, flops_per_token, parameter_count
from llm_parallel.parallel.layout import Layout
from llm_parallel.screen import say_next, show
from llm_parallel.train.preflight import expected_device, preflight

WARMUP_STEPS = 3
PARTS = ("compute", "tp", "cp", "dp", "pp", "bubble", "optimizer", "data", "other")
SYNTHETIC_TOKENS = 1 << 22
"""Largest number of random tokens that are written; longer runs read them again."""


def layout_command(request: StepRequest) -> int:
    """Measures, prints, writes, and compares with the baseline. Exit status 1 if slower than it allows, else that of
    the processes. Raises UserError for what can't be measured."""
    if worker_environment() is not None:
        raise UserError("bench step starts its processes itself; under srun or torchrun take bench scaling")
    if request.baseline:
        load_result(request.baseline)
    folder = Path(tempfile.mkdtemp(prefix="llm_parallel_step_"))  # kept after a crash, since the message names its logs
    try:
        processes, config = layout_config(request, folder)
    except BaseException:
        shutil.rmtree(folder)
        raise
    names, load = chosen_in_layout(request.providers, config), os.getloadavg()[0]
    layout = Layout.from_config(config, processes)
    tokens = config.train.global_batch_size * config.data.seq_length_tokens
    say(
        f"{parameter_count(config.model).total / 1e6:,.1f} M parameters, {config.train.precision}, {tokens:,} tokens a "
        f"step; {layout.describe()} on {processes} processes; {WARMUP_STEPS} steps of warm-up, "
        f"{request.rounds * request.steps} timed{', 1 traced' if request.trace else ''}; {', '.join(names)}"
    )
    peak = peak_of(config)
    jobs: dict[str, Job] = {name: Job() for name in names}
    for number, (together, rounds) in enumerate(passes(names, request.rounds, config.device)):
        at = folder / f"pass_{number}"
        status = run_jobs(request, config.model_copy(update={"run_dir": str(at)}), layout, together, rounds)
        if status:
            return status
        for name in together:
            jobs[name].add(at, name, rounds, request.steps)
    shutil.rmtree(folder)
    result = as_result(request, config, layout, jobs, peak)
    busy = layout.world_size * (config.train.threads_per_process or 1)
    result["crowded"] = crowded(busy, available_cores(), load)
    show(layout_table(result))
    if request.out:
        write_result(Path(request.out), result)
    status = slower_than(request.baseline, result, request.min_ratio) if request.baseline else 0
    say_next(after_step(request))
    return status


@dataclass
class Job:
    """What one provider's processes wrote."""

    losses: list[float] = field(default_factory=list)
    """Of the warm-up steps."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """Metrics of the timed steps."""
    rounds_s: list[float] = field(default_factory=list)
    """Wall seconds of a step, for each round."""
    processor_s: list[float] = field(default_factory=list)
    """Processor seconds of a step on rank 0, for each round."""

    def add(self, folder: Path, name: str, rounds: int, steps: int) -> None:
        """Adds what a pass of ``rounds`` rounds wrote."""
        path = folder / ("metrics.jsonl" if name == "ours" else f"{name}.jsonl")
        records = [found for found in read_jsonlines(path) if "perf/step_time" in found]
        self.losses = self.losses or [float(found["train/loss"]) for found in records[:WARMUP_STEPS]]
        self.records += records[WARMUP_STEPS : WARMUP_STEPS + rounds * steps]
        wall, processor = json.loads((folder / f"turns_{name}.json").read_text())
        self.rounds_s += wall[1 : 1 + rounds]
        self.processor_s += processor[1 : 1 + rounds]


def passes(names: Sequence[str], rounds: int, device: str) -> list[tuple[list[str], int]]:
    """Jobs that run at the same time, and the number of their rounds. On a CPU all jobs run, and take turns. A GPU
    rarely has memory for two, so they run one after the other: half of the rounds in the order given, the rest in
    reversed order."""
    if device == "cpu" or len(names) == 1:
        return [(list(names), rounds)]
    first = (rounds + 1) // 2
    found = [([name], first) for name in names] + [([name], rounds - first) for name in reversed(names)]
    return [one for one in found if one[1]]


def run_jobs(request: StepRequest, config: RunConfig, layout: Layout, names: Sequence[str], rounds: int) -> int:
    """Starts the processes of all ``names``, which write what they measure into the run folder; returns their exit
    status."""
    folder = Path(config.run_dir)
    folder.mkdir()
    plan = {
        "config": config.model_dump(mode="json"),
        "names": names,
        "ranks": layout.world_size,
        "phases": [WARMUP_STEPS, *[request.steps] * rounds, *([1] if request.trace else [])],
        "trace": str(Path(request.trace).resolve()) if request.trace else None,
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    return launch_local(
        layout.world_size * len(names),
        ["-m", "llm_parallel.bench.layout_worker", str(folder / "plan.json")],
        folder / "logs",
        at_once=layout.world_size,  # only one job computes at a time
    )


def layout_config(request: StepRequest, folder: Path) -> tuple[int, RunConfig]:
    """Number of processes and checked configuration. Evaluation, checkpoints and logs are off, and random tokens are
    written into ``folder`` if no data is named. Raises UserError."""
    config = read_request(request)
    chosen_in_layout(request.providers, config)
    if config.train.rampup is not None:
        raise UserError("train.rampup changes the batch from step to step; bench step needs train.rampup=null")
    processes = request.processes if request.processes is not None else num_processes(config)
    tree = config.model_dump()
    tree["run_dir"] = str(folder / "run")
    tree["data"] |= {"eval": (), "eval_fraction": 0.0}
    if not config.data.train:
        tree["data"] |= {"train": ({"path": str(write_random_tokens(folder / "random", config))},), "tokenizer": None}
    tree["train"] |= {"steps": WARMUP_STEPS + request.rounds * request.steps + 2, "time_limit_s": None}
    tree["checkpoint"] |= {"load": None, "interval_steps": None}
    tree["log"] |= {"interval_steps": 1, "tensorboard": False, "wandb_project": None, "prometheus_port": None,
                    "plots": False, "comm_time": True}  # fmt: skip
    config = preflight(RunConfig.model_validate(tree), processes)
    device = expected_device(config)
    if device == "cuda":
        import torch

        if processes > torch.cuda.device_count():
            raise UserError(f"{processes} processes need as many GPUs; this machine has {torch.cuda.device_count()}")
    return processes, config.model_copy(update={"device": device})


def write_random_tokens(prefix: Path, config: RunConfig) -> Path:
    """Writes token files of random tokens in documents as long as a sample, the same for the same seed."""
    assert config.model.vocab_size is not None
    length = config.data.seq_length_tokens + 1
    documents = max(2, min(config.train.global_batch_size, SYNTHETIC_TOKENS // length))
    tokens = np.random.default_rng(config.seed).integers(0, config.model.vocab_size, documents * length, dtype=np.int32)
    tokens.tofile(f"{prefix}.bin")
    with Path(f"{prefix}.idx").open("wb") as handle:
        write_index(handle.write, np.dtype(np.int32), [np.full(documents, length, np.int32)])
    return prefix


def as_result(
    request: StepRequest, config: RunConfig, layout: Layout, jobs: Mapping[str, Job], peak: Peak
) -> dict[str, Any]:
    """The result: a row for each provider in the format that ``bench.gate`` compares, and what it was measured on."""
    cores = available_cores()
    shared = config.device == "cpu" and layout.world_size * (config.train.threads_per_process or 1) > cores
    order = "in turns, rotated each round" if config.device == "cpu" else "one after the other, then reversed"
    return {
        "environment": environment(),
        "command": request.command,
        "processes": layout.world_size,
        "backend": "nccl" if config.device == "cuda" else "gloo",
        "order": order if len(jobs) > 1 else "alone",
        "oversubscribed": f"{layout.world_size} processes share {cores} cores" if shared else None,
        "mfu": {"convention": CONVENTIONS["model"], "peak": peak.describe()},
        "config": config.model_dump(mode="json"),
        "rows": [as_row(name, config, layout, jobs, peak) for name in jobs],
    }


def as_row(name: str, config: RunConfig, layout: Layout, jobs: Mapping[str, Job], peak: Peak) -> dict[str, Any]:
    """One provider's row. ``ours_over_it`` is the speed of our trainer over the provider's, from wall times of the same
    round; ``ours_over_it_processor`` is the same from rank 0's processor times, which a busy machine changes least."""
    job, ours = jobs[name], jobs.get("ours")
    seconds = [float(record["perf/step_time"]) for record in job.records]
    median = statistics.median(seconds)
    rate = config.train.global_batch_size * config.data.seq_length_tokens / median
    per_process = rate / layout.world_size
    tflops = per_process * flops_per_token(config.model, config.data.seq_length_tokens) / 1e12
    split = typical_split(job.records)
    row: dict[str, Any] = {
        "operator": "train_step", "shape": label(config), "dtype": config.train.precision, "provider": name,
        "mode": f"{layout.world_size} processes, {layout.describe()}", "median_ms": 1e3 * median,
        "min_ms": 1e3 * min(seconds), "max_ms": 1e3 * max(seconds), "steps": len(seconds), "tokens_per_s": rate,
        "tokens_per_s_per_process": per_process, "tflops_per_process": tflops,
        "mfu": tflops / peak.tflops if peak.tflops else None,
        "peak_gib_rank_0": max(float(record["memory/allocated_gib"]) for record in job.records),
        **{f"time_{part}_s": mean for part, (mean, _) in split.items()},
        **{f"time_{part}_max_s": most for part, (_, most) in split.items()}, "seconds": seconds,
        "round_seconds": job.rounds_s, "round_processor_seconds": job.processor_s, "first_losses": job.losses,
    }  # fmt: skip
    if name == "ours" or ours is None:
        return row
    row["loss_difference"] = max(abs(a - b) / abs(b) for a, b in zip(job.losses, ours.losses))
    if row["loss_difference"] > LOSS_TOLERANCE[config.train.precision]:
        return row | {"note": f"its loss is another ({row['loss_difference']:.1e}): not compared"}
    ratios = [its / mine for its, mine in zip(job.rounds_s, ours.rounds_s)]
    processor = [its / mine for its, mine in zip(job.processor_s, ours.processor_s)]
    return row | {
        "ours_over_it": statistics.median(ratios), "ours_over_it_min": min(ratios), "ours_over_it_max": max(ratios),
        "ours_over_it_by_round": ratios, "ours_over_it_processor": statistics.median(processor),
    }  # fmt: skip


def typical_split(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Seconds of the median step by part: the mean over the processes, and the largest. Where records hold the times of
    only one process, both are its own; where they hold none, as with log.comm_time=false, the result is empty.

    Medians over steps of each part, all scaled by one factor so that the means add up to the median step: medians by
    themselves do not where steps differ (30 % too much over four steps of a busy machine)."""
    found = {}
    for part in PARTS:
        own = f"time/{part}_s"
        if not all(own in record for record in records):
            return {}
        mean, most = (
            max(0.0, statistics.median(float(record.get(f"time/{part}_{kind}_s", record[own])) for record in records))
            for kind in ("mean", "max")
        )
        found[part] = (mean, most)
    whole = sum(mean for mean, _ in found.values())
    scale = statistics.median(float(record["perf/step_time"]) for record in records) / whole
    return {part: (mean * scale, most * scale) for part, (mean, most) in found.items()}


def layout_table(result: Mapping[str, Any]) -> str:
    """The rows as text for the terminal."""
    where = result["environment"]
    lines = [
        f"\nmeasured on {result['processes']} processes over {result['backend']}; {where['chip']}, {where['date']}, "
        f"commit {where['commit']}, load {where['load_average_1_min']}; {result['order']}",
        f"MFU: {result['mfu']['convention']}; {result['mfu']['peak']}",
    ]
    if result.get("crowded"):
        lines.append(f"NOTE: {result['crowded']}")
    if result["oversubscribed"]:
        lines.append(f"NOTE: {result['oversubscribed']}; waiting for a core counts as waiting for whom it delays")
    for row in result["rows"]:
        mfu = f"{row['mfu']:.1%}" if row["mfu"] is not None else "n/a"
        lines.append(
            f"{row['provider']}: step {row['median_ms']:,.1f} ms (median of {row['steps']}; {row['min_ms']:,.1f} to "
            f"{row['max_ms']:,.1f}) | {row['tokens_per_s']:,.0f} tokens/s | {row['tokens_per_s_per_process']:,.0f} a "
            f"process | MFU {mfu} | peak memory of rank 0 {row['peak_gib_rank_0']:.2f} GiB"
        )
    for row in result["rows"]:
        if "ours_over_it" in row:
            lines.append(
                f"ours / {row['provider']}, tokens/s of the same round: median {row['ours_over_it']:.3f} of "
                f"{len(row['ours_over_it_by_round'])} ({row['ours_over_it_min']:.3f} to "
                f"{row['ours_over_it_max']:.3f}); of processor time {row['ours_over_it_processor']:.3f}; losses "
                f"differ by at most {row['loss_difference']:.1e} of theirs"
            )
        elif "note" in row:
            lines.append(f"{row['provider']}: {row['note']}")
        if f"time_{PARTS[0]}_s" in row:
            lines += split_table(row)
    return "\n".join(lines)


def split_table(row: Mapping[str, Any]) -> list[str]:
    """Where a step's time goes, as Markdown."""
    lines = ["| part | mean ms | share | most ms |", "| --- | ---: | ---: | ---: |"]
    whole = sum(row[f"time_{part}_s"] for part in PARTS)
    for part in PARTS:
        seconds = row[f"time_{part}_s"]
        lines.append(
            f"| {part} | {1e3 * seconds:,.2f} | {seconds / whole:.1%} | {1e3 * row[f'time_{part}_max_s']:,.2f} |"
        )
    return lines
