"""The host section of a cluster description, from ``bench comm`` over gloo and one-process ``bench step`` on a CPU.

Steps that differ in width, sequence length, depth or batch separate the time of matrix products, layers, elementwise
operators and micro batches; n different steps determine n of these four. A result with ``processes_beside`` was
measured while that many other processes ran the same step, and shows how much busy cores slow each other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from scipy.optimize import nnls

from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError
from llm_parallel.planner.host import OPERATIONS, Host, HostModel
from llm_parallel.planner.results import Measured, field, step_config, step_seconds
from llm_parallel.planner.shapes import shape_of, strategy_of

UPDATE = "clip and AdamW"
"""Name of the update in a step's split."""
UNKNOWNS = ("product_s", "call_s", "traffic_s", "micro_batch_s")
"""What steps determine: one different step the first, two the first two, and so on."""


def host_description(results: Sequence[Measured]) -> str:
    """YAML description of a machine without GPUs. Raises UserError for results that can't describe one."""
    steps = [result for result in results if result.kind == "step"]
    comms = [result for result in results if result.kind == "comm"]
    if not steps:
        raise UserError("--calibrate: on a CPU a one-process bench step has to be among the results, for its rates")
    cores = int(results[0].tree["environment"].get("cores") or 0)
    if cores < 1:
        raise UserError(f"--calibrate {results[0].path} lacks environment.cores; measure it anew with bench --out")
    configs = [_config(result) for result in steps]
    alone = [pair for pair in zip(steps, configs) if _beside(pair[0]) == 0]
    if not alone:
        raise UserError("--calibrate: every bench step was measured beside others; give one that had a core to itself")
    update = statistics.median(_update_s(result) / _parameters(config) for result, config in alone)
    rates = fit_rates(alone, update)
    crowded = _crowded([pair for pair in zip(steps, configs) if _beside(pair[0]) >= cores - 1 > 0], rates, update)
    links = _links(comms, cores, crowded)
    return _yaml(results, cores, crowded, update, rates, links)


def _config(result: Measured) -> RunConfig:
    config = step_config(result)
    if config.train.threads_per_process != 1:
        raise UserError(
            f"--calibrate {result.path} was measured with train.threads_per_process="
            f"{config.train.threads_per_process}; processes share cores one thread each, so set it to 1"
        )
    return config


def _beside(result: Measured) -> int:
    return int(result.tree.get("processes_beside", 0))


def _update_s(result: Measured) -> float:
    row = next(row for row in field(result, "rows") if row.get("provider") == "ours")
    split = row.get("split_s") or {}
    if UPDATE not in split:
        raise UserError(f"--calibrate {result.path} lacks the part {UPDATE!r} in split_s; measure it anew")
    # The split was measured in another step, which the clocks slowed, so only its shares are used.
    return step_seconds(result) * float(split[UPDATE]) / sum(map(float, split.values()))


def _parameters(config: RunConfig) -> float:
    return float(shape_of(config.model).parameters)


def _features(config: RunConfig) -> list[float]:
    """FLOPs, layers' forwards and backwards, bytes and micro batches of one process's step."""
    strategy = strategy_of(config, 1)
    work = HostModel(shape_of(config.model), strategy, NOTHING).alone()
    return [work.flops, work.calls, work.traffic, float(strategy.micro_batches)]


NOTHING = Host(1, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, {})


def fit_rates(alone: Sequence[tuple[Measured, RunConfig]], update: float) -> dict[str, float]:
    """Seconds of a FLOP, a layer's forward or backward, a byte and a micro batch, none below 0, by least squares of the
    relative error.

    ``update``: seconds of one parameter's update, which is subtracted first."""
    features = [_features(config) for _, config in alone]
    seconds = [step_seconds(result) - update * _parameters(config) for result, config in alone]
    told = min(len(UNKNOWNS), len({tuple(row) for row in features}))
    matrix = np.array([[value / second for value in row[:told]] for row, second in zip(features, seconds)])
    scale = matrix.max(axis=0)
    found, _ = nnls(matrix / scale, np.ones(len(seconds)))
    values = dict(zip(UNKNOWNS, (float(value) for value in found / scale)))
    if values["product_s"] <= 0:
        raise UserError("--calibrate: these steps do not get longer with their work; measure them on a quiet machine")
    return {**dict.fromkeys(UNKNOWNS, 0.0), **values}


def predicted_alone(config: RunConfig, rates: Mapping[str, float], update: float) -> float:
    """Predicted seconds of one process's step on an otherwise idle machine."""
    features = dict(zip(UNKNOWNS, _features(config)))
    return sum(rates[name] * features[name] for name in UNKNOWNS) + update * _parameters(config)


