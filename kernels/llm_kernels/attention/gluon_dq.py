"""dq of attention for Hopper in Gluon: see gluon_backward for shapes and formulas.

One warp loads by TMA, two warpgroups compute 64 queries each. Queries and dout stay in shared memory; the loop runs
over tiles of keys and values. While the gradients of one tile's scores are computed, the product of the previous tile's
with its keys runs. Rows beyond a segment must be finite.
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

from llm_kernels.attention.gluon_dkdv import segment_of, store_rows
from llm_kernels.attention.gluon_forward import BLOCK_M, HALF, LOG2E, where_not_negative


@gluon.jit
def _keys_seen(first, len_q, len_k, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """Number of tiles of keys that any of the queries [first, first + 128) sees."""
    seen = len_k
    if CAUSAL:
        seen = gl.minimum(len_k, gl.minimum(first + BLOCK_M, len_q) + len_k - len_q)
    tiles = gl.maximum(seen + BLOCK_N - 1, 0) // BLOCK_N
    return gl.where(first < len_q, tiles, 0)


@gluon.jit
def _load_keys(
    descriptors, buffers, barriers, schedule, q_place, k_place, v_place, GROUP: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Loads the program's q and dout once, then k and v tile by tile."""
    q_desc, k_desc, v_desc, dout_desc = descriptors
    q_tiles, dout_tiles, k_tiles, v_tiles = buffers
    q_full, k_full, k_empty, v_full, v_empty = barriers
    table_ptr, H = schedule
    STAGES_K: gl.constexpr = k_tiles.shape[0]
    STAGES_V: gl.constexpr = v_tiles.shape[0]
    h = gl.program_id(0) % H
    batch, q_start, len_q, k_start, len_k = segment_of(table_ptr + gl.program_id(0) // H * 5)
    first = (gl.num_programs(1) - 1 - gl.program_id(1)) * BLOCK_M
    tiles = _keys_seen(first, len_q, len_k, BLOCK_N, CAUSAL)
    if tiles > 0:
        group = h // GROUP
        q_col = batch * q_place[0] + group * q_place[1] + h % GROUP * q_place[2]
        k_col = batch * k_place[0] + group * k_place[1]
        v_col = batch * v_place[0] + group * v_place[1]
        dout_col = (batch * H + h) * D
        for which in gl.static_range(2):
            row = q_start + first + which * HALF
            mbarrier.expect(q_full.index(which), 2 * HALF * D * 2)
            tma.async_copy_global_to_shared(q_desc, [row, q_col], q_full.index(which), q_tiles.index(which))
            tma.async_copy_global_to_shared(dout_desc, [row, dout_col], q_full.index(which), dout_tiles.index(which))
        for n in range(tiles):
            row = k_start + n * BLOCK_N
            k_stage = n % STAGES_K
            mbarrier.wait(k_empty.index(k_stage), (n // STAGES_K & 1) ^ 1)
            mbarrier.expect(k_full.index(k_stage), BLOCK_N * D * 2)
            tma.async_copy_global_to_shared(k_desc, [row, k_col], k_full.index(k_stage), k_tiles.index(k_stage))
            v_stage = n % STAGES_V
            mbarrier.wait(v_empty.index(v_stage), (n // STAGES_V & 1) ^ 1)
            mbarrier.expect(v_full.index(v_stage), BLOCK_N * D * 2)
            tma.async_copy_global_to_shared(v_desc, [row, v_col], v_full.index(v_stage), v_tiles.index(v_stage))


@gluon.jit
def _queries_step(
    dq, ds, q, dout, buffers, barriers, lse, delta, factor, limit, n, BEFORE: gl.constexpr, EDGE: gl.constexpr
):
    """Computes ds, the gradients of the scores, of tile n and meanwhile, with BEFORE, adds ds k of tile n - 1 to dq."""
    k_tiles, v_tiles = buffers
    k_full, k_empty, v_full, v_empty = barriers
    STAGES_K: gl.constexpr = k_tiles.shape[0]
    STAGES_V: gl.constexpr = v_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[1]
    score_layout: gl.constexpr = lse.type.layout.parent
    k_stage = n % STAGES_K
    v_stage = n % STAGES_V
    before = (n - 1) % STAGES_K
    zero = gl.zeros([HALF, BLOCK_N], gl.float32, score_layout)
    keys = n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, score_layout))
    mbarrier.wait(k_full.index(k_stage), n // STAGES_K & 1)
    scores = warpgroup_mma(q, k_tiles.index(k_stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(v_stage), n // STAGES_V & 1)
    shares = warpgroup_mma(dout, v_tiles.index(v_stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    if BEFORE:
        product = warpgroup_mma(ds, k_tiles.index(before), dq, is_async=True)
        s, keys = warpgroup_mma_wait(2, [scores, keys])
    else:
        s, keys = warpgroup_mma_wait(1, [scores, keys])
    if EDGE:
        s = where_not_negative(s, limit[:, None] - 1 - keys[None, :])
    p = gl.exp2(s * factor - lse[:, None])
    # This barrier has been passed already, and so has the one below. Their loops keep ptxas from moving the
    # instructions above behind the waits for the products.
    mbarrier.wait(k_full.index(k_stage), n // STAGES_K & 1)
    dp = warpgroup_mma_wait(1 if BEFORE else 0, [shares])
    share = p * (dp - delta[:, None])
    mbarrier.wait(v_full.index(v_stage), n // STAGES_V & 1)
    mbarrier.arrive(v_empty.index(v_stage), count=1)
    if BEFORE:
        dq, _ds = warpgroup_mma_wait(0, [product, ds])
        mbarrier.arrive(k_empty.index(before), count=1)
    # The wait for nothing makes ptxas keep pairs of 16-bit numbers in one register from step to step.
    ds = warpgroup_mma_wait(0, [gl.convert_layout(share.to(ds.dtype), ds.type.layout)])
    return dq, ds


@gluon.jit
def _gather_queries(
    buffers, barriers, schedule, stats, results, scale,
    WHICH: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """dq of the program's queries [WHICH * 64, WHICH * 64 + 64)."""
    q_tiles, dout_tiles, k_tiles, v_tiles = buffers
    q_full, k_full, k_empty, v_full, v_empty = barriers
    table_ptr, H = schedule
    lse_ptr, delta_ptr, SQ = stats
    dq_ptr, dq_place = results
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    rows_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    STAGES_K: gl.constexpr = k_tiles.shape[0]
    h = gl.program_id(0) % H
    batch, q_start, len_q, _k_start, len_k = segment_of(table_ptr + gl.program_id(0) // H * 5)
    first = (gl.num_programs(1) - 1 - gl.program_id(1)) * BLOCK_M
    if first < len_q:
        tiles = _keys_seen(first, len_q, len_k, BLOCK_N, CAUSAL)
        first += WHICH * HALF
        dq = gl.zeros([HALF, D], gl.float32, acc_layout)
        if tiles > 0:
            rows = first + gl.arange(0, HALF, rows_layout)
            at = ((batch * H + h) * SQ + q_start) + rows
            # An lse of inf gives queries beyond the segment the weight 0.
            lse = gl.load(lse_ptr + at, mask=rows < len_q, other=float("inf"))
            delta = gl.load(delta_ptr + at, mask=rows < len_q, other=0.0)
            limit = gl.full([HALF], 0, gl.int32, rows_layout) + len_k
            whole = len_k // BLOCK_N
            if CAUSAL:
                limit = gl.minimum(limit, rows + (len_k - len_q + 1))
                whole = gl.maximum(gl.minimum(len_k, first + len_k - len_q + 1), 0) // BLOCK_N
            whole = gl.minimum(gl.maximum(whole, 1), tiles)
            q = q_tiles.index(WHICH)
            dout = dout_tiles.index(WHICH)
            streams = (k_tiles, v_tiles)
            signals = (k_full, k_empty, v_full, v_empty)
            factor = scale * LOG2E
            ds = gl.zeros([HALF, BLOCK_N], q.dtype, gl.DotOperandLayout(0, acc_layout, 2))
            mbarrier.wait(q_full.index(WHICH), 0)
            dq, ds = _queries_step(dq, ds, q, dout, streams, signals, lse, delta, factor, limit, 0, False, True)
            for n in range(1, whole):
                dq, ds = _queries_step(dq, ds, q, dout, streams, signals, lse, delta, factor, limit, n, True, False)
            for n in range(whole, tiles):
                dq, ds = _queries_step(dq, ds, q, dout, streams, signals, lse, delta, factor, limit, n, True, True)
            last = (tiles - 1) % STAGES_K
            product = warpgroup_mma(ds, k_tiles.index(last), dq, is_async=True)
            dq, _ds = warpgroup_mma_wait(0, [product, ds])
        base = dq_ptr + batch.to(gl.int64) * dq_place[1] + q_start.to(gl.int64) * dq_place[0]
        base += (h // GROUP).to(gl.int64) * dq_place[2] + (h % GROUP).to(gl.int64) * dq_place[3]
        store_rows(base, (dq * scale).to(q_tiles.dtype), first, len_q, dq_place[0])


@gluon.jit(do_not_specialize=["H", "SQ"])
def _attention_bwd_dq_gluon_kernel(
    q_desc, k_desc, v_desc, dout_desc, lse_ptr, delta_ptr, dq_ptr, table_ptr, H, SQ,
    q_batch_col, q_group_col, q_head_col, k_batch_col, k_group_col, v_batch_col, v_group_col,
    dq_row_stride, dq_batch_stride, dq_group_stride, dq_head_stride, scale,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, HALF, D], q_desc.layout)
    dout_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, HALF, D], dout_desc.layout)
    # Keys have one stage more than values, since they are needed until the product of the next step.
    k_tiles = gl.allocate_shared_memory(q_desc.dtype, [3, BLOCK_N, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, BLOCK_N, D], v_desc.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [3, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [3, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    for i in gl.static_range(3):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
    fence_async_shared()
    buffers = (q_tiles, dout_tiles, k_tiles, v_tiles)
    barriers = (q_full, k_full, k_empty, v_full, v_empty)
    schedule = (table_ptr, H)
    stats = (lse_ptr, delta_ptr, SQ)
    results = (dq_ptr, (dq_row_stride, dq_batch_stride, dq_group_stride, dq_head_stride))
    descriptors = (q_desc, k_desc, v_desc, dout_desc)
    q_place = (q_batch_col, q_group_col, q_head_col)
    k_place = (k_batch_col, k_group_col)
    v_place = (v_batch_col, v_group_col)
    gl.warp_specialize(
        [
            (_gather_queries, (buffers, barriers, schedule, stats, results, scale, 0, GROUP, D, BLOCK_N, CAUSAL)),
            (_gather_queries, (buffers, barriers, schedule, stats, results, scale, 1, GROUP, D, BLOCK_N, CAUSAL)),
            (
                _load_keys,
                (descriptors, buffers, barriers, schedule, q_place, k_place, v_place, GROUP, D, BLOCK_N, CAUSAL),
            ),
        ],
        [4, 1],
        [240, 24],
    )
