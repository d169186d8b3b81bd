"""Last stage: times other tiles and numbers of warps in turns with those of the tables. It changes no table; its rows
show what to change."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest import mock

from benchmarks.gpu import machine
from benchmarks.gpu.operators import shapes_of
from benchmarks.gpu.plan import Job, Lost, failure

LEAST_S = 6.0
ROUNDS = 10


@dataclass(frozen=True)
class Table:
    """Where a kernel's configuration is looked up: the attribute, a function or a constant, of the first of these
    modules that has it. others: what it might give instead, from what it gives; mode: what is timed."""

    operator: str
    modules: str
    attribute: str
    mode: str
    others: Callable[[Any], Sequence[Any]]

    def owner(self) -> Any:
        """The module. Raises LookupError."""
        for name in self.modules.split():
            path = f"llm_kernels.{self.operator}.{name}"
            if find_spec(path) and hasattr(import_module(path), self.attribute):
                return import_module(path)
        raise LookupError(f"{self.attribute} is in no module of {self.operator}: {self.modules}")


def _tiles(*wanted: tuple[int, int, int, int]) -> Callable[[Any], Sequence[Any]]:
    """Tiles of attention: queries, keys, warps, stages; the type is the table's own."""
    return lambda given: [type(given)(*numbers) for numbers in wanted if numbers != tuple(given)]


def _warps(given: Any) -> Sequence[Any]:
    """Half and twice the warps, which are a field of a table's entry, or its last number."""
    named = hasattr(given, "warps")
    warps = given.warps if named else given[-1]
    others = [other for other in (warps // 2, warps * 2) if 1 <= other <= 32]
    return [given._replace(warps=other) if named else (*given[:-1], other) for other in others]


def _halves(given: Any) -> Sequence[Any]:
    return [other for other in (given // 2, given * 2) if other]


TABLES = (
    Table("attention", "kernel", "forward_tile", "forward",
          _tiles((128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 3), (64, 128, 4, 3), (64, 64, 4, 3))),
    Table("attention", "kernel_backward", "dkdv_tile", "backward",
          _tiles((32, 128, 8, 3), (64, 128, 8, 2), (64, 64, 8, 3), (64, 64, 4, 2))),
    Table("attention", "kernel_backward", "dq_tile", "backward",
          _tiles((128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 3))),
    Table("rms_norm", "kernel", "tile", "forward", _warps),
    Table("rms_norm", "kernel", "tile", "backward", _warps),
    Table("cross_entropy", "tiles", "tile", "forward", _warps),
    Table("cross_entropy", "tiles", "tile", "backward", _warps),
    Table("swiglu", "kernel", "NUM_WARPS", "forward", _halves),
    Table("swiglu", "kernel", "BLOCK", "backward", _halves),
    Table("rope", "kernel", "NUM_WARPS", "forward", _halves),
    Table("adamw", "kernel", "NUM_WARPS", "forward", _halves),
)  # fmt: skip


def tuning(job: Job) -> dict[str, Any]:
    """Rows of every table, the table's own choice first."""
    chosen = machine.start_kernels(job.rehearse)
    from llm_kernels.device import is_lost, release

    result: dict[str, Any] = {"rows": [], "done": [], **job.previous, "left_out": []}
    for table in TABLES:
        key = f"{table.operator} {table.attribute} {table.mode}"
        if key in result["done"]:
            continue
        if job.left() < LEAST_S:
            result["left_out"].append(key)
            continue
        result["done"].append(key)
        try:
            rows = tune(table, chosen, job)
        except Exception as error:  # a table's failure is a result
            rows = [{"choice": "", "note": f"failed: {failure(error)}"}]
        result["rows"] += [{"table": key, **row} for row in rows]
        job.save(result)
        if is_lost(chosen):
            raise Lost(f"{key} has ended all CUDA work of the process")
        release(chosen)
    return result


def tune(table: Table, chosen: Any, job: Job) -> list[dict[str, Any]]:
    """Times of the table's choice and of the others on the operator's first shape; one that gives other numbers than
    the table's choice is no candidate."""
    import torch

    from llm_kernels.check import benchmark_of
    from llm_kernels.measure import Timer

    benchmark = benchmark_of(table.operator)
    shape: Mapping[str, Any] = shapes_of(table.operator, job.rehearse)[0]
    owner = table.owner()
    own = getattr(owner, table.attribute)
    torch.manual_seed(0)
    inputs = benchmark.make(shape, benchmark.dtypes[0], chosen)
    once = _call(benchmark, inputs, table.mode)
    given = _given(owner, table.attribute, once) if callable(own) else own
    options = [given, *list(table.others(given))[: 1 if job.rehearse else None]]

    def patched(value: Any) -> Callable[[], Any]:
        replacement = (lambda *_, **__: value) if callable(own) else value

        def run() -> Any:
            with mock.patch.object(owner, table.attribute, replacement):
                _forget_plans(owner)
                return once()

        return run

    calls = [patched(option) for option in options]
    wrong = _differing(calls) if not benchmark.inplace else {}
    times = Timer(chosen).rounds(calls, 2 if job.rehearse else ROUNDS)
    rows = []
    for number, (option, timed) in enumerate(zip(options, times)):
        row: dict[str, Any] = {"shape": shape["name"], "choice": str(option), "own": number == 0}
        problem = timed.problem or wrong.get(number)
        rows.append(row | ({"note": f"failed: {problem}"} if problem else {"median_ms": statistics.median(timed.ms)}))
    return rows


def _forget_plans(owner: Any) -> None:
    """A launcher keeps what it has worked out of the table for a shape."""
    for value in vars(owner).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


def _given(owner: Any, attribute: str, once: Callable[[], Any]) -> Any:
    """The table's entry for this call."""
    given: list[Any] = []
    own = getattr(owner, attribute)

    def spy(*arguments: Any, **more: Any) -> Any:
        given.append(own(*arguments, **more))
        return given[-1]

    with mock.patch.object(owner, attribute, spy):
        _forget_plans(owner)
        once()
    if not given:
        raise RuntimeError(f"{owner.__name__}.{attribute} is not asked by this operator any more")
    return given[-1]


def _call(benchmark: Any, inputs: Sequence[Any], mode: str) -> Callable[[], Any]:
    """Forward, or forward and backward where backward is what is tuned: its time is in the difference."""
    import torch

    run = benchmark.providers["ours"]()
    if mode == "forward":

        def forward() -> Any:
            with torch.no_grad():
                out = run(*inputs)
            return list(out) if isinstance(out, (tuple, list)) else [out]

        return forward
    leaves = [x for x in inputs if x.requires_grad]
    gradients: list[Any] = []

    def both() -> Any:
        out = run(*inputs)
        outputs = [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if x.requires_grad]
        if not gradients:
            gradients.extend(torch.randn_like(x) for x in outputs)
        return list(torch.autograd.grad(outputs, leaves, gradients, allow_unused=True))

    return both


def _differing(calls: Sequence[Callable[[], Any]]) -> dict[int, str]:
    """Calls whose results differ from the first one's by more than a few roundings."""
    import torch

    wanted = calls[0]()
    found = {}
    for number, call in enumerate(calls[1:], start=1):
        try:
            for x, y in zip(call(), wanted):
                scale = y.float().abs().max() if y is not None and y.numel() else torch.tensor(0.0)
                if y is not None and not torch.allclose(x.float(), y.float(), rtol=2e-2, atol=float(1e-2 * scale)):
                    found[number] = "other numbers than the table's choice gives"
        except Exception as error:  # too much shared memory, say
            found[number] = failure(error)
    return found
