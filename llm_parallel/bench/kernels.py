"""``llm-parallel bench kernels``: how fast the kernels are compared with their peers, and what they compile to."""

from __future__ import annotations

import csv
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from llm_kernels import aot, dispatch
from llm_kernels.benchmark import Benchmark
from llm_kernels.check import benchmark_of, check
from llm_parallel.bench.environment import environment
from llm_parallel.bench.gate import slower_than
from llm_parallel.bench.requests import KernelsRequest
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write
from llm_parallel.lines import say
from llm_parallel.screen import say_next, show

# Counted in the SASS of flash-attn-4 4.0.0b36 compiled for sm_90, head dim 128, tiles of 128 x 128.
PEER_LOOPS = (
    "Steady loop of FlashAttention 4 on sm_90 at head dim 128: 475 instructions per 16 HGMMA forward, 440 per 32 "
    "backward."
)


def operators_named(names: Sequence[str]) -> list[str]:
    """The operators asked for, all if none is. Raises UserError for an unknown one."""
    unknown = [name for name in names if name not in aot.OPERATORS]
    if unknown:
        raise UserError(f"--op {unknown[0]} is not an operator; there are {', '.join(aot.OPERATORS)}")
    return list(names) or list(aot.OPERATORS)


def aot_command(names: Sequence[str], archs: Sequence[int], jobs: int, out: str | None, dump: str | None) -> int:
    """Compiles every kernel configuration, prints the table; exit status 1 if one spills or lacks what it should have.

    Raises UserError if Triton is missing or interpreting, or an operator or architecture is unknown.
    """
    operators = operators_named(names)
    for arch in archs:
        if arch not in aot.ARCHS:
            raise UserError(f"--arch {arch} is not known; there are {', '.join(map(str, aot.ARCHS))}")
    if not dispatch.triton_installed():
        raise UserError(f"triton compiles the kernels, and {dispatch.triton_fault()}")
    if dispatch.interpreting():
        raise UserError("TRITON_INTERPRET is set, so kernels would be interpreted, not compiled; unset it")
    reports = aot.inspect_all(operators, archs or aot.ARCHS, jobs, Path(dump) if dump else None)
    show(f"{aot.table(reports)}\n\n{PEER_LOOPS}")
    bad = [report for report in reports if report.problems]
    seconds = sum(report.compile_s for report in reports)
    say(
        f"{len(reports)} kernel configurations, triton {version('triton')}, {seconds:.0f} compile seconds on "
        f"{platform.machine()} without a GPU; {len(bad)} with a problem."
    )
    if out:
        found = {"triton": version("triton"), "date": str(date.today()), "reports": aot.as_data(reports)}
        with atomic_write(out) as handle:
            json.dump(found, handle, indent=1)
    say_next("llm-parallel bench kernels")
    return 1 if bad else 0


def bench_command(request: KernelsRequest) -> int:
    """Checks, then measures; without a GPU checks and says what a run on one would measure; with ``aot`` compiles only.
    Exit status 1 if an operator is wrong or slower than the baseline allows. Raises UserError for what is unknown."""
    if request.aot:
        return aot_command(request.operators, request.archs, request.jobs, request.out, request.dump)
    benchmarks = [_narrowed(benchmark_of(name), request) for name in operators_named(request.operators)]
    if not any(benchmark.shapes for benchmark in benchmarks):
        of = ", ".join(request.operators) or "any operator"
        raise UserError(f"--shape {request.shapes[0]} is in no shape's name of {of}; without --shape all are measured")
    wrong = check_all([benchmark.name for benchmark in benchmarks], request.environment)
    for name, problem in wrong.items():
        say(f"{name}: {'right' if problem is None else problem}")
    if not torch.cuda.is_available():
        say("\nThere is no GPU here, so nothing is timed. On one, this would be measured, forward and backward:")
        show(_plan(benchmarks))
        say_next("llm-parallel bench kernels --aot")
        return 1 if any(wrong.values()) else 0
    right = [benchmark for benchmark in benchmarks if wrong[benchmark.name] is None]
    return max(_measure(right, request, torch.device("cuda")), int(any(wrong.values())))


