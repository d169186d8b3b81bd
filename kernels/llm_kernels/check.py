"""Quick correctness of every operator on its small shape, before anything is timed: ``python -m llm_kernels.check``.

On a GPU the kernels run as they are; without one, in Triton's interpreter under the memory checker
(TRITON_INTERPRET=1). The full tests are the operators' test files; this is what a benchmark runs behind.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch

from llm_kernels import dispatch
from llm_kernels.aot import OPERATORS
from llm_kernels.benchmark import Benchmark
from llm_kernels.guard import Traffic, guard
from llm_kernels.testing import compare, default_device


def benchmark_of(operator: str) -> Benchmark:
    """The benchmark description of an operator by name."""
    return import_module(f"llm_kernels.{operator}.bench").BENCHMARK


def check(operator: str) -> str | None:
    """Compares an operator with torch's in the same dtype against fp64; None if it is right, else what is wrong."""
    benchmark, device = benchmark_of(operator), default_device()
    dispatch.backend_for(torch.empty(0, device=device), "triton")
    ours, peer = benchmark.providers["ours"](), benchmark.providers["torch"]()
    try:
        for dtype in benchmark.dtypes:
            torch.manual_seed(0)
            inputs = benchmark.make(benchmark.small, dtype, device)
            with nullcontext() if device.type == "cuda" else guard() as traffic:
                if benchmark.inplace:
                    _compare_inplace(ours, peer, inputs, traffic)
                else:
                    compare(f"{operator}/check", ours, peer, peer, inputs)
    except Exception as error:  # whatever went wrong, the operator is not to be timed
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def _compare_inplace(ours: Any, peer: Any, inputs: Sequence[torch.Tensor], traffic: Traffic | None) -> None:
    """An operator that writes over its inputs leaves there what torch's leaves, to a few roundings."""
    found = [x.detach().clone() for x in inputs]
    wanted = [x.detach().clone() for x in inputs]
    if traffic is not None:
        traffic.reachable = lambda: found
    ours(*found)
    peer(*wanted)
    for x, y in zip(found, wanted):
        torch.testing.assert_close(x, y)


def main() -> int:
    """Prints a JSON object, operator → null or what is wrong; exit status 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", nargs="*", default=list(OPERATORS), choices=OPERATORS)
    found = {name: check(name) for name in parser.parse_args().op}
    print(json.dumps(found))
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
