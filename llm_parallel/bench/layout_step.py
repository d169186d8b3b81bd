"""``llm-parallel bench step --processes N``: a training step of a whole layout, and where its time goes.

The processes train as ``pretrain`` does (same loop, loader, optimizer; nothing is saved). Without ``data.train`` they
read random tokens from files made for the purpose, so that reading counts too.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_launch.local import available_cores, launch_local
from llm_launch.worker import worker_environment
from llm_parallel.bench.environment import environment
from llm_parallel.bench.gate import load_result, slower_than
from llm_parallel.bench.step import Request, label, peak_of, read_request, write_result
from llm_parallel.config.rules import num_processes
from llm_parallel.config.tree import RunConfig
from llm_parallel.data.indexed import write_index
from llm_parallel.errors import UserError
from llm_parallel.metrics.jsonlines import read_jsonlines
from llm_parallel.metrics.peaks import Peak
from llm_parallel.model.flops import CONVENTIONS, flops_per_token, parameter_count
from llm_parallel.parallel.layout import Layout
from llm_parallel.train.preflight import expected_device, preflight

WARMUP_STEPS = 3
PARTS = ("compute", "tp", "cp", "dp", "pp", "bubble", "optimizer", "data", "other")
SYNTHETIC_TOKENS = 1 << 22
"""At most so many random tokens are written; longer runs read them again."""


def layout_command(request: Request) -> int:
    """Measures, prints, writes and gates. Exit status 1 if slower than the baseline allows, else that of the processes.
    Raises UserError for what can't be measured."""
    if worker_environment() is not None:
        raise UserError("bench step starts its processes itself; under srun or torchrun take bench scaling")
    if request.baseline:
        load_result(request.baseline)
    folder = Path(tempfile.mkdtemp(prefix="llm_parallel_step_"))  # kept after a crash: the message names its logs
    try:
        processes, config = layout_config(request, folder)
    except BaseException:
        shutil.rmtree(folder)
        raise
    layout = Layout.from_config(config, processes)
    timed = request.rounds * request.steps
    tokens = config.train.global_batch_size * config.data.seq_length_tokens
    print(
        f"{parameter_count(config.model).total / 1e6:,.1f} M parameters, {config.train.precision}, {tokens:,} tokens a "
        f"step; {layout.describe()} on {processes} processes; {WARMUP_STEPS} steps of warm-up, {timed} timed"
        f"{', 1 traced' if request.trace else ''}",
        flush=True,
    )
    peak = peak_of(config)
    steps = WARMUP_STEPS + timed + bool(request.trace)
    trace = str(Path(request.trace).resolve()) if request.trace else None
    plan = {"config": config.model_dump(mode="json"), "steps": steps, "trace": trace}
    (folder / "plan.json").write_text(json.dumps(plan))
    status = launch_local(
        processes, ["-m", "llm_parallel.bench.layout_worker", str(folder / "plan.json")], folder / "logs"
    )
    if status:
        return status
    records = [found for found in read_jsonlines(Path(config.run_dir) / "metrics.jsonl") if "perf/step_time" in found]
    shutil.rmtree(folder)
    result = as_result(request, config, layout, records[WARMUP_STEPS : WARMUP_STEPS + timed], peak)
    print(layout_table(result))
    if request.out:
        write_result(Path(request.out), result)
    return slower_than(request.baseline, result, request.min_ratio) if request.baseline else 0


