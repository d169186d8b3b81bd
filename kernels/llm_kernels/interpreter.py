"""Repairs to Triton's interpreter (TRITON_INTERPRET=1) so that kernels can be checked on a machine without a GPU.

Triton 3.6 to 3.9 keep bf16 as 16-bit integers and hand those to numpy as they are: arithmetic and dot products of bf16
are silently wrong, and fp32 to bf16 truncates where a GPU rounds to nearest even. Version 3.6 also fails with numpy 2.4
and newer wherever a loop bound is known only at run time. Importing this module changes nothing; ``install`` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

_installed = False


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """fp32 values of bf16 numbers given as uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """bf16 numbers as uint16, rounded to nearest even; every NaN becomes the quiet one."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def install() -> None:
    """Patches the interpreter of the imported Triton; a second call does nothing."""
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
    builder.cast_impl = wrap(builder.cast_impl)  # all other casts call it by name


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
    """A Python float argument is an fp32 scalar in a compiled kernel; the interpreter would leave it a float."""
    import triton.language as tl

    original = interpreter._implicit_cvt

    def convert(arg):
        if isinstance(arg, float):
            return tl.tensor(_handle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)
        return original(arg)

    interpreter._implicit_cvt = convert


def _repair_loop_bounds(interpreter: Any) -> None:
    """numpy 2.4 refuses int() of a one-element array, which Triton 3.6 asks of every bound known at run time."""
    original = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    interpreter._patch_lang_tensor = patch