def _crowded(
    beside: Sequence[tuple[Measured, RunConfig]], rates: Mapping[str, float], update: float
) -> tuple[float, str]:
    if not beside:
        return 1.0, "no step was measured with all cores at work"
    speeds = [predicted_alone(config, rates, update) / step_seconds(result) for result, config in beside]
    return min(1.0, statistics.mean(speeds)), ", ".join(Path(result.path).name for result, _ in beside)


def _links(comms: Sequence[Measured], cores: int, crowded: tuple[float, str]) -> dict[str, dict[int, tuple[Any, ...]]]:
    """Latency in microseconds, GB/s and source of each operation by number of members, as if every process had a core
    to itself. What was measured with fewer cores than processes is scaled down, since it includes waiting for a
    core."""
    found: dict[str, dict[int, tuple[Any, ...]]] = {}
    for result in comms:
        if field(result, "backend") != "gloo":
            raise UserError(f"--calibrate {result.path} was measured over {result.tree['backend']}, not gloo, on a CPU")
        ranks = int(field(result, "processes"))
        if ranks != int(field(result, "processes_per_machine")):
            raise UserError(f"--calibrate {result.path} is of several machines; on CPUs one machine is planned")
        rate = min(1.0, cores / ranks) * (crowded[0] if ranks >= cores > 1 else 1.0)
        for name, fit in field(result, "fits").items():
            delay, bandwidth = 1e6 * float(fit["latency_s"]) * rate, float(fit["bytes_per_s"]) / 1e9 / rate
            found.setdefault(name, {})[ranks] = delay, bandwidth, result.source
    missing = [name for name in OPERATIONS if name not in found]
    if missing:
        raise UserError(
            f"--calibrate: no bench comm over gloo with {missing[0]} at two sizes or more is among the results; run "
            f"bench comm --ops {','.join(OPERATIONS)} --out"
        )
    return found


def _yaml(
    results: Sequence[Measured],
    cores: int,
    crowded: tuple[float, str],
    update: float,
    rates: Mapping[str, float],
    links: Mapping[str, Mapping[int, tuple[Any, ...]]],
) -> str:
    """The description, each line with its source."""
    steps = ", ".join(Path(result.path).name for result in results if result.kind == "step" and not _beside(result))
    gflops = 1e-9 / rates["product_s"]
    gib = psutil.virtual_memory().total / 2**30 / cores
    lines = [
        "# Made by llm-parallel plan --calibrate: processes on the CPU of one machine stand for GPUs.",
        f"# {results[0].chip}, {results[0].tree['environment']['date']}, commit "
        f"{results[0].tree['environment']['commit']}",
        f"name: {json_text(results[0].chip)}",
        "chip:",
        "  name: CPU",
        f"  peak_tflops: {gflops / 1e3:.5g}  # of one core, as fitted below: what MFU divides by",
        f"  peak_fp8_tflops: {gflops / 1e3:.5g}",
        "  memory_gb_per_s: 0  # not used: host.traffic_s_per_gb is",
        f"  memory_gib: {gib:.4g}  # of the machine that calibrated, over its cores",
        "gpus_per_node: 64  # processes on one machine at most",
        "nvlink_gb_per_s: 0  # not used: host.links are",
        "nic_gb_per_s: 0",
        "price_per_gpu_hour: null",
        "host:",
        f"  cores: {cores}",
        f"  crowded: {crowded[0]:.4g}  # speed of a core while all work: {crowded[1]}",
        f"  gflops_per_s: {gflops:.5g}  # of one core, from {steps}, as the next three",
        f"  traffic_s_per_gb: {1e9 * rates['traffic_s']:.4g}",
        f"  layer_pass_us: {1e6 * rates['call_s']:.4g}",
        f"  micro_batch_us: {1e6 * rates['micro_batch_s']:.4g}",
        f"  update_ns_per_parameter: {1e9 * update:.4g}  # part {UPDATE!r} of the steps",
        "  links:  # of each member's core",
    ]
    for name, by_members in links.items():
        lines.append(f"    {name}:")
        lines += [
            f"      {members}: {{latency_us: {delay:.4g}, gb_per_s: {bandwidth:.4g}}}  # {source}"
            for members, (delay, bandwidth, source) in sorted(by_members.items())
            if math.isfinite(bandwidth)
        ]
    return "\n".join(lines) + "\n"


def json_text(text: str) -> str:
    """The text in quotes, for YAML."""
    return '"' + text.replace("\\", "").replace('"', "") + '"'
