"""Attention over segments: whole samples, packed documents, or the part of them that a context-parallel rank has.

Online softmax after Dao (2023, arXiv 2307.08691). Saved for backward are q, k, v, the output and one fp32 number per
query and head. All kernels sum in a fixed order, so the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from llm_kernels import dispatch
from llm_kernels.attention import ref
from llm_kernels.attention.ref import Options
from llm_kernels.device import arch
from llm_kernels.rows import fresh


@dataclass(frozen=True)
class Segments:
    """Which queries see which keys: a table int32 [n, 5] of (batch row, q_start, q_end, k_start, k_end).

    The query ranges of a batch row must not overlap, nor must its key ranges. max_q, max_k: the largest number of
    queries, and of keys, of a segment, or an upper bound. covers_queries, covers_keys: every query (key) of every row
    is in a segment; where that is not so, outputs and gradients are filled with zeros first. rows: the table's rows, if
    the host knows them, so that plain torch need not read them from the device.
    """

    table: Tensor
    max_q: int
    max_k: int
    covers_keys: bool
    covers_queries: bool
    rows: tuple[tuple[int, ...], ...] | None = None

    @staticmethod
    def dense(b: int, sq: int, sk: int, device: torch.device | str) -> Segments:
        """One segment per batch row, with all its queries and keys. The same shape gives the same object."""
        return _dense(b, sq, sk, torch.device(device))

    @staticmethod
    def from_cu_seqlens(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Segments:
        """Documents one after another in a batch of one row. cu_q, cu_k: int [n + 1] offsets into queries and keys, of
        which the last must be the numbers of queries and keys. They may be on the device: the host does not read them.
        """
        if cu_q.ndim != 1 or cu_q.shape != cu_k.shape:
            raise ValueError(f"cu_q has shape {tuple(cu_q.shape)}, cu_k {tuple(cu_k.shape)}: both must be [n + 1]")
        cu_q, cu_k = cu_q.to(torch.int32), cu_k.to(torch.int32)
        columns = [torch.zeros_like(cu_q[1:]), cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]]
        return Segments(torch.stack(columns, 1), max_q, max_k, True, True)

    @staticmethod
    def from_rows(
        rows: Sequence[tuple[int, int, int, int, int]], b: int, sq: int, sk: int, device: torch.device | str
    ) -> Segments:
        """Any segments of [sq, b] queries and [sk, b] keys. Raises ValueError if ranges overlap or exceed sq or sk."""
        covered = []
        for first, length, what in ((1, sq, "query"), (3, sk, "key")):
            total = 0
            for row in range(b):
                ranges = sorted((x[first], x[first + 1]) for x in rows if x[0] == row and x[first] < x[first + 1])
                for (_, end), (start, _) in zip([(0, 0), *ranges], [*ranges, (length, length)]):
                    if start < end or end > length:
                        raise ValueError(f"{what} ranges {ranges} of row {row} overlap or exceed 0..{length}")
                total += sum(end - start for start, end in ranges)
            covered.append(total == b * length)
        if any(not 0 <= x[0] < b or x[1] > x[2] or x[3] > x[4] for x in rows):
            raise ValueError(f"a segment is not (row below {b}, q_start <= q_end, k_start <= k_end)")
        known = tuple(tuple(x) for x in rows)
        max_q = max([0, *(x[2] - x[1] for x in known)])
        max_k = max([0, *(x[4] - x[3] for x in known)])
        return Segments(_table(known, torch.device(device)), max_q, max_k, covered[1], covered[0], known)


@lru_cache(maxsize=64)
def _dense(b: int, sq: int, sk: int, device: torch.device) -> Segments:
    rows = tuple((row, 0, sq, 0, sk) for row in range(b))
    return Segments(_table(rows, device), sq, sk, True, True, rows)


def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """The rows as a tensor on the device. The host does not wait for the copy: packed documents need one per micro
    batch, and a wait would let the GPU's queue of launches run empty."""
    table = torch.tensor(rows, dtype=torch.int32).view(-1, 5)
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segments: Segments | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k') v of grouped heads, each segment by itself.

    q: [sq, b, h, d]; k, v: [sk, b, g, d], h a multiple of g, any strides with d contiguous; d up to 256. A segment's
    queries are aligned with its keys at the end: under ``causal`` the last query sees up to the last key. window: how
    many keys to the left and to the right of its aligned key a query sees, -1 for all. scale: 1 / sqrt(d) by default.
    softcap: scores become softcap tanh(score / softcap). Dropout is a function of ``seed`` and position alone, see
    ref.dropout_keep; if ``seed`` is None it is drawn from torch's CPU generator, where torch.compile breaks its graph.
    Returns out [sq, b, h, d], contiguous, and with ``return_lse`` also the log-sum-exp of the scores, fp32 [b, h, sq],
    which is differentiable too. For a query that sees no key these are 0 and -inf. backend: as in dispatch, or
    ``gluon``, which raises for what gluon_forward does not support. A second derivative raises. The ``torch`` back end
    holds all scores in memory for options that torch's own attention lacks, and where torch.compile traces segments
    whose bounds are on the device.
    """
    _check(q, k, v)
    options = _options(q.shape[-1], causal, scale, window, softcap, (dropout_p, seed))
    if segments is None:
        segments = Segments.dense(q.shape[1], q.shape[0], k.shape[0], q.device)
    chosen = backend_for(q, backend)
    if chosen == "torch":
        out, lse = _by_torch(q, k, v, segments, options, return_lse)
    else:
        rows = (_rows(q), _rows(k), _rows(v))
        out, lse = _attention(*rows, *_plan(segments), *options, chosen == "gluon")
    return (out, lse) if return_lse else out


def attention_qkv(
    qkv: Tensor,
    segments: Segments | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """``attention`` on megatron's packed projection, without copying its parts.

    qkv: [s, b, g, m + 2, d]: for every group its m query heads, then its key and its value. Returns [s, b, g m, d].
    Backward writes one gradient in qkv's layout, so that nothing is split or concatenated.
    """
    if qkv.ndim != 5 or qkv.shape[3] < 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}, not [s, b, groups, query heads of a group + 2, d]")
    options = _options(qkv.shape[-1], causal, scale, window, softcap, (dropout_p, seed))
    if segments is None:
        segments = Segments.dense(qkv.shape[1], qkv.shape[0], qkv.shape[0], qkv.device)
    chosen = backend_for(qkv, backend)
    if chosen == "torch":
        q, k, v = _unpack(qkv)
        return _by_torch(q.flatten(2, 3), k, v, segments, options, False)[0]
    return _attention_qkv(_rows(qkv), *_plan(segments), *options, chosen == "gluon")[0]


def backend_for(x: Tensor, requested: str = "auto") -> str:
    """The back end that attention on ``x`` uses: ``torch``, ``triton``, or ``gluon`` if that is requested.

    ``auto`` means torch for head dims above 256. Raises ValueError if ``requested`` is unknown or not available.
    """
    if requested != "gluon":
        chosen = dispatch.backend_for(x, requested)
        if chosen == "triton" and x.shape[-1] > 256:
            if requested == "triton":
                raise ValueError(f"backend = 'triton' takes head dims up to 256, this is {x.shape[-1]}")
            return "torch"
        return chosen
    if not dispatch.triton_installed():
        raise ValueError(f"backend = 'gluon', but {dispatch.triton_fault()}")
    return "gluon"


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the outputs [s, b, h, d] and log-sum-exps [b, h, s]
    over each.

    Differentiable in all four inputs. A query that sees no key of either set has 0 and -inf.
    """
    highest = torch.maximum(lse_a, lse_b).detach()
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    weight_a, weight_b = (lse_a - highest).exp(), (lse_b - highest).exp()
    total = weight_a + weight_b
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    share_a, share_b = ((w / total).permute(2, 0, 1).unsqueeze(-1) for w in (weight_a, weight_b))
    out = out_a * share_a + out_b * share_b
    return out.to(out_a.dtype), (highest + total.log()).masked_fill(nothing, -torch.inf)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    matches = q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[1] == k.shape[1] and q.shape[3] == k.shape[3]
    if not matches or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v have shapes {shapes}, not [sq, b, h, d], [sk, b, g, d] twice with h % g = 0")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: they must have one dtype")


