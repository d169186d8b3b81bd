"""Output projection with the loss: real shapes, peers, FLOPs, and the memory of every way to do it.

``python -m llm_kernels.linear_cross_entropy.bench`` prints the peak memory and FLOPs of each way for Llama 3 8B, from
tensors without data: allocations are those of a GPU run, seen by a dispatch mode. TRITON_INTERPRET=1 without a GPU.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llm_kernels.aot import AotCase
from llm_kernels.benchmark import Benchmark, Shape, Work, normal, sharded
from llm_kernels.cross_entropy import bench as cross_entropy_bench
from llm_kernels.linear_cross_entropy import op

LLAMA3_8B = {"name": "llama3-8b", "tokens": 8192, "hidden": 4096, "vocab_size": 128256}


def _make(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    tokens, columns = shape["tokens"], shape["hidden"]
    weight = (torch.randn(shape["vocab_size"], columns, device=device, dtype=dtype) * columns**-0.5).requires_grad_()
    labels = torch.randint(0, shape["vocab_size"], (tokens,), device=device)
    return normal(tokens, columns, dtype=dtype, device=device), weight, labels


def _flops(shape: Shape) -> Work:
    product = 2 * shape["tokens"] * shape["hidden"] * shape["vocab_size"]
    return Work(product, 2 * product)


def _ours() -> Callable[..., Any]:
    from llm_kernels.linear_cross_entropy.op import linear_cross_entropy

    return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, backend="triton")


def _weighted() -> Callable[..., Any]:
    from llm_kernels.linear_cross_entropy.op import weighted_linear_cross_entropy

    def run(hidden, weight, labels):
        share = torch.full(labels.shape, 1.0 / len(labels), device=labels.device)
        return weighted_linear_cross_entropy(hidden, weight, labels, share, backend="triton")[0]

    return run


def _unfused_inplace() -> Callable[..., Any]:
    from llm_kernels.cross_entropy.op import cross_entropy

    def run(hidden, weight, labels):
        return cross_entropy(F.linear(hidden, weight), labels, inplace_backward=True, backend="triton")

    return run


def _torch() -> Callable[..., Any]:
    return lambda hidden, weight, labels: F.cross_entropy(F.linear(hidden, weight), labels, reduction="none")


def _torch_fp32() -> Callable[..., Any]:
    """As models do that want the softmax in fp32."""
    return lambda hidden, weight, labels: F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")


def _liger() -> Callable[..., Any]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight, labels: liger_fused_linear_cross_entropy(hidden, weight, labels)


BENCHMARK = Benchmark(
    name="linear_cross_entropy",
    shapes=sharded(lambda llama, tp: {"tokens": 8192, "hidden": llama.hidden, "vocab_size": llama.vocab_size // tp}),
    small={"name": "small", "tokens": 16, "hidden": 64, "vocab_size": 1024},
    make=_make,
    providers={
        "ours": _ours,
        "ours, weighted": _weighted,
        "ours, unfused in place": _unfused_inplace,
        "torch": _torch,
        "torch, fp32 logits": _torch_fp32,
        "liger": _liger,
    },
    flops=_flops,
)


class Watch(TorchDispatchMode):
    """Bytes of all storages that operators made and that are still alive: now, at most, and of the largest one; and the
    FLOPs of matrix products (torch's own counter fails on products with out_dtype).

    Sees what operators return, not what they use inside, except of the operators that this file is about; of any
    device, ``meta`` too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = self.flops = 0
        self._seen: set[int] = set()
        own = torch.ops.llm_kernels
        self._opened: dict[Any, Callable[..., Any]] = {
            own.linear_cross_entropy.default: op._recomputing_forward,
            own.linear_cross_entropy_backward.default: op._recomputing_backward,
            own.weighted_linear_cross_entropy.default: op._weighted_forward,
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self._opened:
            with self:
                return self._opened[func](*args)
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_iter(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self._seen | given:
                self._enter(x.untyped_storage())
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = [x for x in args if isinstance(x, Tensor)][-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if size >= max(self.peak // 32, 16384) and storage.device.type == "cpu":
            gc.collect()  # the interpreter leaves a kernel's arguments in reference cycles
        self._seen.add(key)
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def measure(call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[int, int, int]:
    """(peak bytes beyond the inputs, largest tensor, FLOPs of products) of forward and backward."""
    with Watch() as watch:
        out = call(*inputs)
        out.sum().backward()
    return watch.peak, watch.largest, watch.flops


def predicted_bytes(shape: Shape, itemsize: int) -> dict[str, int]:
    """Peak in closed form, results (both gradients) included, small per-token numbers not."""
    from llm_kernels.linear_cross_entropy.kernel import slice_columns
    from llm_kernels.linear_cross_entropy.op import CHUNK_BYTES, WEIGHTED_CHUNK_TOKENS

    tokens, hidden, words = shape["tokens"], shape["hidden"], shape["vocab_size"]
    logits, dhidden, dweight = (itemsize * n for n in (tokens * words, tokens * hidden, words * hidden))
    chunk = min(tokens, max(128, CHUNK_BYTES // (itemsize * words) // 128 * 128))
    sliced = itemsize * tokens * slice_columns(tokens, words, chunk)
    of_chunk = itemsize * words * min(tokens, max(WEIGHTED_CHUNK_TOKENS, CHUNK_BYTES // (itemsize * words)))
    accumulated = 4 * words * hidden
    return {
        # dhidden in fp32 beside a slice of logits and then, at the end, beside its copy in the inputs' dtype.
        "ours": dweight + 4 * tokens * hidden + max(sliced, dhidden if itemsize != 4 else 0),
        "ours, weighted": accumulated + dhidden + max(of_chunk, dweight + dhidden),
        "ours, unfused in place": logits + dhidden + dweight,
        # Log-probabilities are kept; their gradient and then the logits' are made.
        "torch": 3 * logits,
        "torch, fp32 logits": 3 * 4 * tokens * words,
    }


def memory_table(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, tuple[int, int, int, int]]:
    """name → (measured peak, predicted peak, largest tensor, FLOPs)."""
    from llm_kernels import dispatch

    dispatch.backend_for(torch.empty(0, device=device), "triton")
    predicted = predicted_bytes(shape, dtype.itemsize)
    rows = {}
    for name, expected in predicted.items():
        peak, largest, flops = measure(BENCHMARK.providers[name](), _make(shape, dtype, torch.device(device)))
        rows[name] = (peak, expected, largest, flops)
    return rows


def aot_cases(arch: int) -> list[AotCase]:
    """The kernels are cross_entropy's; here on a backward slice of 16,384 columns."""
    cases = cross_entropy_bench.aot_cases(arch, [(16384, 16384, "bf16")])
    return [replace(c, name=f"linear_{c.name}") for c in cases if "backward" in c.name]


def main() -> None:
    """Prints the table."""
    product = _flops(LLAMA3_8B).forward
    print("| way | peak GB | closed form GB | largest tensor GB | products of 2Thv |\n| --- | --- | --- | --- | --- |")
    for name, (peak, expected, largest, flops) in memory_table(LLAMA3_8B, torch.bfloat16, "meta").items():
        numbers = " | ".join(f"{x / 1e9:.2f}" for x in (peak, expected, largest))
        print(f"| {name} | {numbers} | {flops / product:.2f} |")


if __name__ == "__main__":
    main()
