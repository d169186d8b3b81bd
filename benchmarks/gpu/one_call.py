"""``python -m benchmarks.gpu.one_call [--rehearse] OPERATOR SHAPE``: forward and backward of one operator, once, for a
profiler to look at."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.gpu import machine


def main(arguments: Sequence[str]) -> None:
    """Runs it. Raises StopIteration for a shape that the operator does not have."""
    rehearse = "--rehearse" in arguments
    operator, name = [argument for argument in arguments if argument != "--rehearse"]
    chosen = machine.start_kernels(rehearse)
    import torch

    from benchmarks.gpu.operators import shapes_of
    from llm_kernels.check import benchmark_of
    from llm_kernels.device import synchronize

    benchmark = benchmark_of(operator)
    shapes = shapes_of(operator, rehearse)
    shape = shapes[0] if rehearse else next(s for s in [*shapes, *benchmark.shapes] if s["name"].startswith(name))
    inputs = benchmark.make(shape, benchmark.dtypes[0], chosen)
    out = benchmark.providers["ours"]()(*inputs)
    if benchmark.has_backward:
        outputs = [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if x.requires_grad]
        leaves = [x for x in inputs if x.requires_grad]
        torch.autograd.grad(outputs, leaves, [torch.randn_like(x) for x in outputs])
    synchronize(chosen)


if __name__ == "__main__":
    main(sys.argv[1:])
