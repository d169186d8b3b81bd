"""What the NVIDIA driver says about a node's GPUs, and the system about the node, looked at every half minute.

Counters are compared with their values at the agent's start, since earlier errors are no fault of this run. A finding
is fatal where the GPU can't be trusted any more; then it is removed at once, by hard evidence (blame.py).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

# Xids that mean broken hardware or a driver that has lost the GPU, by NVIDIA's "XID errors" catalogue; the others name
# a fault of the program (13, 31, 43, 45, …) or nothing that a run must act on.
FATAL_XIDS = {
    48: "double-bit ECC error", 62: "internal micro-controller halt", 64: "row remapper failure", 74: "NVLink error",
    79: "GPU has fallen off the bus", 95: "uncontained memory error", 119: "GSP does not answer", 120: "GSP error",
    140: "unrecovered ECC error",
}  # fmt: skip
MAX_NVLINKS = 18
PCIE_REPLAYS = 100
"""Replays since the agent's start that are worth a warning."""
FREE_DISK_BYTES = 1 << 30
FREE_MEMORY = 0.02
KILL_S = 5.0
"""Time for a process to end after the kernel has chosen it."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. device: number on this node, None for the node itself; code: short and stable."""

    code: str
    fatal: bool
    device: int | None
    message: str


def open_nvml() -> Any | None:
    """NVIDIA's management library, initialized; None where it, its Python package (nvidia-ml-py) or a GPU is absent."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return pynvml if pynvml.nvmlDeviceGetCount() else None
    except pynvml.NVMLError:
        return None


class GpuHealth:
    """Watches one GPU through ``nvml`` (the module pynvml, or what behaves like it). Questions that a chip or driver
    can't answer are left out."""

    def __init__(self, nvml: Any, device: int) -> None:
        self._nvml, self._device = nvml, device
        self._handle = nvml.nvmlDeviceGetHandleByIndex(device)
        self._events = self._open_events()
        self._first = self._counters()
        self._said: set[str] = set()

    def _open_events(self) -> Any | None:
        def opened() -> Any:
            events = self._nvml.nvmlEventSetCreate()
            self._nvml.nvmlDeviceRegisterEvents(self._handle, self._nvml.nvmlEventTypeXidCriticalError, events)
            return events

        return self._ask(opened)

    def _ask(self, question: Callable[[], Any]) -> Any | None:
        """The answer; None if this GPU has none. Raises the error of a GPU that is lost."""
        try:
            return question()
        except self._nvml.NVMLError as error:
            if isinstance(error, self._nvml.NVMLError_GpuIsLost):
                raise
            return None

    def _counters(self) -> dict[str, int]:
        nvml, handle = self._nvml, self._handle
        uncorrected, volatile = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        questions: dict[str, Callable[[], Any]] = {
            "ecc": lambda: nvml.nvmlDeviceGetTotalEccErrors(handle, uncorrected, volatile),
            "replays": lambda: nvml.nvmlDeviceGetPcieReplayCounter(handle),
            "links": lambda: sum(self._link_is_up(number) for number in range(MAX_NVLINKS)),
        }  # fmt: skip
        found = {name: self._ask(question) for name, question in questions.items()}
        return {name: int(value) for name, value in found.items() if value is not None}

    def _link_is_up(self, number: int) -> bool:
        return bool(self._ask(lambda: self._nvml.nvmlDeviceGetNvLinkState(self._handle, number)))

    def look(self) -> list[Finding]:
        """Problems that were not reported before."""
        try:
            found = list(self._findings())
        except self._nvml.NVMLError as error:
            found = [Finding("gpu-lost", True, self._device, f"the driver has lost the GPU: {error}")]
        new = [finding for finding in found if finding.code not in self._said]
        self._said.update(finding.code for finding in new)
        return new

    def _findings(self) -> Iterator[Finding]:
        now, first, device = self._counters(), self._first, self._device
        for xid in self._xids():
            if xid in FATAL_XIDS:
                yield Finding(f"xid-{xid}", True, device, f"Xid {xid}: {FATAL_XIDS[xid]}")
            else:
                yield Finding(f"xid-{xid}", False, device, f"Xid {xid}, which programs cause too")
        if now.get("ecc", 0) > first.get("ecc", 0):
            yield Finding("ecc", True, device, f"{now['ecc'] - first['ecc']} uncorrectable ECC errors since the start")
        rows = self._ask(lambda: self._nvml.nvmlDeviceGetRemappedRows(self._handle))
        if rows is not None and rows[3]:
            yield Finding("row-remap-failed", True, device, "a faulty memory row could not be remapped")
        elif rows is not None and rows[2]:
            yield Finding("row-remap-pending", False, device, "a faulty memory row waits for a reset to be remapped")
        if now.get("links", 0) < first.get("links", 0):
            yield Finding("nvlink", True, device, f"{now['links']} of {first['links']} NVLinks are up")
        if now.get("replays", 0) - first.get("replays", 0) > PCIE_REPLAYS:
            yield Finding("pcie-replay", False, device, f"{now['replays'] - first['replays']} PCIe replays")
        yield from self._link_and_clocks()

    def _xids(self) -> Iterator[int]:
        while self._events is not None:
            event = self._ask(lambda: self._nvml.nvmlEventSetWait_v2(self._events, 0))
            if event is None:
                return
            yield int(event.eventData)

    def _link_and_clocks(self) -> Iterator[Finding]:
        nvml, handle, device = self._nvml, self._handle, self._device
        width = self._ask(lambda: nvml.nvmlDeviceGetCurrPcieLinkWidth(handle))
        most = self._ask(lambda: nvml.nvmlDeviceGetMaxPcieLinkWidth(handle))
        if width and most and width < most:
            yield Finding("pcie-width", False, device, f"PCIe runs {width} of {most} lanes wide")
        reasons = self._ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)) or 0
        slowing = {
            "slowed by the hardware": nvml.nvmlClocksThrottleReasonHwSlowdown,
            "too hot": nvml.nvmlClocksThrottleReasonHwThermalSlowdown,
            "power brake": nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
        }
        named = [name for name, bit in slowing.items() if reasons & bit]
        if named:
            yield Finding("throttled", False, device, f"clocks are down: {', '.join(named)}")


