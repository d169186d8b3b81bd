"""Times the operators of several providers on one GPU, and compares them with the measured peak of that same card.

Providers run in turn, in an order that rotates from round to round, so that all of them see the same clock rates and
temperatures. The L2 cache is flushed before every run. The flush takes longer than the host needs to queue the call, so
the GPU's time does not contain waiting for the host; the host's time is reported beside it. Backward is timed alone: on
a graph that is kept or, where backward overwrites what forward saved, on a graph that is made before every run, outside
of the measured time. Bytes and FLOPs are the least that the operator needs (llm_kernels.benchmark), so their fraction
of the card's measured copy bandwidth or matrix product rate says how much faster the operator could become. A provider
that is not installed or that fails gets a row that says so; the other rows are measured all the same.

On a CPU the same code runs with the host's clock. That is a rehearsal, and its times say nothing about a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llm_kernels import device as on
from llm_kernels.benchmark import Benchmark, Shape

MODES = ("forward", "backward", "both")
_MIB = 1 << 20
# The flush keeps an H200 busy for about a millisecond, longer than any operator's host time (0.36 ms at most).
_FLUSHES = 16


class DeviceLost(RuntimeError):
    """A provider's kernel failed in a way after which no CUDA call of this process works, so measuring must stop."""

    def __init__(self, provider: str) -> None:
        super().__init__(f"{provider} has ended all CUDA work of this process")
        self.provider = provider


@dataclass(frozen=True)
class Card:
    """One GPU as measured: bytes/s of a copy (read and written bytes), FLOP/s of a bf16 matrix product."""

    name: str
    copy_bytes_per_s: float
    matmul_flops_per_s: float


@dataclass(frozen=True)
class Row:
    """One measurement. Times are of one call in ms: the median and the 20th and 80th percentile over all rounds;
    ``host_us`` is the median time that the host took to queue the call. ``fraction`` is of the card's measured copy
    bandwidth where ``bound`` is memory, and of its matrix product rate where ``bound`` is compute.
    """

    operator: str
    shape: str
    dtype: str
    mode: str
    provider: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    host_us: float | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    fraction: float | None = None
    bound: str = "memory"
    peak_mib: float | None = None
    note: str = ""


def measure_card(device: torch.device) -> Card:
    """Bandwidth of a 1 GiB copy and rate of an 8192^3 bf16 product, medians of 20; on a CPU of tiny ones."""
    size, side, rounds = (1 << 30, 8192, 20) if device.type == "cuda" else (1 << 16, 64, 2)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    copy, product = Timer(device).rounds([partial(target.copy_, source), partial(torch.matmul, a, b)], rounds)
    for timed in (copy, product):
        if timed.problem:
            raise RuntimeError(f"the card cannot be measured: {timed.problem}")
    copy_ms, product_ms = (statistics.median(timed.ms) for timed in (copy, product))
    return Card(on.name_of(device), 2 * size / copy_ms * 1e3, 2 * side**3 / product_ms * 1e3)


@dataclass
class Timed:
    """The times of one call, or the error that it raised."""

    ms: list[float] = field(default_factory=list)
    host_us: list[float] = field(default_factory=list)
    problem: str | None = None