def _options(
    d: int,
    causal: bool,
    scale: float | None,
    window: tuple[int, int],
    softcap: float,
    dropout: tuple[float, int | None],
) -> Options:
    scale = d**-0.5 if scale is None else float(scale)
    dropout_p, seed = dropout
    if scale <= 0 or softcap < 0 or not 0 <= dropout_p < 1:
        raise ValueError(
            f"scale = {scale} must be > 0, softcap = {softcap} must be >= 0, dropout_p = {dropout_p} must be in [0, 1)"
        )
    if seed is None:
        seed = int(torch.randint(2**62, ()).item()) if dropout_p > 0 else 0
    return Options(scale, max(window[0], -1), 0 if causal else max(window[1], -1), softcap, dropout_p, seed)


def _plan(segments: Segments) -> tuple[Tensor, int, int, bool, bool]:
    return segments.table, segments.max_q, segments.max_k, segments.covers_keys, segments.covers_queries


def _rows(x: Tensor) -> Tensor:
    """``x`` if its last dim is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _unpack(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    m = qkv.shape[3] - 2
    return qkv.narrow(3, 0, m), qkv.select(3, m), qkv.select(3, m + 1)


def _by_torch(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, options: Options, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Torch's own attention where it supports options and segments, else ref.explicit, with all scores in memory."""
    known = segments.rows
    if known is None and torch.compiler.is_compiling():
        return ref.explicit(q, k, v, segments.table, options)
    known = segments.table.tolist() if known is None else known
    rows = sorted(x for x in known if x[1] < x[2])
    plain = options._replace(scale=1.0, seed=0) == Options(1.0, right=0) and segments.covers_queries and not need_lse
    if not rows or not plain or any(x[2] - x[1] > x[4] - x[3] for x in rows):
        return ref.explicit(q, k, v, segments.table, options)
    parts = tuple(tuple(ref.Segment(*x[1:]) for x in rows if x[0] == row) for row in range(q.shape[1]))
    if len(set(parts)) == 1:
        parts = parts[:1]
    return ref.attention(q, k, v, parts, options.scale).contiguous(), None