class HostHealth:
    """Watches the disk under ``folders`` and the memory of this node."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._said: set[str] = set()

    def look(self) -> list[Finding]:
        """Problems that were not reported before; one that went away is reported again when it returns."""
        found = {finding.code: finding for finding in self._findings()}
        new = [finding for code, finding in found.items() if code not in self._said]
        self._said = set(found)
        return new

    def _findings(self) -> Iterator[Finding]:
        for folder in self._folders:
            try:
                free = shutil.disk_usage(folder).free
            except OSError as error:
                yield Finding(f"disk:{folder}", False, None, f"{folder} can't be looked at: {error.strerror}")
                continue
            if free < FREE_DISK_BYTES:
                yield Finding(f"disk:{folder}", False, None, f"{folder} has {free / 2**20:.0f} MiB left")
        memory = psutil.virtual_memory()
        if memory.available < FREE_MEMORY * memory.total:
            yield Finding("memory", False, None, f"{memory.available / 2**20:.0f} MiB of memory are left")


class MemoryKills:
    """Whether the system has just ended a process of this node for lack of memory, by the kernel's own count
    (``oom_kill`` in /proc/vmstat; control groups' limits count too)."""

    def __init__(self, counters: Path = Path("/proc/vmstat")) -> None:
        self._counters = counters
        self._count = self._read()
        self._rose_s = -math.inf

    def _read(self) -> int:
        try:
            lines = self._counters.read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)

    def look(self) -> bool:
        """Whether the count has risen within the last ``KILL_S`` seconds."""
        count = self._read()
        if count > self._count:
            self._count, self._rose_s = count, time.monotonic()
        return time.monotonic() - self._rose_s < KILL_S
