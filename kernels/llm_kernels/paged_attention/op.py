"""Attention of one packed forward over a paged cache of keys and values: decoding requests and chunks of prompts.

The keys of a request are divided over programs where they are many (flash decoding), into parts whose size depends on
neither the other requests nor the GPU, so that a request's result does not depend on what else is in the pass. There is
no derivative: it is for generation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm_kernels import dispatch
from llm_kernels.device import arch
from llm_kernels.paged_attention import ref
from llm_kernels.paged_attention.plan import Launch, Plan
from llm_kernels.paged_attention.tiles import Heads

MOST_DIM = 256


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float | None = None,
    left: int = -1,
    softcap: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale q k') v of grouped heads, each request over its own keys.

    q: [t, h, d], the queries of all requests one after another; k, v: [slots, g, d], the cache, of which page ``p`` has
    the slots from ``p * page_tokens`` on; h a multiple of g, any strides with d contiguous. The keys and values of the
    queries themselves must be in the cache already. A query sees the keys of its request up to its own, ``left`` of
    them before its own (-1: all). scale: 1 / sqrt(d) by default. softcap: scores become softcap tanh(score / softcap).
    plan: made by ``Plan.make`` with ``heads_of(q, k)``. Returns [t, h, d], contiguous. Raises ValueError for inputs
    that require a gradient.
    """
    _check(q, k, v, plan)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if scale <= 0 or softcap < 0:
        raise ValueError(f"scale = {scale} must be > 0 and softcap = {softcap} must be >= 0")
    options = scale, max(left, -1), float(softcap)
    if backend_for(q, backend) == "torch":
        return ref.paged_attention(q, k, v, plan, *options)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    small, large = plan.small, plan.large
    return _paged_attention(
        q, k, v, plan.parts, plan.pages, *_tensors(small), *_tensors(large), plan.page_tokens, plan.covers,
        small.slots, small.rows, large.slots, large.rows, *options,
    )  # fmt: skip


def heads_of(q: Tensor, k: Tensor) -> Heads:
    """What a plan must know of the queries [t, h, d] and of the cache [slots, g, d]."""
    return Heads(q.shape[1] // k.shape[1], q.shape[2], k.element_size(), arch(q))


def backend_for(x: Tensor, requested: str = "auto") -> str:
    """The back end for queries ``x`` [t, h, d]: ``torch`` or ``triton``. ``auto`` means torch for head dims above 256.

    Raises ValueError if ``requested`` is unknown or not available."""
    chosen = dispatch.backend_for(x, requested)
    if chosen == "triton" and x.shape[-1] > MOST_DIM:
        if requested == "triton":
            raise ValueError(f"backend = 'triton' takes head dims up to {MOST_DIM}, this is {x.shape[-1]}")
        return "torch"
    return chosen


def _tensors(launch: Launch) -> tuple[Tensor, Tensor]:
    return launch.work, launch.merges


def _check(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> None:
    matches = q.ndim == k.ndim == 3 and k.shape == v.shape and q.shape[2] == k.shape[2]
    if not matches or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v have shapes {shapes}, not [t, h, d], [slots, g, d] twice with h % g = 0")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: they must have one dtype")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("paged_attention has no derivative; call it under torch.no_grad(), or use attention")
    if plan.parts.device != q.device:
        raise ValueError(f"the plan is on {plan.parts.device} and q on {q.device}")


def _forward(q: Tensor, k: Tensor, v: Tensor, parts: Tensor, pages: Tensor, *rest: Any) -> Tensor:
    work, merges, large_work, large_merges, page_tokens, covers, slots, rows, large_slots, large_rows, *options = rest
    groups = k.shape[1]
    grouped = q.unflatten(1, (groups, -1))
    launches = (work, merges, slots, rows), (large_work, large_merges, large_slots, large_rows)
    forward = dispatch.launchers("paged_attention").forward
    return forward(grouped, k, v, parts, pages, launches, page_tokens, covers, tuple(options), arch(q))


_paged_attention = dispatch.define(
    "paged_attention(Tensor q, Tensor k, Tensor v, Tensor parts, Tensor pages, Tensor work, Tensor merges, "
    "Tensor large_work, Tensor large_merges, int page_tokens, bool covers, int slots, int rows, int large_slots, "
    "int large_rows, float scale, int left, float softcap) -> Tensor",
    _forward,
    lambda q, *_: q.new_empty(q.shape),
)
