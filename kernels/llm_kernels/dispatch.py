"""Which implementation an operator runs, and how operators are registered with torch. The one place that decides.

``auto`` takes Triton for CUDA tensors where Triton is installed, and plain torch otherwise. ``triton`` on CPU tensors
runs Triton's interpreter, which must have been asked for before Triton is first imported (TRITON_INTERPRET=1): tests
do that. ``torch`` is the operator's ref.py. The kernels take fp32, bf16 and fp16: ``auto`` gives any other dtype to
torch, and ``triton`` refuses it.

Every operator is registered as ``llm_kernels::<name>``, which torch.compile, fake tensors and dispatch modes see. A
plain eager call goes around the registration, straight into one autograd function: that costs half the host time.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from functools import cache, wraps
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
OLDEST_TRITON = (3, 6)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIBRARY = torch.library.Library("llm_kernels", "FRAGMENT")
_PLAIN = (Tensor, torch.nn.Parameter)
_implementations: dict[str, Callable] = {}


@cache
def triton_fault() -> str | None:
    """Why the kernels cannot be had from the installed Triton, or None if they can; it is not imported for the answer.

    torch 2.8 and 2.9 bring Triton 3.4 and 3.5, which lack what the kernels use."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:  # a build of somebody's own
        return None
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < OLDEST_TRITON:
        return f"triton {version} is installed, and the kernels need 3.6 or newer (torch 2.10 brings it)"
    return None


@cache
def _import_triton() -> bool:
    if not interpreting():
        return False
    from llm_kernels import interpreter

    interpreter.install()
    return True


@cache
def launchers(operator: str) -> Any:
    """The module ``llm_kernels.<operator>.kernel``, which needs Triton and so is imported at an operator's first call.
    An import statement in every call costs 1.5 us each time."""
    return importlib.import_module(f"llm_kernels.{operator}.kernel")


def triton_installed() -> bool:
    """Whether there is a Triton that the kernels work with; it is not imported for the answer."""
    return triton_fault() is None


def interpreting() -> bool:
    """Whether this process's kernels are made for Triton's interpreter (TRITON_INTERPRET=1)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def _prepare() -> bool:
    """Imports Triton once and says whether it interprets."""
    return _import_triton()


# torch.compile calls these two when it traces, and takes their answers for constants, instead of tracing into import
# machinery and Triton's settings. torch.compiler.assume_constant_result sets this attribute too, but imports dynamo for
# it: a second and a half in every process.
triton_installed._dynamo_marked_constant = True  # type: ignore[attr-defined]
_prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]


def backend_for(x: Tensor, requested: str = "auto", *others: Tensor) -> str:
    """``triton`` or ``torch`` for an operator on ``x`` and ``others``.

    Raises ValueError if ``requested`` is unknown or can't be had for these tensors.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend = {requested!r} is not one of {', '.join(BACKENDS)}")
    if requested == "torch" or (requested == "auto" and not (x.is_cuda and triton_installed())):
        return "torch"
    for tensor in (x, *others):
        if tensor.dtype not in DTYPES:
            if requested == "auto":
                return "torch"
            raise ValueError(
                f"backend = 'triton' takes float32, bfloat16 and float16, not {tensor.dtype}; "
                "backend = 'auto' or 'torch' computes it by torch"
            )
    if not triton_installed():
        raise ValueError(f"backend = 'triton', but {triton_fault()}")
    if not (_prepare() or x.is_cuda):
        raise ValueError("backend = 'triton' on CPU tensors needs TRITON_INTERPRET=1 in the environment")
    return "triton"


def check_writable(x: Tensor, name: str, what: str) -> None:
    """Raises ValueError unless ``x`` may be written over: no leaf that wants a gradient, no element twice in memory.

    ``what`` says who would write, as in "inplace_backward=True".
    """
    if x.is_leaf and x.requires_grad:
        raise ValueError(
            f"{what} writes over {name}, which is a leaf that requires a gradient; pass the result of a computation"
        )
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape)):
        raise ValueError(f"{what} writes over {name}, but its elements share memory (it is expanded)")


