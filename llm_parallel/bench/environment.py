"""Describes what a result was measured on."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "triton",
    "liger-kernel",
    "transformer-engine",
    "flash-attn",
    "apex",
    "transformers",
    "megatron-core",
)


def environment() -> dict[str, Any]:
    """Chip, versions, date, commit and load, which every result holds."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "chip": chip_name(),
        "cores": os.cpu_count(),
        "load_average_1_min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "date": str(date.today()),
        "commit": commit(),
        "versions": versions,
    }


def crowded(processes: int, cores: int, load: float) -> str | None:
    """What makes figures of ``processes`` on this machine meaningless: others that ran on it before, by the ``load``
    average of the last minute before the measurement began. None where the cores had room for both."""
    room = max(0, cores - processes)
    if load <= room + 0.5:
        return None
    return (
        f"the load was {load:.1f} before the measurement began, and beside {processes} processes {cores} cores have "
        f"room for {room}: other programs took part in these times, which say little; measure again on a quiet machine"
    )


def chip_name() -> str:
    """Name of the GPU, or of this machine's processor where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return f"{platform.processor() or platform.machine()} CPU"


def commit() -> str:
    """Short hash of the repository's commit; "unknown" outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"