def check_all(operators: Sequence[str], environment: Mapping[str, str]) -> dict[str, str | None]:
    """Each operator's problem, None where it is right: here on a GPU, else in a process that interprets."""
    if torch.cuda.is_available():
        return {name: check(name) for name in operators}
    if not dispatch.triton_installed():
        say(f"{dispatch.triton_fault()}: the kernels can't be checked, only their references would run")
        return dict.fromkeys(operators)
    command = [sys.executable, "-m", "llm_kernels.check", "--op", *operators]
    interpreting = {**environment, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, env=interpreting, capture_output=True, text=True)
    if not done.stdout.strip():
        raise RuntimeError(f"the check of the kernels died: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _narrowed(benchmark: Benchmark, request: KernelsRequest) -> Benchmark:
    """Only the shapes and the dtype asked for."""
    shapes = [s for s in benchmark.shapes if not request.shapes or any(part in s["name"] for part in request.shapes)]
    dtypes = benchmark.dtypes
    if request.dtype is not None:
        known = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        if request.dtype not in known:
            raise UserError(f"--dtype {request.dtype} is not one of {', '.join(known)}")
        dtypes = (known[request.dtype],)
    return replace(benchmark, shapes=shapes, dtypes=dtypes)


def _plan(benchmarks: Sequence[Benchmark]) -> str:
    lines = ["| operator | shapes | dtypes | providers |", "|" + " --- |" * 4]
    for b in benchmarks:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in b.dtypes)
        lines.append(f"| {b.name} | {', '.join(s['name'] for s in b.shapes)} | {dtypes} | {', '.join(b.providers)} |")
    return "\n".join(lines)


def _measure(benchmarks: Sequence[Benchmark], request: KernelsRequest, device: torch.device) -> int:
    """Prints and writes each operator's rows as soon as they are there. Exit status 1 if one of ours has no time, or is
    slower than the baseline allows."""
    from llm_kernels import measure

    card = measure.measure_card(device)
    say(
        f"{card.name}: copy {card.copy_bytes_per_s / 1e9:.0f} GB/s, bf16 product {card.matmul_flops_per_s / 1e12:.0f} "
        "TFLOP/s, both measured here now"
    )
    result: dict[str, Any] = {"environment": environment(), "card": vars(card), "rows": []}
    failed = 0
    for _, rows in measure.measure_all(benchmarks, card, device, request.rounds):
        show(f"{measure.table(rows)}\n")
        result["rows"] += measure.as_data(rows)
        failed |= int(any(row.provider == "ours" and row.median_ms is None for row in rows))
        if request.out:
            write_data(Path(request.out), result)
    if request.out and result["rows"]:
        write_result(Path(request.out), result)
    failed = max(failed, slower_than(request.baseline, result, request.min_ratio) if request.baseline else 0)
    say_next(
        "llm-parallel bench kernels " + (f"--baseline {request.out}.json" if request.out else "--out runs/kernels")
    )
    return failed


def write_data(prefix: Path, result: dict[str, Any]) -> None:
    """Writes the result as JSON and CSV."""
    with atomic_write(f"{prefix}.json") as handle:
        json.dump(result, handle, indent=1)
    with atomic_write(f"{prefix}.csv") as handle:
        writer = csv.DictWriter(handle, list(result["rows"][0]))
        writer.writeheader()
        writer.writerows(result["rows"])


def write_result(prefix: Path, result: dict[str, Any]) -> None:
    """Writes the result as JSON and CSV, and draws two pictures of it."""
    from llm_parallel.bench.plots import plot_bars, plot_roofline

    write_data(prefix, result)
    plot_bars(result, Path(f"{prefix}_bars.png"))
    plot_roofline(result, Path(f"{prefix}_roofline.png"))
