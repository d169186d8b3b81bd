"""Attention forward for Hopper in Gluon: warps with roles (Shah et al. 2024, arXiv 2407.08608), for sm_90 only.

q: [sq, b, g, m, d] (m query heads of each of g groups), k, v: [sk, b, g, d], bf16 or fp16, d 64, 128 or 256 and
contiguous, also as views of one packed tensor; out [sq, b, g m, d] contiguous; lse fp32 [b, g m, sq]. Scores, weights
and sums are fp32; weights are rounded to v's dtype for the second product. The work is a table of segments int32
[n, 5]: (batch row, q_start, q_end, k_start, k_end). Formula: ref.explicit, causal or full, without window, soft cap and
dropout.

One warp loads by TMA. Two warpgroups, the consumers, compute 64 queries each and take turns at the tensor core: while
one multiplies, the other exponentiates. Programs are persistent and compute one tile of queries after another: long
ones first, and heads in sections whose keys fit in L2. Rows of k and v beyond a segment are masked, but must be finite.
FLOPs: 4 d per visible (query, key) and head. Bytes, at least: q, k, v and out once, 4 per query and head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from llm_kernels.attention.ref import Options
from llm_kernels.device import num_sms

LOG2E: gl.constexpr = gl.constexpr(1.4426950408889634)
LN2: gl.constexpr = gl.constexpr(0.6931471805599453)
# The running maximum starts here, in base 2. It is above every masked score, so -inf - -inf cannot occur.
FLOOR: gl.constexpr = gl.constexpr(-(2.0**100))
LOST: gl.constexpr = gl.constexpr(2.0**24)  # as in kernel.py
# Queries of a consumer and of a program.
HALF: gl.constexpr = gl.constexpr(64)
BLOCK_M: gl.constexpr = gl.constexpr(128)
# Bytes of keys and values of a section, the heads that are computed at one time; an H100 has 50 MB of L2.
_SECTION_BYTES = 32 << 20


class Config(NamedTuple):
    """Keys of a tile, stages of k and of v, registers of a consumer's thread, and whether the consumers take turns."""

    block_n: int
    stages: int
    registers: int
    turns: bool


def config(d: int) -> Config:
    """Configuration for head dim ``d``; the threads of the loading warp have 24 registers."""
    return Config(64, 2, 240, False) if d > 128 else Config(128, 2, 240, True)


