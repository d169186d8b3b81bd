"""Attention forward for Hopper in Gluon: warps with roles (Shah et al. 2024, arXiv 2407.08608), for sm_90 only.

q: [sq, b, h, d] or [sq, b, g, m, d], k, v: [sk, b, g, d], bf16 or fp16, d 64, 128 or 256 and contiguous, any packing
that ``fits``; out [sq, b, h, d] contiguous; lse fp32 [b, h, sq]. Scores, weights and sums in fp32, weights rounded to
v's dtype for the second product. Work is a table of segments int32 [n, 5]: (batch row, q_start, q_end, k_start, k_end).
Formula: ref.explicit without window to the left, soft cap and dropout. Backward needs q, k, v, out and lse.

One warp loads by TMA, two warpgroups own 64 queries each and take turns at the tensor core: while one multiplies, the
other exponentiates. Programs stay and take tile after tile, long ones first, heads in sections whose keys fit in L2.
Rows of k and v beyond a segment are masked, those of v must be finite.
FLOPs: 4 d per visible (query, key) and head. Bytes, at least: q, k, v and out once, 4 per query and head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
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

from llm_kernels.aot import AotCase
from llm_kernels.device import num_sms

LOG2E: gl.constexpr = gl.constexpr(1.4426950408889634)
LN2: gl.constexpr = gl.constexpr(0.6931471805599453)
# Queries of a consumer, which is one warpgroup, and of a program.
HALF: gl.constexpr = gl.constexpr(64)
BLOCK_M: gl.constexpr = gl.constexpr(128)
# Keys and values of the heads in work at one time; an H100 has 50 MB of L2.
_SECTION_BYTES = 32 << 20


class Config(NamedTuple):
    """Keys of a tile, stages of k and v, registers of a consumer's thread, and whether consumers take turns."""

    block_n: int
    stages: int
    registers: int
    turns: bool


def config(d: int) -> Config:
    """Configuration for a head dim; the loading warp has 24 registers."""
    return Config(64, 2, 240, False) if d > 128 else Config(128, 2, 240, True)


