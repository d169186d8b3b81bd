"""A quick check that every operator is right on its small shape: ``python -m llm_kernels.check``.

On a GPU the compiled kernels run; without one (TRITON_INTERPRET=1) the kernels run in Triton's interpreter under the
memory checker. Benchmarks run this check first and do not time an operator that fails it; the operators' test files
test far more.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch

from llm_kernels import dispatch
from llm_kernels.aot import OPERATORS
from llm_kernels.benchmark import Benchmark, Shape
from llm_kernels.measure import said
from llm_kernels.memory_checker import Traffic, check_memory_accesses
from llm_kernels.testing import compare, default_device


def benchmark_of(operator: str) -> Benchmark:
    """The ``BENCHMARK`` of the operator with this name."""
    return import_module(f"llm_kernels.{operator}.bench").BENCHMARK


def check(operator: str, shape: Shape | None = None) -> str | None:
    """Compares the errors of an operator and of torch's in the same dtype, against fp64; by default on its small shape.
    Returns None if the operator is right, else a line that says what is wrong."""
    try:
        benchmark, device = benchmark_of(operator), default_device()
        dispatch.backend_for(torch.empty(0, device=device), "triton")
        ours, peer = benchmark.providers["ours"](), benchmark.providers["torch"]()
        for dtype in benchmark.dtypes:
            torch.manual_seed(0)
            inputs = benchmark.make(shape or benchmark.small, dtype, device)
            with nullcontext() if device.type == "cuda" else check_memory_accesses() as traffic:
                if benchmark.inplace:
                    _compare_inplace(ours, peer, inputs, traffic)
                else:
                    compare(f"{operator}/check", ours, peer, peer, inputs)
    except Exception as error:  # an operator that fails in any way must not be timed
        return said(error)
    return None


def _compare_inplace(ours: Any, peer: Any, inputs: Sequence[torch.Tensor], traffic: Traffic | None) -> None:
    """Asserts that an operator that overwrites its inputs leaves torch's numbers there, to a few roundings."""
    found = [x.detach().clone() for x in inputs]
    wanted = [x.detach().clone() for x in inputs]
    if traffic is not None:
        traffic.reachable = lambda: found
    ours(*found)
    peer(*wanted)
    for x, y in zip(found, wanted):
        torch.testing.assert_close(x, y)


def traffic(operator: str) -> Iterator[tuple[str, int, int]]:
    """(forward or backward, bytes moved, least bytes) of an operator on its small shape, counted in the interpreter.
    Yields nothing for an operator that is not bound by memory."""
    benchmark, device = benchmark_of(operator), default_device()
    if benchmark.bytes_moved is None:
        return
    dispatch.backend_for(torch.empty(0, device=device), "triton")
    dtype = benchmark.dtypes[0]
    inputs = benchmark.make(benchmark.small, dtype, device)
    least = benchmark.bytes_moved(benchmark.small, dtype)
    with check_memory_accesses() as counted:
        counted.reachable = lambda: inputs
        out = benchmark.providers["ours"]()(*inputs)
        forward = counted.bytes_loaded + counted.bytes_stored
        yield "forward", forward, least.forward
        if benchmark.has_backward:
            outputs = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
            leaves = [x for x in inputs if x.requires_grad]
            torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])
            yield "backward", counted.bytes_loaded + counted.bytes_stored - forward, least.backward


def print_traffic(operators: Sequence[str]) -> int:
    """Prints the table of bytes moved; exit status 1 if an operator moves over 3 % more than the least."""
    print("| operator | pass | bytes moved | least | ratio |")
    print("|" + " --- |" * 5)
    worst = 0.0
    for name in operators:
        for direction, moved, least in traffic(name):
            worst = max(worst, moved / least)
            print(f"| {name} | {direction} | {moved:,} | {least:,} | {moved / least:.4f} |")
    return int(worst > 1.03)


def main() -> int:
    """Prints a JSON object that maps each operator to null or to what is wrong; exit status 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", nargs="*", default=list(OPERATORS), choices=OPERATORS)
    parser.add_argument("--bytes", action="store_true", help="count bytes in the interpreter instead")
    arguments = parser.parse_args()
    if arguments.bytes:
        return print_traffic(arguments.op)
    found = {name: check(name) for name in arguments.op}
    print(json.dumps(found))
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