@gluon.jit
def _tile_of(turn, table_ptr, H, columns, section, row_tiles, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """The tile of queries that this program computes in its ``turn``: head, batch row, first query, bounds of the
    segment, and the number of tiles of keys, which is 0 if nothing is left to do.

    A column is one head of one segment. Sections of columns follow one another; within a section the last queries,
    which see the most keys, come first. The order of the programs is reversed every other turn, so that no program
    always gets the longer tile.
    """
    programs = gl.num_programs(0)
    program = gl.program_id(0)
    index = turn * programs + gl.where(turn % 2 == 0, program, programs - 1 - program)
    live = index < columns * row_tiles
    index = gl.where(live, index, 0)
    start = index // (section * row_tiles) * section
    within = index - start * row_tiles
    width = gl.minimum(section, columns - start)
    first = (row_tiles - 1 - within // width) * BLOCK_M
    column = start + within % width
    h = column % H
    row = table_ptr + column // H * 5
    batch = gl.load(row)
    q_start = gl.load(row + 1)
    len_q = gl.load(row + 2) - q_start
    k_start = gl.load(row + 3)
    len_k = gl.load(row + 4) - k_start
    seen = len_k
    if CAUSAL:
        seen = gl.minimum(len_k, gl.minimum(first + BLOCK_M, len_q) + len_k - len_q)
    # Queries that see no key still need zeros written, by one tile of keys that is masked as a whole.
    tiles = gl.maximum((seen + BLOCK_N - 1) // BLOCK_N, 1)
    tiles = gl.where(live & (first < len_q), tiles, 0)
    return h, batch, first, q_start, len_q, k_start, len_k, tiles


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, buffers, barriers, schedule, q_place, k_place, v_place,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """The loading warp: for every tile of queries of the program, loads q once, then k and v tile by tile."""
    q_tiles, k_tiles, v_tiles = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _ = barriers
    table_ptr, H, columns, section, row_tiles, turns = schedule
    filled = 0
    begun = 0
    for turn in range(turns):
        h, batch, first, q_start, _len_q, k_start, _len_k, tiles = _tile_of(
            turn, table_ptr, H, columns, section, row_tiles, BLOCK_N, CAUSAL
        )
        if tiles > 0:
            group = h // GROUP
            q_row = q_start + first
            q_col = batch * q_place[0] + group * q_place[1] + h % GROUP * q_place[2]
            for which in gl.static_range(2):
                mbarrier.wait(q_empty.index(which), (begun & 1) ^ 1)
                mbarrier.expect(q_full.index(which), HALF * D * 2)
                tma.async_copy_global_to_shared(
                    q_desc, [q_row + which * HALF, q_col], q_full.index(which), q_tiles.index(which)
                )
            k_col = batch * k_place[0] + group * k_place[1]
            v_col = batch * v_place[0] + group * v_place[1]
            for i in range(tiles):
                stage = (filled + i) % STAGES
                free = ((filled + i) // STAGES & 1) ^ 1
                mbarrier.wait(k_empty.index(stage), free)
                mbarrier.expect(k_full.index(stage), BLOCK_N * D * 2)
                tma.async_copy_global_to_shared(
                    k_desc, [k_start + i * BLOCK_N, k_col], k_full.index(stage), k_tiles.index(stage)
                )
                mbarrier.wait(v_empty.index(stage), free)
                mbarrier.expect(v_full.index(stage), BLOCK_N * D * 2)
                tma.async_copy_global_to_shared(
                    v_desc, [k_start + i * BLOCK_N, v_col], v_full.index(stage), v_tiles.index(stage)
                )
            filled += tiles
            begun += 1


@gluon.jit
def where_not_negative(s, sign):
    """Scores where ``sign`` is not negative, elsewhere -2^127: the minimum of s and 2^127 with that sign. The compiler
    would pack the results of comparisons into registers and unpack them again, 100 instructions a tile."""
    bound = ((sign & -2147483648) | 0x7F000000).to(gl.float32, bitcast=True)
    return gl.minimum(s, bound, propagate_nan=tl.PropagateNan.ALL)


@gluon.jit
def _weigh(s, row_max, row_sum, factor, keys, limit, EDGE: gl.constexpr):
    """Weights from the scores of a tile, new running maximum (base 2) and sum. Row i sees keys below limit[i]."""
    if EDGE:
        s = where_not_negative(s, limit[:, None] - 1 - keys[None, :])
    new_max = gl.maximum(row_max, gl.max(s, 1) * factor)
    # exp2(s c - m c): scaling the scores costs no instruction of its own.
    p = gl.exp2(s * factor - new_max[:, None])
    alpha = gl.exp2(row_max - new_max)
    return p, alpha, new_max, row_sum * alpha + gl.sum(p, 1)


@gluon.jit
def _step(
    q, buffers, barriers, acc, p, row_max, row_sum, factor, key, limit, n, taken,
    WHICH: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """Scores of tile n, counted over the whole program, and, while they become weights, the product of tile n - 1."""
    _, k_tiles, v_tiles = buffers
    _, _, k_full, k_empty, v_full, v_empty, turn = barriers
    score_layout: gl.constexpr = row_max.type.layout.parent
    acc_layout: gl.constexpr = acc.type.layout
    weight_layout: gl.constexpr = p.type.layout
    stage = n % STAGES
    before = (n - 1) % STAGES
    if TURNS:
        mbarrier.wait(turn.index(WHICH), (taken & 1) ^ (1 - WHICH))
    mbarrier.wait(k_full.index(stage), n // STAGES & 1)
    BLOCK_N: gl.constexpr = k_tiles.shape[1]
    zero = gl.zeros([HALF, BLOCK_N], gl.float32, score_layout)
    scores = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    product = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
    if TURNS:
        mbarrier.arrive(turn.index(1 - WHICH), count=1)
    keys = key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, score_layout))
    if EDGE:
        # The key numbers pass through the wait: else they are computed at the start and occupy 32 registers.
        s, keys = warpgroup_mma_wait(1, [scores, keys])
    else:
        s = warpgroup_mma_wait(1, [scores])
    mbarrier.arrive(k_empty.index(stage), count=1)
    weights, alpha, row_max, row_sum = _weigh(s, row_max, row_sum, factor, keys, limit, EDGE)
    # The next step needs this barrier. It stands here because its loop keeps ptxas from moving the exponentials behind
    # the wait for the product.
    mbarrier.wait(v_full.index(stage), n // STAGES & 1)
    acc, _p = warpgroup_mma_wait(0, [product, p])
    mbarrier.arrive(v_empty.index(before), count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc_layout))[:, None]
    # The wait for nothing makes ptxas keep pairs of weights in one register from step to step, which saves 32
    # instructions.
    p = warpgroup_mma_wait(0, [gl.convert_layout(weights.to(p.dtype), weight_layout)])
    return acc, p, row_max, row_sum


@gluon.jit
def _attend(
    buffers, barriers, schedule, results, factor,
    WHICH: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    """A consumer: output and log-sum-exp of queries [WHICH * 64, WHICH * 64 + 64) of each of the program's tiles."""
    q_tiles, k_tiles, v_tiles = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _ = barriers
    table_ptr, H, columns, section, row_tiles, turns = schedule
    out_ptr, lse_ptr, out_row_stride, SQ = results
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    rows_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    # 16 bytes a thread; at head dim 256 the change of layout would need more shared memory than there is.
    wide_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    store_layout: gl.constexpr = wide_layout if D <= 128 else acc_layout
    q = q_tiles.index(WHICH)
    used = 0
    begun = 0
    taken = 0
    for turn in range(turns):
        h, batch, first, q_start, len_q, _k_start, len_k, tiles = _tile_of(
            turn, table_ptr, H, columns, section, row_tiles, BLOCK_N, CAUSAL
        )
        if tiles > 0:
            first += WHICH * HALF
            rows = first + gl.arange(0, HALF, rows_layout)
            limit = gl.full([HALF], 0, gl.int32, rows_layout) + len_k
            seen_by_all = len_k
            if CAUSAL:
                limit = gl.minimum(limit, rows + (len_k - len_q + 1))
                seen_by_all = gl.minimum(len_k, first + len_k - len_q + 1)
            whole = gl.minimum(gl.maximum(seen_by_all // BLOCK_N, 1), tiles)

            mbarrier.wait(q_full.index(WHICH), begun & 1)
            mbarrier.wait(k_full.index(used % STAGES), used // STAGES & 1)
            zero = gl.zeros([HALF, BLOCK_N], gl.float32, score_layout)
            s = warpgroup_mma(q, k_tiles.index(used % STAGES).permute((1, 0)), zero, use_acc=False)
            keys = gl.arange(0, BLOCK_N, gl.SliceLayout(0, score_layout))
            mbarrier.arrive(k_empty.index(used % STAGES), count=1)
            row_max = gl.full([HALF], FLOOR, gl.float32, rows_layout)
            row_sum = gl.full([HALF], 0.0, gl.float32, rows_layout)
            weights, _alpha, row_max, row_sum = _weigh(s, row_max, row_sum, factor, keys, limit, True)
            p = gl.convert_layout(weights.to(q.dtype), weight_layout)
            mbarrier.wait(v_full.index(used % STAGES), used // STAGES & 1)
            acc = gl.zeros([HALF, D], gl.float32, acc_layout)
            for i in range(1, whole):
                acc, p, row_max, row_sum = _step(
                    q, buffers, barriers, acc, p, row_max, row_sum, factor, i * BLOCK_N, limit, used + i, taken + i - 1,
                    WHICH, STAGES, TURNS, False,
                )  # fmt: skip
            for i in range(whole, tiles):
                acc, p, row_max, row_sum = _step(
                    q, buffers, barriers, acc, p, row_max, row_sum, factor, i * BLOCK_N, limit, used + i, taken + i - 1,
                    WHICH, STAGES, TURNS, True,
                )  # fmt: skip
            mbarrier.arrive(q_empty.index(WHICH), count=1)
            used += tiles
            begun += 1
            taken += tiles - 1
            last = (used - 1) % STAGES
            product = warpgroup_mma(p, v_tiles.index(last), acc, is_async=True)
            # The row numbers pass through the wait: else their addresses are computed at the start, in 16 registers.
            at = gl.arange(0, HALF, gl.SliceLayout(1, store_layout))
            acc, _p, at = warpgroup_mma_wait(0, [product, p, at])
            mbarrier.arrive(v_empty.index(last), count=1)

            row_sum = gl.where((gl.maximum(row_max, 0.0 - row_max) >= LOST) & (row_max > FLOOR), float("nan"), row_sum)
            nothing = row_sum == 0.0
            row_sum = gl.where(nothing, 1.0, row_sum)
            lse = gl.where(nothing, float("-inf"), (row_max + gl.log2(row_sum)) * LN2)
            head = (batch * H + h).to(gl.int64)
            gl.store(lse_ptr + head * SQ + q_start + rows, lse, mask=rows < len_q)
            acc = acc * gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, acc_layout))[:, None]
            out = gl.convert_layout(acc.to(q.dtype), store_layout)
            cols = gl.arange(0, D, gl.SliceLayout(0, store_layout))
            base = out_ptr + (q_start + first).to(gl.int64) * out_row_stride + head * D
            places = base + at.to(gl.int64)[:, None] * out_row_stride + cols[None, :]
            gl.store(places, out, mask=(at < len_q - first)[:, None])


# Numbers that change from batch to batch are not specialised, so that they do not cause a compilation.
@gluon.jit(do_not_specialize=["H", "SQ", "columns", "section", "row_tiles", "turns"])
def _attention_fwd_gluon_kernel(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, table_ptr, H, SQ, out_row_stride, columns, section, row_tiles, turns,
    q_batch_col, q_group_col, q_head_col, k_batch_col, k_group_col, v_batch_col, v_group_col, scale,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
    CAUSAL: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, HALF, D], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_N, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_N, D], v_desc.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
        mbarrier.init(turn.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    buffers = (q_tiles, k_tiles, v_tiles)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turn)
    schedule = (table_ptr, H, columns, section, row_tiles, turns)
    results = (out_ptr, lse_ptr, out_row_stride, SQ)
    factor = scale * LOG2E
    q_place = (q_batch_col, q_group_col, q_head_col)
    k_place = (k_batch_col, k_group_col)
    v_place = (v_batch_col, v_group_col)
    gl.warp_specialize(
        [
            (_attend, (buffers, barriers, schedule, results, factor, 0, D, BLOCK_N, STAGES, CAUSAL, TURNS)),
            (_attend, (buffers, barriers, schedule, results, factor, 1, D, BLOCK_N, STAGES, CAUSAL, TURNS)),
            (
                _load,
                (
                    q_desc, k_desc, v_desc, buffers, barriers, schedule, q_place, k_place, v_place, GROUP, D, BLOCK_N,
                    STAGES, CAUSAL,
                ),
            ),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


def refusal(q: Tensor, k: Tensor, v: Tensor, options: Options, arch: int) -> str | None:
    """One sentence that says why the kernel does not support these tensors (q [sq, b, g, m, d], k and v [sk, b, g, d])
    and options, or None."""
    d = q.shape[-1]
    if arch != 90:
        return f"backend = 'gluon' needs a GPU of compute capability 9.0 (H100, H200), {q.device} is not one"
    if d not in (64, 128, 256) or q.dtype not in (torch.bfloat16, torch.float16):
        return f"backend = 'gluon' takes bf16 and fp16 of head dim 64, 128 or 256, this is {q.dtype} of {d}"
    if options.left >= 0 or options.right > 0 or options.softcap > 0 or options.dropout_p > 0:
        return "backend = 'gluon' has no window, soft cap or dropout: use backend = 'triton'"
    if any(x.stride(-1) != 1 or _row_stride(x) == 0 or x.data_ptr() % 16 for x in (q, k, v)):
        strides = ", ".join(str(tuple(x.stride())) for x in (q, k, v))
        wanted = "rows that do not overlap, begin at multiples of 16 bytes and are contiguous"
        return f"backend = 'gluon' needs {wanted}; q, k and v have strides {strides}"
    return None


def _row_stride(x: Tensor) -> int:
    """Distance between two rows, in elements, of ``x`` as the matrix that TMA reads: its rows are the first dim of
    ``x``, its columns all other dims. 0 if rows overlap or do not begin at multiples of 16 bytes."""
    strides = x.stride()[1:-1]
    width = sum((n - 1) * stride for n, stride in zip(x.shape[1:-1], strides)) + x.shape[-1]
    row_stride = x.stride(0) if x.shape[0] > 1 else width
    apart = row_stride >= width and min(strides) >= 0
    return row_stride if apart and all(stride % 8 == 0 for stride in (row_stride, *strides)) else 0


def shared_layout(block: int, d: int) -> Any:
    """Layout of a tile of 16-bit numbers in shared memory; it is part of a descriptor's type."""
    return gl.NVMMASharedLayout.get_default_for([block, d], gl.bfloat16)


def descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """``x`` as a matrix from which TMA reads ``block`` rows of one head at a time."""
    row_stride, d = _row_stride(x), x.shape[-1]
    return TensorDescriptor(x, [x.shape[0], row_stride], [row_stride, 1], [block, d], shared_layout(block, d))


def constants(d: int, m: int, causal: bool) -> dict[str, Any]:
    """Constexpr arguments for head dim ``d`` and ``m`` query heads in a group."""
    settings = config(d)
    return {
        "GROUP": m,
        "D": d,
        "BLOCK_N": settings.block_n,
        "STAGES": settings.stages,
        "REGISTERS": settings.registers,
        "CAUSAL": causal,
        "TURNS": settings.turns,
    }


def _arguments(
    tensors: tuple[Tensor, ...], table: Tensor, max_q: int, scale: float, causal: bool, programs: int
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and arguments of a launch of at most ``programs`` programs; tensors: q [sq, b, g, m, d], k, v, out, lse."""
    q, k, v, out, lse = tensors
    sq, b, groups, m, d = q.shape
    h = groups * m
    columns, row_tiles = h * len(table), triton.cdiv(max_q, BLOCK_M.value)
    group_bytes = 2 * k.shape[0] * b * d * k.element_size() // len(table)
    section = max(1, min(_SECTION_BYTES // max(group_bytes, 1), columns // m)) * m
    programs = min(programs, columns * row_tiles)
    arguments = {
        "q_desc": descriptor(q, HALF.value),
        "k_desc": descriptor(k, config(d).block_n),
        "v_desc": descriptor(v, config(d).block_n),
        "out_ptr": out,
        "lse_ptr": lse,
        "table_ptr": table,
        "H": h,
        "SQ": sq,
        "out_row_stride": b * h * d,
        "columns": columns,
        "section": section,
        "row_tiles": row_tiles,
        "turns": triton.cdiv(columns * row_tiles, programs),
        **dict(zip(("q_batch_col", "q_group_col", "q_head_col"), q.stride()[1:4])),
        **dict(zip(("k_batch_col", "k_group_col"), k.stride()[1:3])),
        **dict(zip(("v_batch_col", "v_group_col"), v.stride()[1:3])),
        "scale": scale,
        **constants(d, m, causal),
    }
    return (programs,), arguments


def _launch(grid: tuple[int], arguments: dict[str, Any]) -> None:
    """Launches the kernel; tests replace this function by the simulator."""
    _attention_fwd_gluon_kernel[grid](**arguments, num_warps=4)


def forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, max_q: int, covers_queries: bool, options: Options, arch: int
) -> tuple[Tensor, Tensor]:
    """Does what ``kernel.forward`` does: q [sq, b, g, m, d], k, v [sk, b, g, d] → (out [sq, b, g m, d], lse fp32
    [b, g m, sq]). Raises ValueError for what the kernel does not support."""
    reason = refusal(q, k, v, options, arch)
    if reason:
        raise ValueError(reason)
    sq, b, groups, m, d = q.shape
    out = torch.empty(sq, b, groups * m, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, groups * m, sq, dtype=torch.float32, device=q.device)
    nothing = 0 in (*out.shape, len(table), max_q, k.shape[0])
    if nothing or not covers_queries:
        out.zero_()
        lse.fill_(-torch.inf)
    if not nothing:
        _launch(*_arguments((q, k, v, out, lse), table, max_q, options.scale, options.right == 0, num_sms(q)))
    return out, lse