def define(schema: str, implementation: Callable, fake: Callable, direct: Callable | None = None) -> Callable:
    """Defines operator ``llm_kernels::<name>`` by a torch schema, one implementation for CUDA and for the interpreter,
    and what it returns for fake tensors. Returns the operator as a function that is not differentiable; its first
    argument, or the second where that is None, must be a tensor or a list of them. ``direct`` is what a plain eager
    call of that function runs, where it may return None for what a schema wants a tensor for."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CUDA")
    LIBRARY.impl(name, implementation, "CPU")
    torch.library.register_fake(f"llm_kernels::{name}", fake, lib=LIBRARY)
    registered = getattr(torch.ops.llm_kernels, name).default
    _implementations[name] = implementation
    plain = direct or implementation

    def call(*arguments: Any) -> Any:
        return plain(*arguments) if _is_plain(arguments) else registered(*arguments)

    return call


def differentiable(name: str, setup: Callable, gradients: Callable, linear: bool = False) -> Callable:
    """Gives a defined operator its derivative and returns the operator as a function.

    setup(ctx, inputs, output) and gradients(ctx, *grads) as torch.library.register_autograd takes them. A second
    derivative is refused, except of a ``linear`` operator, whose ``gradients`` must be differentiable themselves.
    """
    backward_of = gradients if linear else first_derivative_only(name)(gradients)
    torch.library.register_autograd(f"llm_kernels::{name}", backward_of, setup_context=setup, lib=LIBRARY)
    implementation, registered = _implementations[name], getattr(torch.ops.llm_kernels, name).default

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = implementation(*inputs)
            setup(ctx, inputs, output)
            return output

        backward = staticmethod(backward_of)

    Direct.__name__ = Direct.__qualname__ = name
    direct = super(torch.autograd.Function, Direct).apply  # as in ``apply``

    def call(*arguments: Any) -> Any:
        return direct(*arguments) if _is_plain(arguments) else registered(*arguments)

    return call


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply(*arguments)`` with less host time in a plain eager call: what Function.apply does besides is for
    functorch, which is looked for here. 2 us a call."""
    if _is_plain(arguments):
        return super(torch.autograd.Function, function).apply(*arguments)
    return function.apply(*arguments)


def _is_plain(arguments: tuple[Any, ...]) -> bool:
    """Whether nobody but autograd wants to see this call: neither torch.compile nor a subclass, a mode or functorch."""
    if torch.compiler.is_compiling():
        return False
    first = arguments[1] if arguments[0] is None else arguments[0]
    return (
        type(first[0] if type(first) is list else first) in _PLAIN
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
    )


def first_derivative_only(name: str) -> Callable[[Callable], Callable]:
    """Decorates the backward of an autograd function whose gradients are not themselves differentiable: to
    differentiate them raises RuntimeError instead of giving a number that is wrong."""

    def decorate(backward: Callable) -> Callable:
        @wraps(backward)
        def run(ctx: Any, *grads: Tensor | None) -> Any:
            # Under torch.compile nothing here is differentiated: AOTAutograd refuses second derivatives itself.
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return backward(ctx, *grads)
            sources = [x for x in (*grads, *ctx.saved_tensors) if x is not None and x.requires_grad]
            with torch.no_grad():
                found = backward(ctx, *grads)
            several = found if isinstance(found, tuple) else (found,)
            kept = iter(_Refuse.apply(name, len(sources), *sources, *(x for x in several if x is not None)))
            out = tuple(None if x is None else next(kept) for x in several)
            return out if isinstance(found, tuple) else out[0]

        return run

    return decorate


class _Refuse(torch.autograd.Function):
    """Passes gradients on and ties them to what they were made of, so that whoever differentiates them comes by."""

    @staticmethod
    def forward(ctx: Any, name: str, num_sources: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(x.view_as(x) for x in tensors[num_sources:])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"llm_kernels.{ctx.name} has no second derivative; compute this operator with plain torch functions where "
            "a gradient is to be differentiated"
        )