class Timer:
    """Measures single calls by events, after flushing the L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Over four times the L2 cache of an H100 or H200 (50 or 60 MB): zeroing it evicts what the last call left.
        size = 256 * _MIB if device.type == "cuda" else 1024
        self._flush = torch.empty(size, dtype=torch.uint8, device=device)
        self.lost_by: int | None = None
        """Index of the call after which no CUDA call of this process works, if there was one."""

    def rounds(
        self, calls: Sequence[Callable[[], Any]], rounds: int, prepare: Sequence[Callable[[], Any]] | None = None
    ) -> list[Timed]:
        """Times every call ``rounds`` times, interleaved with the others. ``prepare`` has for each call a function that
        runs before it and is not timed. A call that raises is not made again."""
        before = prepare or [_nothing] * len(calls)
        found = [Timed() for _ in calls]
        warmup = 3 if self.device.type == "cuda" else 1
        order = [index for index in range(len(calls)) for _ in range(warmup)]
        order += [(turn + step) % len(calls) for turn in range(rounds) for step in range(len(calls))]
        for number, index in enumerate(order):
            timed = found[index]
            if timed.problem is not None:
                continue
            try:
                ms, host_us = self._once(before[index], calls[index])
            except Exception as error:  # the failure of a peer is a result and must not end the benchmark
                timed.problem = said(error)
                if on.is_lost(self.device):
                    self.lost_by = index
                    break
                continue
            if number >= warmup * len(calls):
                timed.ms.append(ms)
                timed.host_us.append(host_us)
        return found

    def _once(self, prepare: Callable[[], Any], call: Callable[[], Any]) -> tuple[float, float]:
        prepare()
        on.synchronize(self.device)
        for _ in range(_FLUSHES):
            self._flush.zero_()
        start, end = on.event(self.device), on.event(self.device)
        start.record()
        began = time.perf_counter()
        call()
        host_us = (time.perf_counter() - began) * 1e6
        end.record()
        on.synchronize(self.device)
        return start.elapsed_time(end), host_us


def _nothing() -> None:
    pass


@dataclass
class _Contender:
    """One provider on one shape: its callable and its own copy of the inputs. repeatable: backward may run several
    times on the graph of one forward."""

    provider: str
    call: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    outputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    repeatable: bool = True

    def forward(self) -> Any:
        """Runs forward alone, without recording a graph."""
        with torch.no_grad():
            return self.call(*self.inputs)

    def both(self) -> None:
        """Runs forward and backward."""
        outputs = _differentiable(self.call(*self.inputs))
        torch.autograd.grad(outputs, self.leaves, self.gradients, allow_unused=True)

    def backward(self) -> None:
        """Runs backward alone, on the graph that make_graph has recorded."""
        torch.autograd.grad(self.outputs, self.leaves, self.gradients, retain_graph=self.repeatable, allow_unused=True)

    def make_graph(self) -> None:
        """Runs forward and keeps its graph for backward."""
        self.outputs = _differentiable(self.call(*self.inputs))

    def ready(self) -> None:
        """Prepares one run of backward: makes a new graph where backward overwrites what forward saved."""
        if not self.repeatable:
            self.make_graph()

    def start(self, device: torch.device) -> None:
        """Runs everything once, and finds out whether backward may run twice on one graph."""
        self.make_graph()
        self.gradients = [torch.randn_like(x) for x in self.outputs]
        self.backward()
        on.synchronize(device)
        try:
            self.backward()
        except RuntimeError:
            self.repeatable = False
            self.make_graph()
            self.backward()
        on.synchronize(device)

    @property
    def leaves(self) -> list[Tensor]:
        """The inputs that require a gradient."""
        return [x for x in self.inputs if x.requires_grad]


def _differentiable(out: Any) -> list[Tensor]:
    outputs = out if isinstance(out, (tuple, list)) else (out,)
    return [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]


def measure(
    benchmark: Benchmark, card: Card, device: torch.device, shapes: Sequence[Shape], rounds: int = 20
) -> Iterator[Row]:
    """The rows of all providers on the given shapes, in every mode that the operator has.

    Raises DeviceLost after the row of the provider that caused it."""
    for shape in shapes:
        for dtype in benchmark.dtypes:
            contenders: list[_Contender] = []
            for provider, load in benchmark.providers.items():
                contender, problem = _contender(benchmark, provider, load, (shape, dtype, device))
                if contender is not None:
                    contenders.append(contender)
                    continue
                yield Row(benchmark.name, shape["name"], _name(dtype), "all", provider, note=problem)
                if on.is_lost(device):
                    raise DeviceLost(provider)
            for mode in MODES if benchmark.has_backward else ("forward",):
                yield from _measure_mode(benchmark, card, device, (shape, dtype, mode), contenders, rounds)
            contenders.clear()
            on.release(device)


def measure_all(
    benchmarks: Sequence[Benchmark], card: Card, device: torch.device, rounds: int = 20
) -> Iterator[tuple[str, list[Row]]]:
    """Yields (operator, its rows) for each. An operator that can't be measured has one row with the reason, and so has
    every operator after one that raised DeviceLost."""
    lost: DeviceLost | None = None
    for benchmark in benchmarks:
        rows: list[Row] = []
        try:
            if lost is not None:
                raise lost
            for row in measure(benchmark, card, device, benchmark.shapes, rounds):
                rows.append(row)
        except DeviceLost as error:
            lost = error
            note = f"not measured{' further' if rows else ''}: {error}; measure {benchmark.name} in a run of its own"
            rows.append(Row(benchmark.name, "", "", "all", "ours", note=note))
        except Exception as error:  # the failure of an operator is a result and must not end the benchmark
            rows.append(Row(benchmark.name, "", "", "all", "ours", note=f"failed: {said(error)}"))
        yield benchmark.name, rows


def _contender(
    benchmark: Benchmark, provider: str, load: Callable[[], Callable[..., Any]], what: tuple[Any, ...]
) -> tuple[_Contender | None, str]:
    """The provider after a first run of everything; or None, and the reason why it could not run."""
    device = what[2]
    try:
        call = load()
        torch.manual_seed(0)
        contender = _Contender(provider, call, benchmark.make(*what))
        if benchmark.has_backward:
            contender.start(device)
        else:
            contender.forward()
            on.synchronize(device)
    except ImportError as error:
        return None, f"not installed ({error.name or error})"
    except Exception as error:  # the failure of a peer is a result and must not end the benchmark
        return None, f"failed: {said(error)}"
    return contender, ""


def _measure_mode(
    benchmark: Benchmark,
    card: Card,
    device: torch.device,
    what: tuple[Shape, torch.dtype, str],
    contenders: Sequence[_Contender],
    rounds: int,
) -> Iterator[Row]:
    shape, dtype, mode = what
    calls = [getattr(contender, mode) for contender in contenders]
    prepare = [contender.ready if mode == "backward" else _nothing for contender in contenders]
    timer = Timer(device)
    times = timer.rounds(calls, rounds, prepare)
    if timer.lost_by is not None:
        provider = contenders[timer.lost_by].provider
        problem = f"failed: {times[timer.lost_by].problem}"
        yield Row(benchmark.name, shape["name"], _name(dtype), mode, provider, note=problem)
        raise DeviceLost(provider)
    for contender, call, ready, timed in zip(contenders, calls, prepare, times):
        about = Row(benchmark.name, shape["name"], _name(dtype), mode, contender.provider)
        if timed.problem is None:
            try:
                ready()
                peak = on.peak_bytes(call, device) / _MIB
            except Exception as error:  # as in _contender
                timed.problem = said(error)
        if timed.problem is not None:
            yield _with(about, note=f"failed: {timed.problem}")
            if on.is_lost(device):
                raise DeviceLost(contender.provider)
            continue
        low, middle, high = (statistics.quantiles(timed.ms, n=10, method="inclusive")[i] for i in (1, 4, 7))
        rates = _rates(benchmark, card, shape, dtype, mode, middle)
        host_us = statistics.median(timed.host_us)
        yield _with(about, median_ms=middle, p20_ms=low, p80_ms=high, host_us=host_us, peak_mib=peak, **rates)


def _with(row: Row, **found: Any) -> Row:
    return Row(**asdict(row) | found)


def _rates(benchmark: Benchmark, card: Card, shape: Shape, dtype: torch.dtype, mode: str, ms: float) -> dict[str, Any]:
    """GB/s or TFLOP/s, and the fraction of the card's measured peak."""
    if benchmark.flops is not None:
        work, scale, most, key = benchmark.flops(shape), 1e12, card.matmul_flops_per_s, "tflop_per_s"
    else:
        assert benchmark.bytes_moved is not None
        work, scale, most, key = benchmark.bytes_moved(shape, dtype), 1e9, card.copy_bytes_per_s, "gb_per_s"
    amount = {"forward": work.forward, "backward": work.backward, "both": work.forward + work.backward}[mode]
    rate = amount / ms * 1e3
    return {key: rate / scale, "fraction": rate / most, "bound": "compute" if benchmark.flops else "memory"}


def said(error: Exception) -> str:
    """The exception's type and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| operator | shape | mode | provider | ms (p20 to p80) | rate | of measured peak | peak MiB | host µs |"]
    lines.append("|" + " --- |" * 9)
    for row in rows:
        head = f"| {row.operator} | {row.shape} | {row.mode} | {row.provider} |"
        if row.median_ms is None:
            lines.append(f"{head} {row.note} | | | | |")
            continue
        rate = f"{row.gb_per_s:.0f} GB/s" if row.gb_per_s is not None else f"{row.tflop_per_s:.0f} TFLOP/s"
        host = "" if row.host_us is None else f"{row.host_us:.0f}"
        lines.append(
            f"{head} {row.median_ms:.4f} ({row.p20_ms:.4f} to {row.p80_ms:.4f}) | {rate} | {row.fraction:.0%} | "
            f"{row.peak_mib:.0f} | {host} |"
        )
    return "\n".join(lines)


def as_data(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as dictionaries, for JSON and CSV."""
    return [asdict(row) for row in rows]
