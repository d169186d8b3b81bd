"""Short tests that a device computes right and fast, and that replicas agree, cheap enough to run between steps."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_parallel.parallel.engine import Models, network_of

SIZE = {"cuda": 4096, "cpu": 192}
REPEATS = 3
SCHEDULED = Path("/proc/thread-self/schedstat")
"""Nanoseconds for which the reading thread ran, and for which it waited for a processor (Linux)."""


class Suspect(RuntimeError):
    """This step's result is in doubt and must be made again. ``kind``: what is wrong with this process ("disagrees",
    "not finite", "unhealthy"), empty if nothing is known to be wrong with it; ``samples``: first and last of the
    step."""

    def __init__(
        self, kind: str, message: str, step: int | None = None, samples: tuple[int, int] | None = None
    ) -> None:
        super().__init__(message)
        self.kind, self.step, self.samples = kind, step, samples


def processor_s() -> float:
    """Seconds of a clock that stands still while this thread waits for a processor, which other programs of the host
    have: that tells nothing of the device. A process that is stopped does not wait for one."""
    try:
        waited_ns = int(SCHEDULED.read_text().split()[1])
    except (OSError, IndexError, ValueError):  # a kernel without it
        waited_ns = 0
    return time.perf_counter() - 1e-9 * waited_ns


class DeviceProbe:
    """A matmul of small whole numbers, whose result is exact in any order of summation, timed."""

    def __init__(self, device: torch.device) -> None:
        size = SIZE[device.type]
        rows = torch.arange(size, device=device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        # Products are at most 49 and rows are shorter than 2^24 / 49: every sum is exact in fp32.
        self._a = ((rows[:, None] * 3 + rows[None, :]) % 8 - 4).to(dtype)
        self._b = ((rows[:, None] + rows[None, :] * 5) % 7 - 3).to(dtype)
        a, b = self._a.cpu().double(), self._b.cpu().double()
        self._answer = (a[:64] @ b).to(device)

    def run(self) -> float:
        """Seconds of the fastest of ``REPEATS`` products. Raises Suspect if the result is wrong."""
        best = float("inf")
        for _ in range(REPEATS):
            self._wait()
            started = self._now()
            product = torch.mm(self._a.float(), self._b.float()) if self._a.is_cpu else torch.mm(self._a, self._b)
            self._wait()
            best = min(best, self._now() - started)
        wrong = int((product[:64].double() - self._answer).abs().gt(self._answer.abs() / 128).sum())
        if wrong or not bool(torch.isfinite(product).all()):
            raise Suspect("unhealthy", f"a matmul with a known answer had {wrong} wrong numbers")
        return best

    def _now(self) -> float:
        return processor_s() if self._a.is_cpu else time.perf_counter()

    def _wait(self) -> None:
        if self._a.is_cuda:
            torch.cuda.synchronize(self._a.device)


class Stopwatch:
    """Seconds that this process takes for a micro batch before it waits for the other replicas, on average: reading,
    forward, backward. On a GPU it is the device's time, read a step later so that nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began: Any = None
        self._running: list[tuple[Any, Any, int]] = []
        self._seconds, self._micro_batches, self._steps = 0.0, 0, 0

    def start(self, micro_batches: int) -> None:
        """Begins to time a step of this many micro batches."""
        self._read()
        self._began = (self._now(), micro_batches)

    def stop(self) -> None:
        """Ends the time of a step, whose gradient is computed. Evaluations, for which ``start`` is not called, do not
        count."""
        if self._began is not None:
            self._running.append((self._began[0], self._now(), self._began[1]))
            self._began = None

    def mean_s(self) -> float:
        """Seconds of a micro batch since the last call; 0 if none was timed. The first step, which allocates and
        compiles, is left out."""
        self._read()
        mean = self._seconds / self._micro_batches if self._micro_batches else 0.0
        self._seconds, self._micro_batches = 0.0, 0
        return mean

    def _read(self) -> None:
        for began, ended, micro_batches in self._running:
            self._steps += 1
            if self._steps > 1:
                self._seconds += began.elapsed_time(ended) / 1e3 if self._device.type == "cuda" else ended - began
                self._micro_batches += micro_batches
        self._running.clear()

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return processor_s()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def weights_checksum(models: Models) -> Tensor:
    """int64 [1]: sum of the bit patterns of this process's weights, each weighted by its place in a cycle of primes so
    that exchanged values show too."""
    total = torch.zeros(1, dtype=torch.int64)
    weights = [p for model in models.values() for chunk in network_of(model).models for p in chunk.parameters()]
    held = [part for weight in weights for part in (weight.stored.tensors if hasattr(weight, "stored") else (weight,))]
    for number, tensor in enumerate(held):
        integers = tensor.detach().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])
        total += integers.sum(dtype=torch.int64).cpu() * (2 * number + 1)
    return total


def odd_one_out(checksums: Sequence[int], mine: int) -> bool:
    """Whether number ``mine`` differs from what more than half of all have in common."""
    value, count = Counter(checksums).most_common(1)[0]
    return count * 2 > len(checksums) and checksums[mine] != value