def layout_config(request: Request, folder: Path) -> tuple[int, RunConfig]:
    """Number of processes and checked configuration, with all that a measurement must not do switched off and random
    tokens in ``folder`` where no data is named. Raises UserError."""
    if request.providers and list(request.providers) != ["ours"]:
        raise UserError(f"--providers {','.join(request.providers)}: only ours runs in layouts of several processes")
    config = read_request(request)
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
    """Token files of random words in documents of a sample's length; the same for the same seed."""
    assert config.model.vocab_size is not None
    length = config.data.seq_length_tokens + 1
    documents = max(2, min(config.train.global_batch_size, SYNTHETIC_TOKENS // length))
    words = np.random.default_rng(config.seed).integers(0, config.model.vocab_size, documents * length, dtype=np.int32)
    words.tofile(f"{prefix}.bin")
    with Path(f"{prefix}.idx").open("wb") as handle:
        write_index(handle.write, np.dtype(np.int32), [np.full(documents, length, np.int32)])
    return prefix


def as_result(
    request: Request, config: RunConfig, layout: Layout, records: Sequence[Mapping[str, Any]], peak: Peak
) -> dict[str, Any]:
    """What is written: one row in the format that ``bench.gate`` compares, and what it was measured on."""
    seconds = [float(record["perf/step_time"]) for record in records]
    median = statistics.median(seconds)
    tokens = config.train.global_batch_size * config.data.seq_length_tokens
    rate = tokens / median
    per_process = rate / layout.world_size
    tflops = per_process * flops_per_token(config.model, config.data.seq_length_tokens) / 1e12
    split = typical_split(records)
    cores = available_cores()
    shared = config.device == "cpu" and layout.world_size * (config.train.threads_per_process or 1) > cores
    row: dict[str, Any] = {
        "operator": "train_step", "shape": label(config), "dtype": config.train.precision, "provider": "ours",
        "mode": f"{layout.world_size} processes, {layout.describe()}", "median_ms": 1e3 * median,
        "min_ms": 1e3 * min(seconds), "max_ms": 1e3 * max(seconds), "steps": len(seconds), "tokens_per_s": rate,
        "tokens_per_s_per_process": per_process, "tflops_per_process": tflops,
        "mfu": tflops / peak.tflops if peak.tflops else None,
        "peak_gib_rank_0": max(float(record["memory/allocated_gib"]) for record in records),
        **{f"time_{part}_s": mean for part, (mean, _) in split.items()},
        **{f"time_{part}_max_s": most for part, (_, most) in split.items()}, "seconds": seconds,
    }  # fmt: skip
    return {
        "environment": environment(),
        "command": request.command,
        "processes": layout.world_size,
        "backend": "nccl" if config.device == "cuda" else "gloo",
        "oversubscribed": f"{layout.world_size} processes share {cores} cores" if shared else None,
        "mfu": {"convention": CONVENTIONS["model"], "peak": peak.describe()},
        "config": config.model_dump(mode="json"),
        "rows": [row],
    }


def typical_split(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Seconds of the median step by part: mean over the processes, and of the one that spent most; where records hold
    but one process's, its own. Empty if they hold none, as with log.comm_time=false.

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
    """The row for a person."""
    where, row = result["environment"], result["rows"][0]
    mfu = f"{row['mfu']:.1%}" if row["mfu"] is not None else "n/a"
    lines = [
        f"\nmeasured on {result['processes']} processes over {result['backend']}; {where['chip']}, {where['date']}, "
        f"commit {where['commit']}, load {where['load_average_1_min']}",
        f"MFU: {result['mfu']['convention']}; {result['mfu']['peak']}",
    ]
    if result["oversubscribed"]:
        lines.append(f"NOTE: {result['oversubscribed']}; waiting for a core counts as waiting for whom it delays")
    lines += [
        f"step {row['median_ms']:,.1f} ms (median of {row['steps']}; {row['min_ms']:,.1f} to {row['max_ms']:,.1f})"
        f" | {row['tokens_per_s']:,.0f} tokens/s | {row['tokens_per_s_per_process']:,.0f} a process | MFU {mfu}"
        f" | peak memory of rank 0 {row['peak_gib_rank_0']:.2f} GiB",
        "| part | mean ms | share | most ms |",
        "| --- | ---: | ---: | ---: |",
    ]
    whole = sum(row[f"time_{part}_s"] for part in PARTS)
    for part in PARTS:
        seconds = row[f"time_{part}_s"]
        lines.append(
            f"| {part} | {1e3 * seconds:,.2f} | {seconds / whole:.1%} | {1e3 * row[f'time_{part}_max_s']:,.2f} |"
        )
    return "\n".join(lines)
