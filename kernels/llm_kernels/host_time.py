"""Host time of operators: microseconds of Python and torch in one call, with the kernels replaced by nothing.

``python -m llm_kernels.host_time`` (on a CPU with TRITON_INTERPRET=1): every operator forward and with backward, beside
a plain autograd function with as many inputs that only allocates, in one process and in interleaved rounds. Times are
of processor time, so that other processes on the machine do not count. The launches' own time (Triton looks up the
compiled kernel, CUDA launches it) is not in it, nor are matrix products; where there is a GPU, ``--launch`` leaves both
in. Backward is autograd's engine alone: torch.autograd.grad checks its arguments in Python, which a training step does
once and not once an operator.

``--beside FOLDER`` measures another checkout of this repository too: each checkout in processes of its own, in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_kernels.testing import default_device, random

DTYPE = torch.bfloat16
TRITON = "triton"


@dataclass(frozen=True)
class Call:
    """One operator on small inputs: host time does not depend on their size. Without inputs: what has no backward."""

    name: str
    run: Callable[..., Any]
    inputs: Sequence[Tensor]


class _Nothing:
    """Stands for a kernel: takes any grid and any arguments."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *_, **__: None


def _no_product(*operands: Tensor, out: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """Stands for torch.mm and torch.addmm: allocates what they would return, and no more."""
    if out is not None:
        return out
    a, b = operands[-2:]
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Replaces every kernel of every operator, and torch's matrix products, by nothing."""
    from triton.runtime.jit import KernelInterface

    names = ("rms_norm", "rope", "swiglu", "cross_entropy", "linear_cross_entropy", "attention", "adamw")
    modules = [import_module(f"llm_kernels.{name}.kernel") for name in names]
    modules += [import_module(f"llm_kernels.attention.{name}") for name in ("kernel_backward", "kernel_delta")]
    replaced: list[tuple[Any, str, Any]] = [(torch, "mm", _no_product), (torch, "addmm", _no_product)]
    # On a CPU these convert their operands, which a GPU's products do not need.
    products = {
        "_add_product": lambda total, a, b: None,
        "_wide_product": partial(_no_product, out_dtype=torch.float32),
    }
    loops = modules[names.index("linear_cross_entropy")]
    replaced += [(loops, name, value) for name, value in products.items() if hasattr(loops, name)]
    for module in modules:
        kernels = [name for name, value in vars(module).items() if isinstance(value, KernelInterface)]
        replaced += [(module, name, _Nothing()) for name in kernels]
    originals = [(of, name, getattr(of, name)) for of, name, _ in replaced]
    for of, name, value in replaced:
        setattr(of, name, value)
    try:
        yield
    finally:
        for of, name, value in originals:
            setattr(of, name, value)


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
        Call("FusedAdamW, a step of 300 tensors", _adamw_step(300), []),
    ]


def _adamw_step(count: int) -> Callable[[], Any]:
    from llm_kernels.adamw.optimizer import FusedAdamW

    params = [random(8, dtype=torch.float32) for _ in range(count)]
    for p in params:
        p.grad = torch.ones_like(p)
    return FusedAdamW(params, backend=TRITON).step


def forward_of(call: Call) -> Callable[[], Any]:
    """Forward, with the graph that it leaves."""
    return lambda: call.run(*call.inputs)


def both_of(call: Call) -> Callable[[], Any]:
    """Forward and backward."""
    out = call.run(*call.inputs)
    gradients = tuple(torch.ones_like(x) for x in (out if isinstance(out, tuple) else (out,)))
    engine, inputs = torch.autograd.Variable._execution_engine, tuple(call.inputs)

    def run() -> None:
        out = call.run(*inputs)
        engine.run_backward(out if isinstance(out, tuple) else (out,), gradients, False, False, inputs, False)

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


def _measure_here(rounds: int, launch: bool) -> dict[str, list[float]]:
    """Name of each call → microseconds forward and, if it has a backward, with that."""
    torch.set_num_threads(1)
    with nullcontext() if launch else without_kernels():
        rows = calls()
        runs = [[forward_of(call), *([both_of(call)] if call.inputs else [])] for call in rows]
        found = iter(measure([run for of in runs for run in of], rounds))
    return {call.name: [next(found) for _ in of] for call, of in zip(rows, runs)}


def _measure_there(checkout: Path, rounds: int, launch: bool) -> dict[str, list[float]]:
    """The same in a process of its own, with this file and another checkout's operators."""
    command = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", command, __file__, "--json", "--rounds", str(rounds), *(["--launch"] if launch else [])],
        cwd=checkout / "kernels",  # where a command given by -c looks for modules first
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _beside(other: Path, turns: int, rounds: int, launch: bool) -> None:
    """Prints the table of both checkouts."""
    checkouts = (other.resolve(), Path(__file__).parents[2])
    found: tuple[list[dict[str, list[float]]], ...] = ([], [])
    for turn in range(turns):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            found[which].append(_measure_there(checkouts[which], rounds, launch))
    print("| operator | forward there, us | here, us | here/there | with backward there, us | here, us | here/there |")
    print("|" + " --- |" * 7)
    for name in found[1][0]:
        cells = []
        for direction in range(len(found[1][0][name])):
            there, here = ([turn[name][direction] for turn in times] for times in found)
            cells += [f"{statistics.median(x):.1f} ({min(x):.1f} to {max(x):.1f})" for x in (there, here)]
            cells.append(f"{statistics.median(here) / statistics.median(there):.0%}")
        print(f"| {name} | {' | '.join(cells + [''] * (6 - len(cells)))} |")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--launch", action="store_true", help="leave the kernels in (on a GPU)")
    parser.add_argument("--beside", type=Path, help="folder of another checkout to measure in turns with this one")
    parser.add_argument("--turns", type=int, default=5, help="with --beside: processes of each checkout")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    arguments = parser.parse_args()
    if arguments.beside:
        return _beside(arguments.beside, arguments.turns, arguments.rounds, arguments.launch)
    found = _measure_here(arguments.rounds, arguments.launch)
    if arguments.json:
        return print(json.dumps(found))
    print("| operator | forward, us | with backward, us |")
    print("| --- | --- | --- |")
    for name, times in found.items():
        print(f"| {name} | {' | '.join([*(f'{x:.1f}' for x in times), ''][:2])} |")
    return None


if __name__ == "__main__":
    main()
