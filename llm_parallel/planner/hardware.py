"""Chips, clusters, and the constants that say which share of its data sheet a chip reaches in training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from llm_parallel.errors import UserError
from llm_parallel.planner.cluster_file import as_number, read_cluster
from llm_parallel.planner.host import Host, host_of

DATA = resources.files("llm_parallel.planner") / "data"


@dataclass(frozen=True)
class Constants:
    """What is fitted for a chip; each is a plain physical quantity."""

    gemm: float
    """Share of the peak that a matrix product reaches in PyTorch."""
    gemm_te: float
    """The same in NVIDIA's own software (Transformer Engine; JAX in its containers)."""
    gemm_fp8: float
    """The same in 8 bits, of the 8-bit peak."""
    flash: float
    """Share of the peak that the forward of causal flash attention reaches in open software (FlashAttention 1 and 2,
    SDPA)."""
    flash_te: float
    """The same in Transformer Engine (cuDNN)."""
    memory: float
    """Share of the memory bandwidth that elementwise operators reach."""
    nvlink: float
    """Share of NVLink's line rate that collectives reach."""
    nic: float
    """Share of the network cards' line rate that collectives reach."""
    tp_hidden: float
    """Share of tensor-parallel communication that code which overlaps it hides behind compute."""
    dp_hidden: float
    """Share of data-parallel communication, FSDP's included, that code which overlaps it hides."""
    layer_us: float
    """Microseconds of host time in one layer's forward or backward that are not hidden."""
    jitter: float
    """Share of a step that is lost to the slowest rank for every doubling of the replicas, or of the nodes if these are
    fewer."""


@dataclass(frozen=True)
class Chip:
    """One accelerator's data sheet, and what training reaches of it."""

    name: str
    """As in ``H100``."""
    peak_flops: float
    """Dense FLOP/s in 16 bits."""
    peak_fp8_flops: float
    """Dense FLOP/s in 8 bits."""
    memory_bytes_per_s: float
    """Bandwidth of its memory."""
    memory_bytes: float
    """Size of its memory."""
    constants: Constants
    """Shares of these figures that training reaches."""


@dataclass(frozen=True)
class Cluster:
    """Nodes of one kind."""

    name: str
    """As in ``dgx-h100``."""
    chip: Chip
    """What each GPU is."""
    gpus_per_node: int
    """GPUs of one node."""
    nvlink_bytes_per_s: float
    """Of one GPU within its node, in one direction."""
    nic_bytes_per_s: float
    """Of one GPU to other nodes, in one direction."""
    nvlink_latency_s: float = 3e-6
    """Of one message within a node."""
    nic_latency_s: float = 1e-5
    """Of one message between nodes."""
    price_per_gpu_hour: float | None = None
    """In the user's currency; None if not known."""
    host: Host | None = None
    """Set where processes on a CPU stand for GPUs; the rates above are not used then."""


def load_constants(name: str) -> Constants:
    """The constants of a chip that come with the package. Raises ValueError if there are none."""
    stored = json.loads((DATA / "constants.json").read_text())
    if name not in stored:
        raise ValueError(f"chip.constants {name!r} is none of {', '.join(stored)}")
    return Constants(**stored[name]["constants"])


def left_out_predictions() -> dict[int, float]:
    """Seconds of a step predicted for each published row, by number, with constants that were fitted without any row of
    its source (``plan --refit``)."""
    stored = json.loads((DATA / "constants.json").read_text())
    return {int(number): seconds for chip in stored.values() for number, seconds in chip["left_out"].items()}


def cluster_names() -> list[str]:
    """Clusters that come with the package."""
    files = (item.name for item in DATA.iterdir() if item.name.endswith(".yaml"))
    return sorted(name.removesuffix(".yaml") for name in files if name != "template.yaml")


NETWORKS: Mapping[str, tuple[float, float]] = {
    "ib-400": (50.0, 10.0),
    "ib-200": (25.0, 10.0),
    "efa-3200": (50.0, 30.0),
    "efa-400": (6.25, 30.0),
    "roce-400": (40.0, 15.0),
    "roce-200": (20.0, 15.0),
    "roce-100": (10.0, 15.0),
}
"""Networks between nodes: GB/s of one GPU in one direction, and microseconds of a message. ``ib``: InfiniBand, one card
of so many Gbit/s for each GPU. ``efa``: AWS's Elastic Fabric Adapter, so many Gbit/s for a node of eight GPUs (3200:
p5.48xlarge, 400: p4d.24xlarge, by AWS's description of the instances). ``roce``: Ethernet, one card for each GPU, of
which a fifth is taken to be lost to congestion. Latencies of EFA and Ethernet are assumed."""


def with_network(cluster: Cluster, name: str | None) -> Cluster:
    """The cluster with one of ``NETWORKS`` between its nodes. Raises UserError for another name."""
    if name is None:
        return cluster
    if name.lower() not in NETWORKS:
        raise UserError(f"--network {name} is unknown; there are {', '.join(NETWORKS)}")
    rate, latency = NETWORKS[name.lower()]
    return replace(cluster, nic_bytes_per_s=1e9 * rate, nic_latency_s=1e-6 * latency)


def load_cluster(name: str, constants: Mapping[str, Constants] | None = None) -> Cluster:
    """One of the package's clusters by name, or a YAML file like theirs (data/template.yaml explains its fields).

    Raises UserError if it is unknown or lacks a field."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"--cluster {name} cannot be read ({error.strerror}); give a YAML file") from None
        except UnicodeDecodeError:
            raise UserError(f"--cluster {name} is not text in UTF-8; give a YAML file") from None
    elif name.lower() in cluster_names():
        text = (DATA / f"{name.lower()}.yaml").read_text()
    else:
        raise UserError(f"--cluster {name} is unknown; there are {', '.join(cluster_names())}, or give a YAML file")
    where = f"--cluster {name}"
    tree = read_cluster(text, where)
    try:
        return _cluster(tree, constants or {})
    except KeyError as error:  # of the section `host`
        raise UserError(f"{where} lacks {error.args[0]}; write it anew with plan --calibrate") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}; it must have the fields of the package's template.yaml") from None


def _cluster(tree: dict[str, Any], constants: Mapping[str, Constants]) -> Cluster:
    chip = tree["chip"]
    host = host_of(tree["host"]) if "host" in tree else None
    if host is not None:
        known = Constants(**dict.fromkeys((field.name for field in fields(Constants)), 1.0))
    else:
        known = constants.get(chip["constants"]) or load_constants(chip["constants"])
    changed = {name: float(value) for name, value in (tree.get("measured") or {}).items()}
    if "gemm" in changed:  # a measured product is one of the software that was measured with, so it holds for both
        changed.setdefault("gemm_te", changed["gemm"])
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
        price_per_gpu_hour=as_number(tree.get("price_per_gpu_hour")),
        host=host,
    )


def as_dict(constants: Constants) -> dict[str, float]:
    """For JSON."""
    return asdict(constants)
