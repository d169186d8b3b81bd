"""Attention backward for Hopper in Gluon, for sm_90 only: dk and dv by tiles of keys, then dq by tiles of queries.

q, dq: [sq, b, g, m, d], k, v, dk, dv: [sk, b, g, d], dout: [sq, b, g m, d] contiguous, bf16 or fp16, d 64 or 128; lse
(base 2) and delta fp32 [b, g m, sq] as kernel_delta.per_row makes them. Formulas and order of summation are
kernel_backward's: 7 products, no atomics, the same bits every time.
FLOPs: 14 d per visible (query, key) and head. Bytes, at least: q, k, v and dout read twice, dq, dk and dv written once.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from llm_kernels.attention.gluon_dkdv import QUERIES, _attention_bwd_dkdv_gluon_kernel
from llm_kernels.attention.gluon_dq import _attention_bwd_dq_gluon_kernel
from llm_kernels.attention.gluon_forward import BLOCK_M, HALF, descriptor
from llm_kernels.attention.ref import Options


def keys_of_tile(d: int) -> int:
    """Keys of one tile in the loop of the dq kernel."""
    return 128 if d <= 64 else 64


def _launch(kernel: Any, grid: tuple[int, int], arguments: dict[str, Any]) -> None:
    """Launches a kernel; tests replace this function by the simulator."""
    kernel[grid](**arguments, num_warps=4)


def backward(
    tensors: tuple[Tensor, ...], gradients: tuple[Tensor, Tensor, Tensor], table: Tensor, extents: tuple[int, int],
    options: Options, arch: int,
) -> None:  # fmt: skip
    """Does what ``kernel_backward.backward`` does, for tensors that the forward kernel accepts, head dim up to 128.
    ``arch`` is for that function alone: these kernels exist for one architecture, which forward has checked."""
    del arch
    q, k, v, dout, lse, delta = tensors
    dq, dk, dv = gradients
    sq, _b, groups, m, d = q.shape
    h = groups * m
    by_group = dout.unflatten(2, (groups, m))
    shared = {
        "lse_ptr": lse, "delta_ptr": delta, "table_ptr": table, "H": h, "SQ": sq, "scale": options.scale,
        **dict(zip(("q_batch_col", "q_group_col", "q_head_col"), q.stride()[1:4])),
        **dict(zip(("k_batch_col", "k_group_col"), k.stride()[1:3])),
        **dict(zip(("v_batch_col", "v_group_col"), v.stride()[1:3])),
        "GROUP": m, "D": d, "CAUSAL": options.right == 0,
    }  # fmt: skip

    def descriptors(queries: int, keys: int) -> dict[str, Any]:
        blocks = {"q": (q, queries), "k": (k, keys), "v": (v, keys), "dout": (by_group, queries)}
        return {f"{name}_desc": descriptor(x, block) for name, (x, block) in blocks.items()}

    def places(**results: Tensor) -> dict[str, Any]:
        names = ("row", "batch", "group", "head")
        strides = {f"{x}_{n}_stride": s for x, y in results.items() for n, s in zip(names, y.stride()[:-1])}
        return {**{f"{name}_ptr": x for name, x in results.items()}, **strides}

    grid = (groups * len(table), triton.cdiv(extents[1], BLOCK_M.value))
    if 0 not in grid and 0 not in k.shape:
        if sq == 0:
            dk.zero_()
            dv.zero_()
        else:
            arguments = {**shared, **descriptors(QUERIES.value, HALF.value), **places(dk=dk, dv=dv), "G": groups}
            _launch(_attention_bwd_dkdv_gluon_kernel, grid, {**arguments, "STAGES": 2})
    grid = (h * len(table), triton.cdiv(extents[0], BLOCK_M.value))
    if 0 not in grid and 0 not in q.shape:
        if k.shape[0] == 0:
            dq.zero_()
        else:
            arguments = {**shared, **descriptors(HALF.value, keys_of_tile(d)), **places(dq=dq)}
            _launch(_attention_bwd_dq_gluon_kernel, grid, {**arguments, "BLOCK_N": keys_of_tile(d)})
