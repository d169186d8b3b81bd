"""Properties, events and memory of a device, for launchers and benchmarks. On a CPU, where benchmarks are rehearsed,
events use the host's clock."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _properties(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def arch(x: Tensor) -> int:
    """Compute capability of the tensor's GPU as a number (80 for A100, 90 for H100); 80 under the interpreter."""
    return _properties(x.device.index or 0)[0] if x.is_cuda else 80


def num_sms(x: Tensor) -> int:
    """Streaming multiprocessors of the tensor's GPU; 4 under the interpreter, where programs run one by one."""
    return _properties(x.device.index or 0)[1] if x.is_cuda else 4


class HostEvent:
    """A point in time by the host's clock, with the methods of a CUDA event."""

    def __init__(self) -> None:
        self.at = 0.0

    def record(self) -> None:
        """Takes the time."""
        self.at = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        """Milliseconds from this event to ``end``."""
        return (end.at - self.at) * 1e3


def event(device: torch.device) -> Any:
    """A CUDA event that measures time, or a HostEvent."""
    return torch.cuda.Event(enable_timing=True) if device.type == "cuda" else HostEvent()


def synchronize(device: torch.device) -> None:
    """Waits for the device; on a GPU this raises the error of a kernel that failed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Returns the memory that torch has cached to the GPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_lost(device: torch.device) -> bool:
    """Whether an error (an access out of bounds, say) has ended all CUDA work of this process."""
    try:
        synchronize(device)
    except Exception:  # whatever it raises, no further CUDA call of this process works
        return True
    return False


def name_of(device: torch.device) -> str:
    """Name of the GPU, or of this kind of CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Peak memory of one call above what was allocated before; 0 on a CPU, whose allocator does not count."""
    if device.type != "cuda":
        call()
        return 0
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
