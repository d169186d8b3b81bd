"""Repairs to Triton's interpreter (TRITON_INTERPRET=1) so that kernels can be checked on a machine without a GPU.

Wrong in Triton 3.6 to 3.9: bf16 values are kept as 16-bit integers, which numpy then adds and multiplies as integers,
so arithmetic and dot products of bf16 are silently wrong; and fp32 to bf16 truncates, where a GPU rounds to nearest
even. Triton 3.6 also fails with numpy 2.4 and newer wherever a loop bound is known only at run time.

Slow in Triton 3.6 and 3.7: the interpreter patches the whole language again at each call of a device function, checks
integer overflow in nine operations without using the result, and builds a new shape object for every value. Together
that was two thirds of a small model's training step.

Importing this module changes nothing; ``install`` applies the repairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

_installed = False


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """The fp32 values of bf16 numbers whose bits are given as uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """The bits of bf16 numbers as uint16, rounded to nearest even; every NaN becomes the same quiet NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def install() -> None:
    """Patches Triton's interpreter; a second call does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    import triton
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    _repair_casts(builder)
    _repair_arithmetic(builder)
    _repair_dot(builder)
    _repair_scalars(interpreter)
    if triton.__version__.startswith("3.6."):
        _repair_loop_bounds(interpreter)
    _prepare_once_a_launch(interpreter)
    _look_types_up(interpreter)
    _check_overflows(interpreter.interpreter_semantic)
    _share_shapes()


def _is_bf16(handle: Any) -> bool:
    import triton.language as tl

    data = getattr(handle, "data", None)
    return getattr(data, "dtype", None) == np.uint16 and handle.dtype.scalar == tl.bfloat16


def _handle(data: np.ndarray, dtype: Any) -> Any:
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(data, dtype)


def _repair_casts(builder: Any) -> None:
    import triton.language as tl

    def wrap(original: Callable) -> Callable:
        def cast(self, src, dst_type, *rest):
            dst = dst_type.scalar
            if _is_bf16(src):
                wide = _handle(bf16_to_fp32(src.data), tl.float32)
                return wide if dst == tl.float32 else original(self, wide, dst_type, *rest)
            if dst == tl.bfloat16:
                return _handle(fp32_to_bf16(src.data.astype(np.float32)), dst)
            return original(self, src, dst_type, *rest)

        return cast

    builder.create_fp_to_fp = wrap(builder.create_fp_to_fp)
    builder.cast_impl = wrap(builder.cast_impl)  # all other casts call this method


def _repair_arithmetic(builder: Any) -> None:
    import triton.language as tl

    binary, unary = builder.binary_op, builder.unary_op

    def binary_op(self, lhs, rhs, op):
        if not (_is_bf16(lhs) and _is_bf16(rhs)):
            return binary(self, lhs, rhs, op)
        out = op(bf16_to_fp32(lhs.data), bf16_to_fp32(rhs.data))
        return _handle(out, tl.int1) if out.dtype == np.bool_ else _handle(fp32_to_bf16(out), tl.bfloat16)

    def unary_op(self, arg, op):
        if not _is_bf16(arg):
            return unary(self, arg, op)
        return _handle(fp32_to_bf16(op(bf16_to_fp32(arg.data))), tl.bfloat16)

    builder.binary_op, builder.unary_op = binary_op, unary_op
    if not hasattr(builder, "get_bf16"):
        builder.get_bf16 = lambda self, value: _handle(fp32_to_bf16(np.array([value])), tl.bfloat16)


def _repair_dot(builder: Any) -> None:
    original = builder.create_dot

    def create_dot(self, a, b, d, *rest):
        if d.data.dtype != np.float32:
            return original(self, a, b, d, *rest)
        left, right = (bf16_to_fp32(x.data) if _is_bf16(x) else x.data for x in (a, b))
        if {left.dtype, right.dtype} - {np.dtype(np.float16), np.dtype(np.float32)}:
            return original(self, a, b, d, *rest)
        product = np.matmul(left.astype(np.float32), right.astype(np.float32))
        return _handle(product + d.data, d.dtype.scalar)

    builder.create_dot = create_dot


def _repair_scalars(interpreter: Any) -> None:
    """Makes a Python float argument an fp32 scalar, as in a compiled kernel; the interpreter would keep the float."""
    import triton.language as tl

    original = interpreter._implicit_cvt

    def convert(arg):
        if isinstance(arg, float):
            return tl.tensor(_handle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)
        return original(arg)

    interpreter._implicit_cvt = convert


def _repair_loop_bounds(interpreter: Any) -> None:
    """Triton 3.6 calls int() on a one-element array for a bound known at run time, which numpy 2.4 refuses."""
    original = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    interpreter._patch_lang_tensor = patch


def _prepare_once_a_launch(interpreter: Any) -> None:
    """Patches the language once a launch. ``_patch_lang`` replaces every builtin of tl and tl.core by an interpreted
    one. Triton calls it for the kernel, whose scope undoes it after the launch, and again at every call of a device
    function, where it is superfluous."""
    import triton.language as tl

    original = interpreter._patch_lang
    prepared: set[str] = set()

    def patch(fn):
        seen = {module.__name__ for module in fn.__globals__.values() if module is tl or module is tl.core}
        if prepared and seen <= prepared:
            return None  # no scope is needed: Triton does not undo the patch of a device function
        scope, launch = original(fn), not prepared
        prepared.update(seen)
        if launch:
            undo = scope.restore

            def restore():
                prepared.clear()
                undo()

            scope.restore = restore
        return scope

    interpreter._patch_lang = patch


def _look_types_up(interpreter: Any) -> None:
    """Caches ``_get_np_dtype``, which builds its whole table of types at every call, once for every value."""
    import triton.language as tl

    original = interpreter._get_np_dtype
    known: dict[str, np.dtype] = {}

    def numpy_type(tt_dtype):
        scalar = tt_dtype.scalar
        if isinstance(scalar, tl.pointer_type):
            return np.dtype(np.uint64)
        if scalar.name not in known:
            known[scalar.name] = original(scalar)
        return known[scalar.name]

    interpreter._get_np_dtype = numpy_type


def _check_overflows(semantic: Any) -> None:
    """Raises where a sum, difference or product of integers does not fit in its type, as a debug build of a kernel
    does."""
    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(lhs, rhs, binary_op):
        scalar = lhs.type.scalar
        if scalar.int_bitwidth >= 64:
            return
        exact = operations[binary_op.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
        low, high = scalar.get_int_min_value(), scalar.get_int_max_value()
        if exact.size and not low <= exact.min() <= exact.max() <= high:
            raise OverflowError(f"{binary_op.__name__} of {scalar} gives {exact.min()} to {exact.max()}")

    semantic.binary_op_sanitize_overflow_impl = check


def _share_shapes() -> None:
    """Values of the same shape share one shape object, and values of the same block type its attributes."""
    from triton.language import core

    block = core.block_type.__init__
    blocks: dict[tuple, dict[str, Any]] = {}
    shapes: dict[tuple, tuple[Any, Any]] = {}

    def block_type(self, element_ty, shape):
        if type(element_ty) is not core.dtype:  # a pointer type, which every launch makes for itself
            return block(self, element_ty, shape)
        key = (element_ty.name, *(core._unwrap_if_constexpr(size) for size in shape))
        if key not in blocks:
            block(self, element_ty, shape)
            blocks[key] = dict(self.__dict__)
        self.__dict__.update(blocks[key])

    def tensor(self, handle, type):
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in shapes:
            shapes[shape] = core.tuple([core.constexpr(size) for size in shape]), core.constexpr(math.prod(shape))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[shape]

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
