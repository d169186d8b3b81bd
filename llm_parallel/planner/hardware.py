"""Chips, clusters, and the constants that say what share of a data sheet training gets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from llm_parallel.errors import UserError
from llm_parallel.planner.host import Host, host_of

DATA = resources.files("llm_parallel.planner") / "data"


@dataclass(frozen=True)
class Constants:
    """What is fitted for a chip, each a plain physical quantity.

    gemm, gemm_te, gemm_fp8: share of the peak of a matrix product's arithmetic, in PyTorch, in NVIDIA's own stack
    (Transformer Engine, JAX in its containers), and in 8 bits; flash, flash_te: share of the peak of a causal flash
    attention forward, open source (FlashAttention 1 and 2, SDPA) and Transformer Engine's (cuDNN); memory: share of the
    bandwidth of elementwise operators; nvlink, nic: share of the line rate of collectives; tp_hidden, dp_hidden: part
    of that communication that overlapped code hides, dp_hidden with FSDP's; layer_us: host time of a layer's forward
    or backward that is not hidden; jitter: part of a step lost to the slowest for every doubling of replicas, or of
    nodes if they are fewer.
    """

    gemm: float
    gemm_te: float
    gemm_fp8: float
    flash: float
    flash_te: float
    memory: float
    nvlink: float
    nic: float
    tp_hidden: float
    dp_hidden: float
    layer_us: float
    jitter: float


@dataclass(frozen=True)
class Chip:
    """One accelerator's data sheet: dense TFLOP/s, bytes/s, bytes."""

    name: str
    peak_flops: float
    peak_fp8_flops: float
    memory_bytes_per_s: float
    memory_bytes: float
    constants: Constants


@dataclass(frozen=True)
class Cluster:
    """Nodes of one kind. nvlink and nic: bytes/s of one GPU in one direction; latencies of one message in seconds;
    price: of one GPU for an hour, in the user's currency."""

    name: str
    chip: Chip
    gpus_per_node: int
    nvlink_bytes_per_s: float
    nic_bytes_per_s: float
    nvlink_latency_s: float = 3e-6
    nic_latency_s: float = 1e-5
    price_per_gpu_hour: float | None = None
    host: Host | None = None
    """Where processes on a CPU take the place of GPUs; then the rates above are not used."""


def load_constants(name: str) -> Constants:
    """Committed constants of a chip. Raises ValueError if there are none."""
    stored = json.loads((DATA / "constants.json").read_text())
    if name not in stored:
        raise ValueError(f"chip.constants {name!r} is none of {', '.join(stored)}")
    return Constants(**stored[name]["constants"])


def cluster_names() -> list[str]:
    """Clusters that come with the package."""
    return sorted(item.name.removesuffix(".yaml") for item in DATA.iterdir() if item.name.startswith("dgx"))


def load_cluster(name: str, constants: Mapping[str, Constants] | None = None) -> Cluster:
    """One of the package's clusters by name, or a YAML file like theirs (data/template.yaml says what stands in one).

    Raises UserError if it is unknown or lacks a field."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        try:
            text = path.read_text()
        except OSError as error:
            raise UserError(f"--cluster {name} cannot be read ({error.strerror}); give a YAML file") from None
    elif name in cluster_names():
        text = (DATA / f"{name}.yaml").read_text()
    else:
        raise UserError(f"--cluster {name} is unknown; there are {', '.join(cluster_names())}, or give a YAML file")
    try:
        return _cluster(yaml.safe_load(text), constants or {})
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"--cluster {name}: {type(error).__name__} {error}; it must have the fields of the package's template.yaml"
        ) from None


def _cluster(tree: dict[str, Any], constants: Mapping[str, Constants]) -> Cluster:
    chip = tree["chip"]
    host = host_of(tree["host"]) if "host" in tree else None
    if host is not None:
        known = Constants(**dict.fromkeys((field.name for field in fields(Constants)), 1.0))
    else:
        known = constants.get(chip["constants"]) or load_constants(chip["constants"])
    changed = {name: float(value) for name, value in (tree.get("measured") or {}).items()}
    if "gemm" in changed:  # who measured products measured their own stack's
        changed.setdefault("gemm_te", changed["gemm"])
    unknown = set(changed) - {field.name for field in fields(Constants)}
    if unknown:
        raise KeyError(f"measured.{sorted(unknown)[0]} is no constant of a chip")
    return Cluster(
        name=str(tree["name"]),
        chip=Chip(
            name=str(chip["name"]),
            peak_flops=1e12 * float(chip["peak_tflops"]),
            peak_fp8_flops=1e12 * float(chip["peak_fp8_tflops"]),
            memory_bytes_per_s=1e9 * float(chip["memory_gb_per_s"]),
            memory_bytes=2**30 * float(chip["memory_gib"]),
            constants=replace(known, **changed),
        ),
        gpus_per_node=int(tree["gpus_per_node"]),
        nvlink_bytes_per_s=1e9 * float(tree["nvlink_gb_per_s"]),
        nic_bytes_per_s=1e9 * float(tree["nic_gb_per_s"]),
        nvlink_latency_s=1e-6 * float(tree.get("nvlink_latency_us", 3.0)),
        nic_latency_s=1e-6 * float(tree.get("nic_latency_us", 10.0)),
        price_per_gpu_hour=tree.get("price_per_gpu_hour"),
        host=host,
    )


def as_dict(constants: Constants) -> dict[str, float]:
    """For JSON."""
    return asdict(constants)
