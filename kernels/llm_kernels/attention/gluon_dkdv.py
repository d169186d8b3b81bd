"""dk and dv of attention for Hopper in Gluon: see gluon_backward for shapes and formulas.

One warp loads by TMA, two warpgroups compute 64 keys each. A program's 128 keys and values stay in shared memory. Its
loop runs over the queries and dout of all heads of the group, 64 at a time, with their lse and delta. Scores are
transposed, keys by queries, so that weights and their gradients are operands of the second products from registers.
Rows beyond a segment must be finite.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from llm_kernels.attention.gluon_forward import BLOCK_M, HALF, LOG2E, where_not_negative

# Queries of one tile in the loop.
QUERIES: gl.constexpr = gl.constexpr(64)


@gluon.jit
def segment_of(row):
    """(batch row, first query, number of queries, first key, number of keys) from a row of the table of segments."""
    q_start = gl.load(row + 1)
    k_start = gl.load(row + 3)
    return gl.load(row), q_start, gl.load(row + 2) - q_start, k_start, gl.load(row + 4) - k_start


@gluon.jit
def store_rows(pointer, tile, first, rows, row_stride):
    """Stores those of rows [first, first + 64) that are below ``rows`` to the tensor at ``pointer``, each thread 16
    bytes at a time."""
    D: gl.constexpr = tile.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    tile = gl.convert_layout(tile, layout)
    at = gl.arange(0, HALF, gl.SliceLayout(1, layout))
    # The row numbers pass through a wait for nothing: else their addresses are computed before the loop and occupy
    # registers in it.
    at = warpgroup_mma_wait(0, [at])
    cols = gl.arange(0, D, gl.SliceLayout(0, layout))
    base = pointer + first.to(gl.int64) * row_stride
    gl.store(base + at.to(gl.int64)[:, None] * row_stride + cols[None, :], tile, mask=(at < rows - first)[:, None])


@gluon.jit
def _query_tiles(first, len_q, len_k, CAUSAL: gl.constexpr):
    """The range of tiles of queries that see any key from ``first`` on: first tile, and one after the last."""
    low = 0
    if CAUSAL:
        low = gl.maximum(first - (len_k - len_q), 0) // QUERIES
    return low, (len_q + QUERIES - 1) // QUERIES


@gluon.jit
def _load_queries(
    descriptors, buffers, barriers, schedule, stats, q_place, k_place, v_place, GROUP: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Loads the program's k and v once, then q, dout, lse and delta of all its heads, tile by tile."""
    q_desc, k_desc, v_desc, dout_desc = descriptors
    k_tiles, v_tiles, q_tiles, dout_tiles, lse_tiles, delta_tiles = buffers
    lse_ptr, delta_ptr, SQ = stats
    lanes = gl.arange(0, QUERIES, gl.BlockedLayout([2], [32], [1], [0]))
    kv_full, q_full, dout_full, empty = barriers
    table_ptr, G, H = schedule
    group = gl.program_id(0) % G
    batch, q_start, len_q, k_start, len_k = segment_of(table_ptr + gl.program_id(0) // G * 5)
    first = gl.program_id(1) * BLOCK_M
    if first < len_k:
        k_col = batch * k_place[0] + group * k_place[1]
        v_col = batch * v_place[0] + group * v_place[1]
        mbarrier.expect(kv_full.index(0), 4 * HALF * D * 2)
        for which in gl.static_range(2):
            row = k_start + first + which * HALF
            tma.async_copy_global_to_shared(k_desc, [row, k_col], kv_full.index(0), k_tiles.index(which))
            tma.async_copy_global_to_shared(v_desc, [row, v_col], kv_full.index(0), v_tiles.index(which))
        low, high = _query_tiles(first, len_q, len_k, CAUSAL)
        n = 0
        for member in range(GROUP):
            q_col = batch * q_place[0] + group * q_place[1] + member * q_place[2]
            head = batch * H + group * GROUP + member
            dout_col = head * D
            # 32 bits suffice: 2^31 queries, counted over all heads, would be 256 GiB of q.
            stats_row = head * SQ + q_start
            for tile in range(low, high):
                stage = n % STAGES
                free = (n // STAGES & 1) ^ 1
                row = q_start + tile * QUERIES
                queries = tile * QUERIES + lanes
                inside = queries < len_q
                # An lse of inf gives queries beyond the segment the weight 0.
                lse = gl.load(lse_ptr + (stats_row + queries), mask=inside, other=float("inf"))
                delta = gl.load(delta_ptr + (stats_row + queries), mask=inside, other=0.0)
                mbarrier.wait(empty.index(stage), free)
                mbarrier.expect(q_full.index(stage), QUERIES * D * 2)
                tma.async_copy_global_to_shared(q_desc, [row, q_col], q_full.index(stage), q_tiles.index(stage))
                lse_tiles.index(stage).store(lse)
                delta_tiles.index(stage).store(delta)
                mbarrier.arrive(q_full.index(stage), count=1)
                mbarrier.expect(dout_full.index(stage), QUERIES * D * 2)
                tma.async_copy_global_to_shared(
                    dout_desc, [row, dout_col], dout_full.index(stage), dout_tiles.index(stage)
                )
                n += 1


@gluon.jit
def _keys_step(dk, dv, k, v, buffers, barriers, factor, sees, query, n, STAGES: gl.constexpr, EDGE: gl.constexpr):
    """Adds to dk and dv the terms of the queries of tile n. Key i is seen by the queries from sees[i] on."""
    q_tiles, dout_tiles, lse_tiles, delta_tiles = buffers
    q_full, dout_full, empty = barriers
    score_layout: gl.constexpr = sees.type.layout.parent
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    stage = n % STAGES
    parity = n // STAGES & 1
    row_layout: gl.constexpr = gl.SliceLayout(0, score_layout)
    zero = gl.zeros([HALF, QUERIES], gl.float32, score_layout)
    mbarrier.wait(q_full.index(stage), parity)
    scores = warpgroup_mma(k, q_tiles.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(dout_full.index(stage), parity)
    shares = warpgroup_mma(v, dout_tiles.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    queries = query + gl.arange(0, QUERIES, row_layout)
    if EDGE:
        # The query numbers pass through the wait: else they are computed earlier and occupy registers.
        s, queries = warpgroup_mma_wait(1, [scores, queries])
    else:
        s = warpgroup_mma_wait(1, [scores])
    if EDGE:
        s = where_not_negative(s, queries[None, :] - sees[:, None])
    p = gl.exp2(s * factor - lse_tiles.index(stage).load(row_layout)[None, :])
    weights = gl.convert_layout(p.to(k.dtype), weight_layout)
    # This barrier has been passed already. Its loop keeps ptxas from moving the exponentials behind the next wait.
    mbarrier.wait(dout_full.index(stage), parity)
    dp = warpgroup_mma_wait(0, [shares])
    value_product = warpgroup_mma(weights, dout_tiles.index(stage), dv, is_async=True)
    ds = gl.convert_layout((p * (dp - delta_tiles.index(stage).load(row_layout)[None, :])).to(k.dtype), weight_layout)
    key_product = warpgroup_mma(ds, q_tiles.index(stage), dk, is_async=True)
    dk, dv, _weights, _ds = warpgroup_mma_wait(0, [key_product, value_product, weights, ds])
    mbarrier.arrive(empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def _gather_keys(
    buffers, barriers, schedule, results, scale,
    WHICH: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """dk and dv of the program's keys [WHICH * 64, WHICH * 64 + 64)."""
    k_tiles, v_tiles, q_tiles, dout_tiles, lse_tiles, delta_tiles = buffers
    kv_full, q_full, dout_full, empty = barriers
    table_ptr, G, _H = schedule
    dk_ptr, dv_ptr, dk_place, dv_place = results
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUERIES, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    group = gl.program_id(0) % G
    batch, _q_start, len_q, k_start, len_k = segment_of(table_ptr + gl.program_id(0) // G * 5)
    first = gl.program_id(1) * BLOCK_M
    if first < len_k:
        low, high = _query_tiles(first, len_q, len_k, CAUSAL)
        first += WHICH * HALF
        sees = gl.full([HALF], 0, gl.int32, gl.SliceLayout(1, score_layout))
        edge = low
        if CAUSAL:
            shift = len_k - len_q
            sees = first - shift + gl.arange(0, HALF, gl.SliceLayout(1, score_layout))
            edge = gl.minimum(gl.maximum((first + HALF - 1 - shift + QUERIES - 1) // QUERIES, low), high)
        dk = gl.zeros([HALF, D], gl.float32, acc_layout)
        dv = gl.zeros([HALF, D], gl.float32, acc_layout)
        k = k_tiles.index(WHICH)
        v = v_tiles.index(WHICH)
        mbarrier.wait(kv_full.index(0), 0)
        n = 0
        streams = (q_tiles, dout_tiles, lse_tiles, delta_tiles)
        signals = (q_full, dout_full, empty)
        for _member in range(GROUP):
            for tile in range(low, edge):
                dk, dv = _keys_step(
                    dk, dv, k, v, streams, signals, scale * LOG2E, sees, tile * QUERIES, n + tile - low, STAGES, True
                )
            for tile in range(edge, high):
                dk, dv = _keys_step(
                    dk, dv, k, v, streams, signals, scale * LOG2E, sees, tile * QUERIES, n + tile - low, STAGES, False
                )
            n += gl.maximum(high - low, 0)
        # Loaded a second time: kept in registers through the loop, these numbers would be spilled.
        batch, _q_start, _len_q, k_start, len_k = segment_of(table_ptr + gl.program_id(0) // G * 5)
        first = gl.program_id(1) * BLOCK_M + WHICH * HALF
        dk_base = dk_ptr + batch.to(gl.int64) * dk_place[1] + group.to(gl.int64) * dk_place[2]
        dv_base = dv_ptr + batch.to(gl.int64) * dv_place[1] + group.to(gl.int64) * dv_place[2]
        store_rows(dk_base + k_start.to(gl.int64) * dk_place[0], (dk * scale).to(k.dtype), first, len_k, dk_place[0])
        store_rows(dv_base + k_start.to(gl.int64) * dv_place[0], dv.to(k.dtype), first, len_k, dv_place[0])


@gluon.jit(do_not_specialize=["G", "H", "SQ"])
def _attention_bwd_dkdv_gluon_kernel(
    q_desc, k_desc, v_desc, dout_desc, lse_ptr, delta_ptr, dk_ptr, dv_ptr, table_ptr, G, H, SQ,
    q_batch_col, q_group_col, q_head_col, k_batch_col, k_group_col, v_batch_col, v_group_col,
    dk_row_stride, dk_batch_stride, dk_group_stride, dv_row_stride, dv_batch_stride, dv_group_stride, scale,
    GROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    k_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, HALF, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, HALF, D], v_desc.layout)
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [STAGES, QUERIES, D], q_desc.layout)
    dout_tiles = gl.allocate_shared_memory(q_desc.dtype, [STAGES, QUERIES, D], dout_desc.layout)
    stat_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, QUERIES], stat_layout)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, QUERIES], stat_layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], barrier)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    dout_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    mbarrier.init(kv_full.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=2)
        mbarrier.init(dout_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    buffers = (k_tiles, v_tiles, q_tiles, dout_tiles, lse_tiles, delta_tiles)
    barriers = (kv_full, q_full, dout_full, empty)
    schedule = (table_ptr, G, H)
    stats = (lse_ptr, delta_ptr, SQ)
    dk_place = (dk_row_stride, dk_batch_stride, dk_group_stride)
    dv_place = (dv_row_stride, dv_batch_stride, dv_group_stride)
    results = (dk_ptr, dv_ptr, dk_place, dv_place)
    descriptors = (q_desc, k_desc, v_desc, dout_desc)
    q_place = (q_batch_col, q_group_col, q_head_col)
    k_place = (k_batch_col, k_group_col)
    v_place = (v_batch_col, v_group_col)
    gl.warp_specialize(
        [
            (_gather_keys, (buffers, barriers, schedule, results, scale, 0, GROUP, D, STAGES, CAUSAL)),
            (_gather_keys, (buffers, barriers, schedule, results, scale, 1, GROUP, D, STAGES, CAUSAL)),
            (
                _load_queries,
                (descriptors, buffers, barriers, schedule, stats, q_place, k_place, v_place, GROUP, D, STAGES, CAUSAL),
            ),
        ],
        [4, 1],
        [240, 24],
    )
