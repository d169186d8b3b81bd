"""``plan --calibrate``: a cluster description from results of ``bench comm``, ``bench kernels`` and ``bench step``.

What was measured replaces data sheets and fitted constants one by one, and the file says where each figure came from.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write
from llm_parallel.lines import say
from llm_parallel.planner.calibrate_host import host_description
from llm_parallel.planner.hardware import DATA, Chip, Cluster, load_cluster
from llm_parallel.planner.results import Measured, field, read_results, step_config, step_seconds
from llm_parallel.planner.shapes import shape_of, strategy_of
from llm_parallel.planner.steptime import step_time

BASES = {"H200": "dgx-h200", "H100": "dgx-h100", "A100-SXM4-40": "dgx-a100-40", "A100": "dgx-a100"}
"""Data sheet of each GPU, by a part of its name; the first part that a name contains decides."""
COMPUTE = ("gemm", "gemm_te", "gemm_fp8", "flash", "flash_te", "memory")
"""Constants that a measured step multiplies by one factor, since one time cannot tell them apart."""
WIDE = ("all_reduce", "all_gather", "reduce_scatter")


def calibrate_command(paths: Sequence[str], cluster: str | None, out: str) -> int:
    """Writes the description of the cluster that the results were measured on, and prints how well one-device steps
    fit.

    ``cluster``: the data sheet to start from; by the chip's name if None. Raises UserError for results that can't be
    used.
    """
    if Path(out).suffix not in (".yaml", ".yml"):
        raise UserError(f"--cluster-out {out} must end in .yaml, as plan --cluster takes it")
    results = read_results(paths)
    text = host_description(results) if _on_cpu(results) else gpu_description(results, cluster)
    with atomic_write(out) as handle:
        handle.write(text)
    found = load_cluster(out)
    say(f"written: {out}, from {len(results)} results on {results[0].chip}")
    for result in results:
        if result.tree.get("crowded"):
            say(f"NOTE: {Path(result.path).name}: {result.tree['crowded']}")
        if result.kind == "step":
            predicted, measured = predict_step(result, found), step_seconds(result)
            say(f"{Path(result.path).name}: predicted {predicted:.4g} s, measured {measured:.4g} s, "
                  f"{predicted / measured - 1:+.1%}")  # fmt: skip
    if not any(result.kind == "step" for result in results):
        say("No bench step was given: what training reaches of the chip's rates is not calibrated.")
    return 0


def _on_cpu(results: Sequence[Measured]) -> bool:
    """Whether the results are of processes on a CPU: steps on a CPU, or gloo on a chip that is no known GPU."""
    if any(result.kind == "step" and field(result, "config").get("device") == "cpu" for result in results):
        return True
    known = any(part in results[0].chip.replace(" ", "-") for part in BASES)
    return not known and any(result.kind == "comm" and field(result, "backend") == "gloo" for result in results)


def predict_step(result: Measured, cluster: Cluster) -> float:
    """Seconds that the planner predicts for a measured step."""
    config = step_config(result)
    return step_time(shape_of(config.model), strategy_of(config, 1), cluster).total


def _base_of(chip: str, cluster: str | None) -> tuple[str, Cluster]:
    """Data sheet to start from. Raises UserError if there is none, or the named one is of another chip."""
    if "MIG" in chip:
        raise UserError(f"--calibrate: {chip} is a slice of a GPU; measure a whole one")
    spelled = chip.replace(" ", "-")
    name = cluster or next((base for part, base in BASES.items() if part in spelled), None)
    if name is None:
        raise UserError(
            f"--calibrate: no data sheet of {chip} comes with the package; fill in planner/data/template.yaml and give "
            "it as --cluster FILE"
        )
    found = load_cluster(name)
    if cluster and found.chip.name.partition("-")[0].upper() not in chip.upper():
        raise UserError(f"--cluster {cluster} has {found.chip.name}, but the results are of {chip}")
    return name, found


def gpu_description(results: Sequence[Measured], cluster: str | None) -> str:
    """YAML description of a GPU cluster. Raises UserError for results that do not describe one."""
    name, base = _base_of(results[0].chip, cluster)
    constants: dict[str, tuple[float, str]] = {}
    for result in results:
        if result.kind == "kernels":
            constants |= _card(result, base.chip)
    latency: dict[str, tuple[float, str]] = {}
    # Links within a node first, since the latency between nodes is what remains after them.
    comms = [result for result in results if result.kind == "comm"]
    gpus = base.gpus_per_node
    for result in sorted(comms, key=_nodes):
        found, delay = _links(result, base, latency)
        constants |= found
        latency |= delay
        if _nodes(result) > 1:
            gpus = int(field(result, "processes_per_machine"))
    changed = _changed(base, constants)
    steps = [result for result in results if result.kind == "step"]
    if steps:
        factor = math.exp(statistics.mean(math.log(_factor(result, changed)) for result in steps))
        source = ", ".join(result.source for result in steps)
        for key in COMPUTE:
            value = factor * getattr(changed.chip.constants, key)
            capped = ", and no more than the data sheet" if value > 1.0 else ""
            constants[key] = min(1.0, value), f"x {factor:.4g} as {source}{capped}"
    return _yaml(name, base, gpus, constants, latency)


def _changed(base: Cluster, constants: Mapping[str, tuple[float, str]]) -> Cluster:
    known = replace(base.chip.constants, **{key: value for key, (value, _) in constants.items()})
    return replace(base, chip=replace(base.chip, constants=known))


def _card(result: Measured, chip: Chip) -> dict[str, tuple[float, str]]:
    """Shares of the data sheet that a large matrix product and a copy reach; upper bounds unless a step was measured
    too."""
    product, copy = (float(field(result, "card", name)) for name in ("matmul_flops_per_s", "copy_bytes_per_s"))
    if not (0 < product < 2 * chip.peak_flops and 0 < copy < 2 * chip.memory_bytes_per_s):
        raise UserError(
            f"--calibrate {result.path}: a product at {product / 1e12:.4g} TFLOP/s and a copy at {copy / 1e9:.4g} GB/s "
            f"are not of {chip.name}"
        )
    gemm = (product / chip.peak_flops, f"measured product, {result.source}")
    return {"gemm": gemm, "gemm_te": gemm, "memory": (copy / chip.memory_bytes_per_s, f"copy, {result.source}")}


def _nodes(result: Measured) -> int:
    ranks, beside = int(field(result, "processes")), int(field(result, "processes_per_machine"))
    if beside < 1 or ranks % beside:
        raise UserError(
            f"--calibrate {result.path}: {ranks} processes are no whole number of machines of {beside}; measure on "
            "whole nodes"
        )
    return ranks // beside


def _links(
    result: Measured, base: Cluster, known: Mapping[str, tuple[float, str]]
) -> tuple[dict[str, tuple[float, str]], dict[str, tuple[float, str]]]:
    """Share of the line rate, and latency in microseconds, of the links that a ``bench comm`` result used."""
    if field(result, "backend") != "nccl":
        raise UserError(f"--calibrate {result.path} was measured over {result.tree['backend']}, not NCCL, on a GPU")
    fits = {name: fit for name, fit in field(result, "fits").items() if name in WIDE}
    if not fits:
        raise UserError(
            f"--calibrate {result.path} has no line of {', '.join(WIDE)}; measure one of them at two sizes or more"
        )
    ranks, nodes, beside = int(result.tree["processes"]), _nodes(result), int(result.tree["processes_per_machine"])
    rate = statistics.median(1e9 * float(fit["busbw_gb_per_s"]) for fit in fits.values())
    # An all-reduce goes around the ring twice.
    delay = statistics.median(
        float(fit["latency_s"]) / (2 if name == "all_reduce" else 1) for name, fit in fits.items()
    )
    kind = f"{', '.join(fits)} of {ranks}, {result.source}"
    if nodes == 1:
        return (
            {"nvlink": (rate / base.nvlink_bytes_per_s, kind)},
            {"nvlink_latency_us": (1e6 * delay / (ranks - 1), kind)},
        )
    near = known["nvlink_latency_us"][0] * 1e-6 if "nvlink_latency_us" in known else base.nvlink_latency_s
    far = max(0.0, delay - (ranks - nodes) * near) / nodes
    return {"nic": (rate / beside / base.nic_bytes_per_s, kind)}, {"nic_latency_us": (1e6 * far, kind)}


def _factor(result: Measured, cluster: Cluster) -> float:
    """By what the chip's shares must be multiplied for the predicted step to take the measured time; found by
    bisection."""
    measured, low, high = step_seconds(result), 1e-3, 1e3

    def at(factor: float) -> float:
        shares = {key: factor * getattr(cluster.chip.constants, key) for key in COMPUTE}
        changed = replace(cluster.chip, constants=replace(cluster.chip.constants, **shares))
        return predict_step(result, replace(cluster, chip=changed))

    if not at(high) < measured < at(low):
        raise UserError(
            f"--calibrate {result.path}: a step of {measured:.4g} s cannot be this model's on {cluster.chip.name}, "
            f"which launches alone take {at(high):.4g} s for"
        )
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if at(middle) > measured else (low, middle)
    return math.sqrt(low * high)


def _yaml(
    name: str,
    base: Cluster,
    gpus: int,
    constants: Mapping[str, tuple[float, str]],
    latency: Mapping[str, tuple[float, str]],
) -> str:
    """The description, each line with its source."""
    chip, sheet = base.chip, f"from {Path(name).name}"
    family = _constants_name(name)
    lines = [
        "# Made by llm-parallel plan --calibrate.",
        f"name: {json.dumps(base.name + '-calibrated')}",
        "chip:",
        f"  name: {json.dumps(chip.name)}",
        f"  constants: {json.dumps(family)}  # for what is not under `measured`",
        f"  peak_tflops: {chip.peak_flops / 1e12:.6g}  # {sheet}",
        f"  peak_fp8_tflops: {chip.peak_fp8_flops / 1e12:.6g}  # {sheet}",
        f"  memory_gb_per_s: {chip.memory_bytes_per_s / 1e9:.6g}  # {sheet}",
        f"  memory_gib: {chip.memory_bytes / 2**30:.6g}  # {sheet}",
        f"gpus_per_node: {gpus}",
        f"nvlink_gb_per_s: {base.nvlink_bytes_per_s / 1e9:.6g}  # {sheet}; `measured.nvlink` is the share reached",
        f"nic_gb_per_s: {base.nic_bytes_per_s / 1e9:.6g}  # {sheet}; `measured.nic` is the share reached",
    ]
    for key, seconds in (("nvlink_latency_us", base.nvlink_latency_s), ("nic_latency_us", base.nic_latency_s)):
        value, source = latency.get(key, (1e6 * seconds, sheet))
        lines.append(f"{key}: {value:.4g}  # {source}")
    lines.append(f"price_per_gpu_hour: {json.dumps(base.price_per_gpu_hour)}")
    lines.append("measured:" if constants else "measured: {}")
    lines += [f"  {key}: {value:.5g}  # {source}" for key, (value, source) in constants.items()]
    return "\n".join(lines) + "\n"


def _constants_name(name: str) -> str:
    """Name of the fitted constants that a description uses."""
    path = Path(name)
    text = path.read_text() if path.suffix in (".yaml", ".yml") else (DATA / f"{name}.yaml").read_text()
    return str(yaml.safe_load(text)["chip"]["constants"])
