"""Host time of operators: microseconds of Python and torch in one call, with the kernels replaced by nothing.

``python -m llm_kernels.host_time`` (on a CPU with TRITON_INTERPRET=1): every operator forward and with backward, beside
a plain autograd function with as many inputs that only allocates, in one process and in interleaved rounds. Times are
of processor time, so that other processes on the machine do not count. The launches' own time (Triton looks up the
compiled kernel, CUDA launches it) is not in it; where there is a GPU, ``--launch`` leaves the kernels in.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from llm_kernels.testing import default_device, random

DTYPE = torch.bfloat16
TRITON = "triton"


@dataclass(frozen=True)
class Call:
    """One operator on small inputs: host time does not depend on their size."""

    name: str
    run: Callable[..., Any]
    inputs: Sequence[Tensor]


class _Nothing:
    """Stands for a kernel: takes any grid and any arguments."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *_, **__: None


@contextmanager
def without_kernels() -> Iterator[None]:
    """Replaces every kernel of every operator by nothing."""
    from triton.runtime.jit import KernelInterface

    names = ("rms_norm", "rope", "swiglu", "cross_entropy", "linear_cross_entropy", "attention", "adamw")
    modules = [import_module(f"llm_kernels.{name}.kernel") for name in names]
    modules += [import_module(f"llm_kernels.attention.{name}") for name in ("kernel_backward", "kernel_delta")]
    kernels = [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, KernelInterface)
    ]
    for module, name, _ in kernels:
        setattr(module, name, _Nothing())
    try:
        yield
    finally:
        for module, name, value in kernels:
            setattr(module, name, value)


class _Plain(torch.autograd.Function):
    """What any operator written in Python costs at least: one output in forward, one gradient for every input."""

    @staticmethod
    def forward(ctx, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return torch.empty_like(inputs[0])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


def calls() -> list[Call]:
    """All operators of a layer and its loss."""
    from llm_kernels.attention.op import Segments, attention_qkv
    from llm_kernels.cross_entropy.op import cross_entropy
    from llm_kernels.linear_cross_entropy.op import linear_cross_entropy
    from llm_kernels.rms_norm.op import add_rms_norm, rms_norm
    from llm_kernels.rope.op import rope, rope_qkv_
    from llm_kernels.rope.ref import inverse_frequencies
    from llm_kernels.rope.table import RopeTable
    from llm_kernels.swiglu.op import swiglu

    device = default_device()
    x, residual, packed = (random(4, 2, size, dtype=DTYPE) for size in (64, 64, 192))
    weight, words = random(64, dtype=DTYPE), random(32, 64, dtype=DTYPE)
    heads = random(4, 2, 2, 6, 64, dtype=DTYPE)
    q, k = random(4, 2, 4, 64, dtype=DTYPE), random(4, 2, 2, 64, dtype=DTYPE)
    table = RopeTable.make(inverse_frequencies(64, 10000.0, device=device), 4)
    labels = torch.ones(4, 2, dtype=torch.int64, device=device)
    segments = Segments.dense(2, 4, 4, device)
    return [
        Call("plain, 1 input", _Plain.apply, [x]),
        Call("plain, 2 inputs", _Plain.apply, [x, weight]),
        Call("plain, 3 inputs", _Plain.apply, [x, residual, weight]),
        Call("rms_norm", lambda x, w: rms_norm(x, w, 1e-5, backend=TRITON), [x, weight]),
        Call("add_rms_norm", lambda x, r, w: add_rms_norm(x, r, w, 1e-5, backend=TRITON)[0], [x, residual, weight]),
        Call("swiglu", lambda x: swiglu(x, backend=TRITON), [x]),
        Call("rope", lambda q, k: rope(q, k, table, backend=TRITON), [q, k]),
        # What is written over must not be a leaf: a product is.
        Call("product", lambda x: x * 1.0, [packed]),
        Call(
            "product, rope_qkv_",
            lambda x: rope_qkv_(x * 1.0, table, num_groups=1, head_dim=64, backend=TRITON),
            [packed],
        ),
        Call("attention_qkv", lambda x: attention_qkv(x, segments, backend=TRITON), [heads]),
        Call("cross_entropy", lambda x: cross_entropy(x, labels, backend=TRITON), [x]),
        Call("linear_cross_entropy", lambda x, w: linear_cross_entropy(x, w, labels, backend=TRITON), [x, words]),
    ]


def forward_of(call: Call) -> Callable[[], Any]:
    """Forward, with the graph that it leaves."""
    return lambda: call.run(*call.inputs)


def both_of(call: Call) -> Callable[[], Any]:
    """Forward and backward."""
    out = call.run(*call.inputs)
    gradients = [torch.ones_like(x) for x in (out if isinstance(out, tuple) else (out,))]

    def run() -> None:
        torch.autograd.grad(call.run(*call.inputs), call.inputs, gradients)

    return run


def measure(what: Sequence[Callable[[], Any]], rounds: int, repeats: int = 20) -> list[float]:
    """Median microseconds of processor time of one call of each, over interleaved rounds of ``repeats`` calls."""
    times: list[list[float]] = [[] for _ in what]
    for turn in range(rounds + 3):
        for index, run in enumerate(what):
            start = time.process_time_ns()
            for _ in range(repeats):
                run()
            if turn >= 3:  # the first rounds import, cache and allocate
                times[index].append((time.process_time_ns() - start) / repeats / 1e3)
    return [statistics.median(x) for x in times]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--launch", action="store_true", help="leave the kernels in (on a GPU)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with nullcontext() if arguments.launch else without_kernels():
        rows = calls()
        found = measure([f for call in rows for f in (forward_of(call), both_of(call))], arguments.rounds)
    print("| operator | forward, us | with backward, us |")
    print("| --- | --- | --- |")
    for call, forward, both in zip(rows, found[::2], found[1::2]):
        print(f"| {call.name} | {forward:.1f} | {both:.1f} |")


if __name__ == "__main__":
    main()
