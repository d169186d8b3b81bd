"""RoPE's benchmark: shapes of real models, peers, least bytes, and the configurations to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llm_kernels.aot import AotCase
from llm_kernels.benchmark import Benchmark, Shape, Work, normal, sharded
from llm_kernels.rope.ref import inverse_frequencies
from llm_kernels.rope.table import RopeTable


@cache
def _table(tokens: int, dim: int, device: torch.device) -> RopeTable:
    return RopeTable.make(inverse_frequencies(dim, 10000.0, device=device), tokens)


def _make(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    sizes = shape["tokens"], shape["rows"]
    q = normal(*sizes, shape["heads"], 128, dtype=dtype, device=device)
    return q, normal(*sizes, shape["groups"], 128, dtype=dtype, device=device)


def _bytes(shape: Shape, dtype: torch.dtype) -> Work:
    tokens, rows = shape["tokens"], shape["rows"]
    moved = 2 * tokens * rows * (shape["heads"] + shape["groups"]) * 128 * dtype.itemsize + tokens * rows * 128 * 4
    return Work(moved, moved)


def _ours() -> Callable[..., Any]:
    from llm_kernels.rope.op import rope

    return lambda q, k: rope(q, k, _table(q.shape[0], q.shape[3], q.device), backend="triton")


def _torch(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = (x.to(q.dtype) for x in _table(q.shape[0], q.shape[3], q.device).full(q.shape[0]))

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return rotate(q), rotate(k)


def _liger() -> Callable[..., Any]:
    from liger_kernel.ops.rope import LigerRopeFunction

    def run(q: Tensor, k: Tensor) -> Any:
        cos, sin = (x.squeeze(2).transpose(0, 1) for x in _table(q.shape[0], q.shape[3], q.device).full(q.shape[0]))
        return LigerRopeFunction.apply(q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), cos, sin)

    return run


def _transformer_engine() -> Callable[..., Any]:
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    def run(q: Tensor, k: Tensor) -> Any:
        frequencies = inverse_frequencies(q.shape[3], 10000.0, device=q.device)
        angles = torch.arange(q.shape[0], device=q.device).unsqueeze(1) * frequencies
        angles = torch.cat((angles, angles), dim=-1)[:, None, None]
        return tuple(apply_rotary_pos_emb(x, angles, "sbhd", fused=True) for x in (q, k))

    return run


BENCHMARK = Benchmark(
    name="rope",
    shapes=sharded(
        lambda llama, tp: {"tokens": 4096, "rows": 2, "heads": llama.heads // tp, "groups": llama.groups // tp}
    ),
    small={"name": "small", "tokens": 16, "rows": 1, "heads": 16, "groups": 8},
    make=_make,
    providers={
        "ours": _ours,
        "torch": lambda: _torch,
        "torch.compile": lambda: torch.compile(_torch),
        "liger": _liger,
        "transformer_engine": _transformer_engine,
    },
    bytes_moved=_bytes,
)


def aot_cases(arch: int) -> list[AotCase]:
    """Queries and keys in two tensors and packed, both pairings, head dims 64, 96 and 128, with and without an array of
    positions."""
    import triton

    from llm_kernels.rope.kernel import NUM_WARPS, _rope_kernel, block_heads

    cases = []
    for dim, heads, groups, interleaved, packed in (
        (128, 32, 32, False, False), (128, 32, 8, False, True), (64, 32, 8, False, True), (96, 32, 32, False, False),
        (128, 32, 8, True, True), (128, 16, 1, False, True),
    ):  # fmt: skip
        group = heads // groups + 2
        count = groups * group if packed else heads
        strides = {
            f"{name}_{axis}_stride": {"token": count * dim, "row": count * dim, "head": dim}[axis]
            for name in ("q", "k", "q_out", "k_out")
            for axis in ("token", "row", "head")
        }
        pointers = dict.fromkeys(("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr"), "*bf16")
        arguments = {
            **strides, **pointers, "cos_ptr": "*fp32", "sin_ptr": "*fp32",
            "positions_ptr": "*i32" if packed else None, "offset": 0, "positions_token_stride": 1,
            "positions_row_stride": 0, "Q_HEADS": count, "K_HEADS": 0 if packed else groups,
            "GROUP": group if packed else 0, "HALF": dim // 2, "REST": 0, "BLOCK_R": 1,
            "BLOCK_H": block_heads(count, dim // 2),
            "BLOCK_D": triton.next_power_of_2(dim // 2), "INTERLEAVED": interleaved, "INVERSE": False,
        }  # fmt: skip
        name = f"rope {'packed' if packed else 'q, k'}{' interleaved' if interleaved else ''} d={dim} {heads}/{groups}"
        # One load may be narrow: the token's position is a single number.
        cases.append(AotCase(name, _rope_kernel, arguments, NUM_WARPS, wants=frozenset({"wide"}), narrow_allowed=1))
    return cases