@gluon.jit
def _tile_of(turn, table_ptr, H, columns, section, row_tiles, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """What the program does in its ``turn``: head, segment and first query, with 0 tiles of keys if nothing.

    A column is a head of a segment. Sections of columns follow one another; in a section the last queries, which see
    the most keys, come first. Programs go there and back, so that none always has the longer tile.
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
    # Queries that see nothing want their zeros written: a tile that is masked whole.
    tiles = gl.maximum((seen + BLOCK_N - 1) // BLOCK_N, 1)
    tiles = gl.where(live & (first < len_q), tiles, 0)
    return h, batch, first, q_start, len_q, k_start, len_k, tiles


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, buffers, barriers, schedule, q_place, k_place, v_place,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Fetches q once and k and v tile by tile for every tile of the program."""
    q_tiles, k_tiles, v_tiles = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _ = barriers
    table_ptr, H, columns, section, row_tiles, turns = schedule
    filled = 0
    begun = 0
    for turn in range(turns):
        h, batch, first, q_start, len_q, k_start, len_k, tiles = _tile_of(
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
def _weigh(s, row_max, row_sum, factor, key, limit, EDGE: gl.constexpr):
    """Scores of a tile to weights, with the running maximum (base 2) and sum. Row i sees keys below limit[i]."""
    layout: gl.constexpr = s.type.layout
    if EDGE:
        keys = key + gl.arange(0, s.shape[1], gl.SliceLayout(0, layout))
        s = gl.where(keys[None, :] < limit[:, None], s, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(s, 1) * factor)
    base = new_max
    if EDGE:
        # A query that has seen nothing yet stays at -inf, and -inf - -inf would be NaN.
        base = gl.where(new_max == float("-inf"), 0.0, new_max)
    # The scale is in the exponent's FFMA: exp2(s c - m c).
    p = gl.exp2(s * factor - base[:, None])
    alpha = gl.exp2(row_max - base)
    return p, alpha, new_max, row_sum * alpha + gl.sum(p, 1)


@gluon.jit
def _step(
    q, buffers, barriers, acc, p, row_max, row_sum, factor, key, limit, n, taken,
    WHICH: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """Scores of tile n (of all tiles so far) and, while they are turned into weights, the product of tile n - 1."""
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
    mbarrier.wait(v_full.index(before), (n - 1) // STAGES & 1)
    product = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
    if TURNS:
        mbarrier.arrive(turn.index(1 - WHICH), count=1)
    if EDGE:
        # The limit goes through the wait, or its 64 comparisons are made before and kept as bits: 230 instructions.
        s, limit = warpgroup_mma_wait(1, [scores, limit])
    else:
        s = warpgroup_mma_wait(1, [scores])
    mbarrier.arrive(k_empty.index(stage), count=1)
    weights, alpha, row_max, row_sum = _weigh(s, row_max, row_sum, factor, key, limit, EDGE)
    acc = warpgroup_mma_wait(0, [product])
    mbarrier.arrive(v_empty.index(before), count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc_layout))[:, None]
    return acc, gl.convert_layout(weights, weight_layout).to(p.dtype), row_max, row_sum


@gluon.jit
def _attend(
    buffers, barriers, schedule, results, factor,
    WHICH: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of the program's tiles, for rows [WHICH * 64, WHICH * 64 + 64) of each."""
    q_tiles, k_tiles, v_tiles = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _ = barriers
    table_ptr, H, columns, section, row_tiles, turns = schedule
    out_ptr, lse_ptr, out_row_stride, SQ = results
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    rows_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    # 16 bytes a thread; at 256 columns the exchange would not fit in shared memory.
    wide_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    store_layout: gl.constexpr = wide_layout if D <= 128 else acc_layout
    q = q_tiles.index(WHICH)
    used = 0
    begun = 0
    taken = 0
    for turn in range(turns):
        h, batch, first, q_start, len_q, k_start, len_k, tiles = _tile_of(
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
            mbarrier.arrive(k_empty.index(used % STAGES), count=1)
            row_max = gl.full([HALF], float("-inf"), gl.float32, rows_layout)
            row_sum = gl.full([HALF], 0.0, gl.float32, rows_layout)
            weights, alpha, row_max, row_sum = _weigh(s, row_max, row_sum, factor, 0, limit, True)
            p = gl.convert_layout(weights.to(q.dtype), weight_layout)
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
            mbarrier.wait(v_full.index(last), (used - 1) // STAGES & 1)
            acc = warpgroup_mma(p, v_tiles.index(last), acc)
            mbarrier.arrive(v_empty.index(last), count=1)

            nothing = row_sum == 0.0
            row_sum = gl.where(nothing, 1.0, row_sum)
            lse = gl.where(nothing, float("-inf"), (row_max + gl.log2(row_sum)) * LN2)
            head = (batch * H + h).to(gl.int64)
            gl.store(lse_ptr + head * SQ + q_start + rows, lse, mask=rows < len_q)
            acc = acc * gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, acc_layout))[:, None]
            out = gl.convert_layout(acc.to(q.dtype), store_layout)
            at = gl.arange(0, HALF, gl.SliceLayout(1, store_layout))
            cols = gl.arange(0, D, gl.SliceLayout(0, store_layout))
            base = out_ptr + (q_start + first).to(gl.int64) * out_row_stride + head * D
            gl.store(base + at[:, None] * out_row_stride + cols[None, :], out, mask=(at < len_q - first)[:, None])


@gluon.jit
def _attention_fwd_gluon_kernel(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, table_ptr, H, SQ, out_row_stride, columns, section, row_tiles, turns,
    q_batch_col, q_group_col, q_head_col, k_batch_col, k_group_col, v_batch_col, v_group_col, scale, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, CAUSAL: gl.constexpr, TURNS: gl.constexpr,
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


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel can read these: rows of TMA's matrix are the first dimension, its columns all others."""
    d = q.shape[-1]
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and q.dtype == k.dtype == v.dtype
        and d in (64, 128, 256)
        and all(x.stride(-1) == 1 and _row_stride(x) > 0 and x.data_ptr() % 16 == 0 for x in (q, k, v))
    )


def _row_stride(x: Tensor) -> int:
    """Elements from row to row, 0 if rows of different columns are not apart or not on 16 bytes."""
    strides = x.stride()[1:-1]
    width = sum((n - 1) * stride for n, stride in zip(x.shape[1:-1], strides)) + x.shape[-1]
    row_stride = x.stride(0) if x.shape[0] > 1 else width
    apart = row_stride >= width and min(strides) >= 0
    return row_stride if apart and all(stride % 8 == 0 for stride in (row_stride, *strides)) else 0


def _layout(block: int, d: int) -> Any:
    return gl.NVMMASharedLayout.get_default_for([block, d], gl.bfloat16)


def _descriptor(x: Tensor, block: int) -> TensorDescriptor:
    row_stride, d = _row_stride(x), x.shape[-1]
    return TensorDescriptor(x, [x.shape[0], row_stride], [row_stride, 1], [block, d], _layout(block, d))


def prepare(
    tensors: tuple[Tensor, ...], table: Tensor, max_q: int, scale: float, causal: bool, programs: int
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and arguments for (q [sq, b, g, m, d], k, v, out, lse)."""
    q, k, v, out, lse = tensors
    sq, b, groups, m, d = q.shape
    settings = config(d)
    h = groups * m
    columns, row_tiles = h * len(table), triton.cdiv(max_q, BLOCK_M.value)
    group_bytes = 2 * k.shape[0] * b * d * k.element_size() // max(len(table), 1)
    section = max(1, min(_SECTION_BYTES // max(group_bytes, 1), columns // m)) * m
    programs = min(programs, columns * row_tiles)
    arguments = {
        "q_desc": _descriptor(q, HALF.value),
        "k_desc": _descriptor(k, settings.block_n),
        "v_desc": _descriptor(v, settings.block_n),
        "out_ptr": out,
        "lse_ptr": lse,
        "table_ptr": table,
        "H": h,
        "SQ": sq,
        "out_row_stride": b * h * d,
        "columns": columns,
        "section": section,
        "row_tiles": row_tiles,
        "turns": triton.cdiv(columns * row_tiles, max(programs, 1)),
        **dict(zip(("q_batch_col", "q_group_col", "q_head_col"), q.stride()[1:4])),
        **dict(zip(("k_batch_col", "k_group_col"), k.stride()[1:3])),
        **dict(zip(("v_batch_col", "v_group_col"), v.stride()[1:3])),
        "scale": scale,
        **_constants(settings, d, m, causal),
    }
    return (programs,), arguments


def _constants(settings: Config, d: int, m: int, causal: bool) -> dict[str, Any]:
    return {
        "GROUP": m,
        "D": d,
        "BLOCK_N": settings.block_n,
        "STAGES": settings.stages,
        "REGISTERS": settings.registers,
        "CAUSAL": causal,
        "TURNS": settings.turns,
    }


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    max_q: int,
    scale: float,
    causal: bool,
    covers_queries: bool = True,
) -> tuple[Tensor, Tensor]:
    """(out, lse) for tensors that ``fits``; queries outside all segments get 0 and -inf if not ``covers_queries``."""
    if q.ndim == 4:
        q = q.unflatten(2, (k.shape[2], q.shape[2] // k.shape[2]))
    sq, b, groups, m, d = q.shape
    out = torch.empty(sq, b, groups * m, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, groups * m, sq, dtype=torch.float32, device=q.device)
    if not covers_queries:
        out.zero_()
        lse.fill_(-torch.inf)
    if 0 in (*out.shape, len(table), max_q):
        return out, lse
    if k.shape[0] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    grid, arguments = prepare((q, k, v, out, lse), table, max_q, scale, causal, num_sms(q))
    _attention_fwd_gluon_kernel[grid](**arguments, num_warps=4)
    return out, lse


def aot_cases_gluon(arch: int) -> list[AotCase]:
    """Llama-3 8B's heads at 8192 tokens packed as megatron does, and the other head dims and dtypes; sm_90 only."""
    cases = []
    variants = [(d, causal, "bf16") for d in (64, 128, 256) for causal in (True, False)] + [(128, True, "fp16")]
    for d, causal, dtype in variants if arch == 90 else []:
        settings = config(d)
        blocks = {"q_desc": HALF.value, "k_desc": settings.block_n, "v_desc": settings.block_n}
        arguments = {name: f"tensordesc<{dtype}[{n}, {d}],{_layout(n, d)!r}>" for name, n in blocks.items()}
        arguments |= {"out_ptr": f"*{dtype}", "lse_ptr": "*fp32", "table_ptr": "*i32", "H": 32, "SQ": 8192}
        arguments |= {"out_row_stride": 32 * d, "columns": 32, "section": 32, "row_tiles": 64, "turns": "i32"}
        arguments |= {"q_batch_col": 48 * d, "q_group_col": 6 * d, "q_head_col": d, "scale": "fp32"}
        arguments |= dict.fromkeys(("k_batch_col", "v_batch_col"), 48 * d)
        arguments |= dict.fromkeys(("k_group_col", "v_group_col"), 6 * d)
        arguments |= _constants(settings, d, 4, causal)
        name = f"attention fwd gluon d={d} {'causal' if causal else 'full'} {dtype}"
        wants = frozenset({"tensor_core", "specialized"})
        cases.append(AotCase(name, _attention_fwd_gluon_kernel, arguments, 4, settings.stages, wants, gluon=True))
    return cases
