"""Times operators of several providers on one GPU, beside what that very card can do at most.

Providers take turns, round by round in rotated order, so that all see the same clocks and temperature; before every
run the L2 cache is flushed. Backward is timed alone, on a graph that is kept. Bytes and FLOPs are the minimum that the
operator cannot do without (llm_kernels.benchmark), so a fraction of the card's measured copy bandwidth or matrix
product rate says how much is left to win. A provider that is not installed, or fails, is a row that says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llm_kernels.benchmark import Benchmark, Shape

MODES = ("forward", "backward", "both")
_GIB = 1 << 30


@dataclass(frozen=True)
class Card:
    """One GPU as measured: bytes/s of a copy (read and written bytes), FLOP/s of a bf16 matrix product."""

    name: str
    copy_bytes_per_s: float
    matmul_flops_per_s: float


@dataclass(frozen=True)
class Row:
    """One measurement. Times are of one call in ms: median and the 20th and 80th percentile over rounds. ``fraction``
    is of the card's measured copy bandwidth where ``bound`` is memory, of its matrix product rate where it is compute.
    """

    operator: str
    shape: str
    dtype: str
    mode: str
    provider: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    fraction: float | None = None
    bound: str = "memory"
    peak_mib: float | None = None
    note: str = ""


def measure_card(device: torch.device) -> Card:
    """Copy bandwidth of 1 GiB and rate of an 8192^3 bf16 product, medians of 20."""
    source = torch.empty(_GIB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = statistics.median(Timer(device).rounds([partial(target.copy_, source)], 20)[0])
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    product_ms = statistics.median(Timer(device).rounds([partial(torch.matmul, a, b)], 20)[0])
    name = torch.cuda.get_device_name(device)
    return Card(name, 2 * _GIB / copy_ms * 1e3, 2 * 8192**3 / product_ms * 1e3)


class Timer:
    """CUDA events around single calls, with the L2 cache flushed before each."""

    def __init__(self, device: torch.device) -> None:
        # Twice the 50 MB of an H100's L2 and more; zeroing it evicts whatever the call before left.
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)

    def rounds(
        self, calls: Sequence[Callable[[], Any]], rounds: int, prepare: Sequence[Callable[[], Any]] | None = None
    ) -> list[list[float]]:
        """Times of each call in ms, ``rounds`` of each, interleaved; ``prepare`` runs untimed before its call."""
        for index, call in enumerate(calls):
            for _ in range(3):
                if prepare:
                    prepare[index]()
                call()
        torch.cuda.synchronize()
        events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
        for turn in range(rounds):
            for step in range(len(calls)):
                index = (turn + step) % len(calls)
                if prepare:
                    prepare[index]()
                self._flush.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                calls[index]()
                end.record()
                events[index].append((start, end))
        torch.cuda.synchronize()
        return [[start.elapsed_time(end) for start, end in pairs] for pairs in events]


@dataclass
class _Contender:
    """One provider on one shape: its callable and its own copy of the inputs."""

    provider: str
    call: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    outputs: list[Tensor]
    gradients: list[Tensor]

    def forward(self) -> Any:
        """Forward alone, without a graph."""
        with torch.no_grad():
            return self.call(*self.inputs)

    def both(self) -> None:
        """Forward and backward."""
        outputs = _differentiable(self.call(*self.inputs))
        torch.autograd.grad(outputs, self.leaves, self.gradients, allow_unused=True)

    def backward(self) -> None:
        """Backward alone."""
        torch.autograd.grad(self.outputs, self.leaves, self.gradients, retain_graph=True, allow_unused=True)

    @property
    def leaves(self) -> list[Tensor]:
        """Inputs that want a gradient."""
        return [x for x in self.inputs if x.requires_grad]


def _differentiable(out: Any) -> list[Tensor]:
    outputs = out if isinstance(out, (tuple, list)) else (out,)
    return [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]


def measure(
    benchmark: Benchmark, card: Card, device: torch.device, shapes: Sequence[Shape], rounds: int = 20
) -> Iterator[Row]:
    """Rows of all providers on the given shapes, in every mode that the operator has."""
    for shape in shapes:
        for dtype in benchmark.dtypes:
            contenders, missing = _contenders(benchmark, shape, dtype, device)
            for provider, reason in missing:
                yield Row(benchmark.name, shape["name"], _name(dtype), "all", provider, note=reason)
            for mode in MODES if benchmark.has_backward else ("forward",):
                yield from _measure_mode(benchmark, card, device, (shape, dtype, mode), contenders, rounds)
            del contenders
            torch.cuda.empty_cache()


def _contenders(
    benchmark: Benchmark, shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[list[_Contender], list[tuple[str, str]]]:
    """Providers that run, and those that don't with the reason."""
    running, missing = [], []
    for provider, load in benchmark.providers.items():
        try:
            call = load()
            torch.manual_seed(0)
            inputs = benchmark.make(shape, dtype, device)
            outputs = _differentiable(call(*inputs)) if benchmark.has_backward else []
            gradients = [torch.randn_like(x) for x in outputs]
            contender = _Contender(provider, call, inputs, outputs, gradients)
            if benchmark.has_backward:
                contender.backward()
            torch.cuda.synchronize()
            running.append(contender)
        except ImportError as error:
            missing.append((provider, f"not installed ({error.name or error})"))
        except Exception as error:  # a peer's failure is a result, not the end of the benchmark
            missing.append((provider, f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}"))
            if provider == "ours":
                raise
    return running, missing


def _measure_mode(
    benchmark: Benchmark,
    card: Card,
    device: torch.device,
    what: tuple[Shape, torch.dtype, str],
    contenders: Sequence[_Contender],
    rounds: int,
) -> Iterator[Row]:
    shape, dtype, mode = what
    times = Timer(device).rounds([getattr(contender, mode) for contender in contenders], rounds)
    for contender, found in zip(contenders, times):
        peak = _peak_mib(getattr(contender, mode), device)
        low, middle, high = (statistics.quantiles(found, n=10)[i] for i in (1, 4, 7))
        rates = _rates(benchmark, card, shape, dtype, mode, middle)
        yield Row(
            benchmark.name, shape["name"], _name(dtype), mode, contender.provider, middle, low, high,
            peak_mib=peak, **rates,
        )  # fmt: skip


def _rates(benchmark: Benchmark, card: Card, shape: Shape, dtype: torch.dtype, mode: str, ms: float) -> dict[str, Any]:
    """GB/s or TFLOP/s, and the fraction of what the card does at most."""
    if benchmark.flops is not None:
        work, scale, most, key = benchmark.flops(shape), 1e12, card.matmul_flops_per_s, "tflop_per_s"
    else:
        assert benchmark.bytes_moved is not None
        work, scale, most, key = benchmark.bytes_moved(shape, dtype), 1e9, card.copy_bytes_per_s, "gb_per_s"
    amount = {"forward": work.forward, "backward": work.backward, "both": work.forward + work.backward}[mode]
    rate = amount / ms * 1e3
    return {key: rate / scale, "fraction": rate / most, "bound": "compute" if benchmark.flops else "memory"}


def _peak_mib(call: Callable[[], Any], device: torch.device) -> float:
    """Memory that one call allocates above what was there, in MiB."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated(device) - before) / (1 << 20)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| operator | shape | mode | provider | ms (p20 to p80) | rate | of measured peak | peak MiB |"]
    lines.append("|" + " --- |" * 8)
    for row in rows:
        head = f"| {row.operator} | {row.shape} | {row.mode} | {row.provider} |"
        if row.median_ms is None:
            lines.append(f"{head} {row.note} | | | |")
            continue
        rate = f"{row.gb_per_s:.0f} GB/s" if row.gb_per_s is not None else f"{row.tflop_per_s:.0f} TFLOP/s"
        lines.append(
            f"{head} {row.median_ms:.4f} ({row.p20_ms:.4f} to {row.p80_ms:.4f}) | {rate} | {row.fraction:.0%} | "
            f"{row.peak_mib:.0f} |"
        )
    return "\n".join(lines)


def as_data(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain data, for JSON and CSV."""
    return [asdict(row) for row in rows]
