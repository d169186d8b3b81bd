"""Small functions for what only a machine with a GPU can answer. In a rehearsal they give made-up answers of the same
form, so that the same code handles them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import failure
from benchmarks.gpu.processes import output_of

# Fields of `nvidia-smi --query-gpu` that drivers of five years know.
FIELDS = (
    "name", "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw",
    "power.limit", "temperature.gpu", "utilization.gpu", "memory.total", "memory.used", "ecc.mode.current",
)  # fmt: skip
# As a driver answers it (format from NVIDIA's documentation of --format=csv; the values are made up).
MADE_UP_SMI = (
    "made-up GPU, 580.00, P0, 1980 MHz, 3201 MHz, 1980 MHz, 3201 MHz, 120.50 W, 700.00 W, 35, 0 %, 1 MiB, 1 MiB, [N/A]"
)
RECORDER = Path(__file__).with_name("rehearsed_ncu.py")


def device(rehearse: bool) -> Any:
    """torch.device of the GPU, or the CPU for a rehearsal, whose kernels Triton interprets. Raises RuntimeError."""
    import torch

    if rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
        torch.set_num_threads(1)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU; --rehearse runs the stages on a CPU")
    return torch.device("cuda")


def start_kernels(rehearse: bool) -> Any:
    """The device, with our kernels ready to be launched on it."""
    chosen = device(rehearse)
    import torch

    from llm_kernels import dispatch

    dispatch.backend_for(torch.empty(0, device=chosen), "triton")
    return chosen


def parse_smi(text: str | None) -> dict[str, str]:
    """One line of nvidia-smi's CSV as field → value with its unit; empty if it could not be asked."""
    parts = [part.strip() for part in (text or "").splitlines()[0].split(",")] if text else []
    return dict(zip(FIELDS, parts)) if len(parts) == len(FIELDS) else {}


def smi(rehearse: bool) -> dict[str, str]:
    """Present clocks, power and temperature."""
    if rehearse:
        return parse_smi(MADE_UP_SMI)
    return parse_smi(output_of(["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader"]))


def properties(chosen: Any) -> dict[str, Any]:
    """torch's properties of the GPU; of a CPU only that it is one."""
    import torch

    from llm_kernels.device import name_of

    if chosen.type != "cuda":
        return {"chip": f"{name_of(chosen)}, no GPU: a rehearsal, whose times say nothing"}
    found = torch.cuda.get_device_properties(chosen)
    described: dict[str, Any] = {
        "chip": found.name, "memory_gib": found.total_memory / 2**30, "sms": found.multi_processor_count,
        "capability": [found.major, found.minor], "l2_mib": getattr(found, "L2_cache_size", 0) / 2**20,
        "cuda": torch.version.cuda,
    }  # fmt: skip
    libraries = {
        "cudnn": torch.backends.cudnn.version,
        "nccl": lambda: ".".join(map(str, torch.cuda.nccl.version())),
    }
    for name, ask in libraries.items():
        try:
            described[name] = ask()
        except Exception as error:  # one library that does not answer costs one line
            described[name] = failure(error)
    return described


def profiler(rehearse: bool) -> list[str] | None:
    """The command of Nsight Compute; None if it is not installed. In a rehearsal a program that takes the same options,
    runs the command and prints a profile of the same form."""
    import shutil

    if rehearse:
        return [sys.executable, str(RECORDER)]
    found = shutil.which("ncu")
    return [found] if found else None


def module(rehearse: bool, name: str, *arguments: str) -> Sequence[str]:
    """Command that runs one of the suite's modules in a process of its own."""
    return [sys.executable, "-m", f"benchmarks.gpu.{name}", *(["--rehearse"] if rehearse else []), *arguments]
