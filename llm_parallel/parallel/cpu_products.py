"""Matrix products in fp32 on a CPU by oneDNN, where the library that torch calls for them is slow.

torch multiplies fp32 matrices by MKL, which leaves out AVX-512 on processors of other makers than Intel. oneDNN, which
torch contains too, does not: on one thread of an AMD EPYC the products of SmolLM2-135M with 256 tokens run at 240
GFLOP/s instead of 107, forward and for both gradients (``benchmarks/cpu_products.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_library: Any = None


def onednn_linear() -> Any:
    """torch's operator x [..., in], w [out, in] → x wᵀ over oneDNN, or None where this torch has none."""
    if not torch.backends.mkldnn.is_available():
        return None
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if packet is None else packet.default


def is_faster() -> bool:
    """Whether oneDNN multiplies fp32 matrices faster than torch does by itself: AVX-512, and not by Intel. It is not
    measured, since a run that is resumed must get the same products."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False


def _dense(matrix: Tensor) -> bool:
    """Whether a matrix lies in memory by rows or by columns, possibly with gaps, each element once."""
    rows, columns = matrix.shape
    down, right = matrix.stride()
    return (right == 1 and down >= columns) or (down == 1 and right >= rows)


def install() -> None:
    """From here on this process multiplies fp32 matrices on the CPU by oneDNN, in forward and in backward."""
    global _library
    linear = onednn_linear()
    if _library is not None or linear is None or not is_faster():
        return

    def mm(left: Tensor, right: Tensor) -> Tensor:
        if (
            left.dtype is right.dtype is torch.float32
            and left.numel()
            and right.numel()
            and _dense(left)
            and _dense(right)
        ):
            product: Tensor = linear(left, right.t(), None, "none", [], "")
            return product
        # The form with ``out`` is another operator, which is not replaced.
        return torch.mm(left, right, out=left.new_empty(left.shape[0], right.shape[1]))

    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel.*")
        _library.impl("mm", mm, "CPU")


def uninstall() -> None:
    """Undoes ``install``."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None


@contextmanager
def as_torch_multiplies() -> Iterator[None]:
    """Inside, products are torch's own: for the other side of a comparison in one process."""
    installed = _library is not None
    uninstall()
    try:
        yield
    finally:
        if installed:
            install()
