"""First stage: what the results were measured on, and the measured limits of this GPU."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.gpu import machine
from benchmarks.gpu.plan import ROOT, Job, failure
from benchmarks.gpu.processes import output_of

PACKAGES = (
    "torch", "triton", "numpy", "transformers", "liger-kernel", "megatron-core", "pydantic", "transformer-engine",
    "flash-attn", "apex", "quack-kernels", "pytest", "pytest-xdist",
)  # fmt: skip


def environment(job: Job) -> dict[str, Any]:
    """Versions, chip, clocks at rest and under load, copy bandwidth and rate of a bf16 product."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    found: dict[str, Any] = {
        "date": str(date.today()),
        "commit": job.options.get("commit") or output_of(["git", "-C", str(ROOT), "rev-parse", "HEAD"]) or "unknown",
        "command": job.options.get("command"),
        "python": platform.python_version(),
        "versions": versions,
        "cores": os.cpu_count(),
        "packages": job.options.get("packages"),
    }
    job.save(found)
    chosen = machine.start_kernels(job.rehearse)
    found |= machine.properties(chosen)
    found["at_rest"] = machine.smi(job.rehearse)
    job.save(found)
    from llm_kernels import measure

    try:
        found["card"] = asdict(measure.measure_card(chosen))
    except Exception as error:  # the rest is worth knowing even so
        found["card_problem"] = failure(error)
    found["under_load"] = machine.smi(job.rehearse)
    return found