def _forward(q, k, v, *how):
    return _run_forward((_by_group(q, k.shape[2]), k, v), *how)


def _qkv_forward(qkv, *how):
    return _run_forward(_unpack(qkv), *how)


def _run_forward(tensors, table, max_q, max_k, covers_keys, covers_queries, *how):
    *options, gluon = how
    if gluon:
        from llm_kernels.attention.gluon_forward import forward
    else:
        from llm_kernels.attention.kernel import forward
    q, k, v = tensors
    return forward(q, k, v, table, max_q, covers_queries, Options(*options), arch(q))


def _by_group(q: Tensor, groups: int) -> Tensor:
    """[s, b, h, d] as [s, b, g, m, d]."""
    s, b, h, d = q.shape
    return q.view(s, b, groups, h // groups, d)


def _fill(x: Tensor, covered: bool) -> Tensor:
    return fresh(x) if covered else x.new_zeros(x.shape)


def _backward(dout, dlse, q, k, v, out, lse, table, max_q, max_k, covers_keys, covers_queries, *how):
    from llm_kernels.attention import kernel_delta

    dout = dout.contiguous()
    stats = kernel_delta.per_row(out, dout, lse, None if dlse is None else dlse.contiguous())
    dq, dk, dv = _fill(q, covers_queries), _fill(k, covers_keys), _fill(v, covers_keys)
    groups = k.shape[2]
    tensors = (_by_group(q, groups), k, v, dout, *stats)
    gradients = (_by_group(dq, groups), dk, dv)
    _run_backward(tensors, gradients, table, (max_q, max_k), *how)
    return dq, dk, dv


def _qkv_backward(dout, qkv, out, lse, table, max_q, max_k, covers_keys, covers_queries, *how):
    from llm_kernels.attention import kernel_delta

    dout = dout.contiguous()
    stats = kernel_delta.per_row(out, dout, lse, None)
    dqkv = _fill(qkv, covers_keys and covers_queries)
    tensors = (*_unpack(qkv), dout, *stats)
    _run_backward(tensors, _unpack(dqkv), table, (max_q, max_k), *how)
    return dqkv


def _run_backward(tensors, gradients, table, extents, *how):
    *options, gluon = how
    q = tensors[0]
    if gluon and q.shape[-1] <= 128:
        from llm_kernels.attention.gluon_backward import backward
    else:
        from llm_kernels.attention.kernel_backward import backward
    backward(tensors, gradients, table, extents, Options(*options), arch(q))


def _fake_forward(q, *_):
    sq, b, h, _d = q.shape
    return q.new_empty(q.shape), q.new_empty((b, h, sq), dtype=torch.float32)


_PLAN = "Tensor table, int max_q, int max_k, bool covers_keys, bool covers_queries"
_OPTIONS = "float scale, int left, int right, float softcap, float dropout_p, int seed"
dispatch.define(
    f"attention(Tensor q, Tensor k, Tensor v, {_PLAN}, {_OPTIONS}, bool gluon) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
_attention_backward = dispatch.define(
    f"attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_PLAN}, "
    f"{_OPTIONS}, bool gluon) -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda dout, dlse, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
)
dispatch.define(
    f"attention_qkv(Tensor qkv, {_PLAN}, {_OPTIONS}, bool gluon) -> (Tensor, Tensor)",
    _qkv_forward,
    lambda qkv, *_: _fake_forward(_unpack(qkv)[0].flatten(2, 3)),
)
_attention_qkv_backward = dispatch.define(
    f"attention_qkv_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, {_PLAN}, {_OPTIONS}, bool gluon) "
    "-> Tensor",
    _qkv_backward,
    lambda dout, qkv, *_: qkv.new_empty(qkv.shape),
)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.plan = inputs[4:]
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout, dlse):
    q, k, v, table, out, lse = ctx.saved_tensors
    nothing = (None,) * (1 + len(ctx.plan))
    if dout is None and dlse is None:
        return None, None, None, *nothing
    dout = torch.zeros_like(out) if dout is None else dout
    found = _attention_backward(dout, dlse, q, k, v, out, lse, table, *ctx.plan)
    return *found, *nothing


def _qkv_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2], *output)
    ctx.plan = inputs[2:]
    ctx.mark_non_differentiable(output[1])


def _qkv_gradients(ctx, dout, _):
    qkv, table, out, lse = ctx.saved_tensors
    return _attention_qkv_backward(dout, qkv, out, lse, table, *ctx.plan), *((None,) * (1 + len(ctx.plan)))


_attention = dispatch.differentiable("attention", _setup, _gradients)
_attention_qkv = dispatch.differentiable("attention_qkv", _qkv_setup, _qkv_gradients)
