"""Which implementation an operator runs, and how operators are registered with torch. The one place that decides.

``auto`` takes Triton for CUDA tensors where Triton is installed, and plain torch otherwise. ``triton`` on CPU tensors
runs Triton's interpreter, which must have been asked for before Triton is first imported (TRITON_INTERPRET=1): tests
do that. ``torch`` is the operator's ref.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
LIBRARY = torch.library.Library("llm_kernels", "FRAGMENT")


@cache
def triton_installed() -> bool:
    """Whether Triton can be imported; it is not imported for the answer."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether this process's kernels are made for Triton's interpreter (TRITON_INTERPRET=1)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@cache
def _prepare() -> bool:
    """Imports Triton once and says whether it interprets."""
    if not interpreting():
        return False
    from llm_kernels import interpreter

    interpreter.install()
    return True


def backend_for(x: Tensor, requested: str = "auto") -> str:
    """``triton`` or ``torch`` for an operator on ``x``.

    Raises ValueError if ``requested`` is unknown or can't be had for this tensor.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend = {requested!r} is not one of {', '.join(BACKENDS)}")
    if requested == "torch" or (requested == "auto" and not (x.is_cuda and triton_installed())):
        return "torch"
    if not triton_installed():
        raise ValueError("backend = 'triton', but triton is not installed (pip install triton)")
    if not (_prepare() or x.is_cuda):
        raise ValueError("backend = 'triton' on CPU tensors needs TRITON_INTERPRET=1 in the environment")
    return "triton"


def define(schema: str, implementation: Callable, fake: Callable) -> None:
    """Defines operator ``llm_kernels::<name>`` by a torch schema, one implementation for CUDA and for the interpreter,
    and what it returns for fake tensors. Autograd is registered by the operator's own file."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CUDA")
    LIBRARY.impl(name, implementation, "CPU")
    torch.library.register_fake(f"llm_kernels::{name}", fake, lib=LIBRARY)
