"""Attention on numbers that are finite but extreme, forward and backward, beside torch's own in the same dtype.

The rule is that of ``compare``: at most twice torch's error. Two more terms are allowed, because backward computes the
weights again from the log-sum-exp; both are proportional to the terms that a gradient is the sum of. They are a few
fp32 roundings, where torch, which saves all weights, has an exact zero; and the rounding of the log-sum-exp itself.
Where scores are so large that weights would be wrong, the result must be NaN. ``pytest -s`` prints the worst ratio to
torch's error by dtype. fp32 and bf16 have the same range of magnitudes; fp16, which has fewer, is slow.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton")

from llm_kernels.attention import ref
from llm_kernels.attention.op import Segments, _options, attention
from llm_kernels.attention.test_attention import framework
from llm_kernels.testing import FACTOR, _run, extreme_values, random

S, D = 20, 16
SCALE = D**-0.5
LOST = 2.0**24 * math.log(2)
EPS = torch.finfo(torch.float32).eps
# Causal, and a segment whose first five queries see nothing.
ROWS = [(0, 0, S, 0, S), (1, 0, S, 0, S - 5)]


def terms(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, table: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Largest score of each query [b, h, q], and the sum of the absolute terms of dq, dk and dv, in fp64."""
    visible = ref.visibility(table, 2, S, S, _options(D, True, None, (-1, -1), 0.0, (0.0, None))).unsqueeze(1)
    scores = (torch.einsum("qbhd,kbgd->bhqk", q, k) * SCALE).masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    part = torch.einsum("qbhd,kbgd->bhqk", dout.abs(), v.abs())
    parts = weights * (part + (weights * part).sum(-1, keepdim=True)) * SCALE
    largest = scores.amax(-1).masked_fill(~visible.any(-1), 0.0)
    sizes = [
        torch.einsum("bhqk,kbgd->qbhd", parts, k.abs()),
        torch.einsum("bhqk,qbhd->kbd", parts, q.abs()).unsqueeze(2),
        torch.einsum("bhqk,qbhd->kbd", weights, dout.abs()).unsqueeze(2),
    ]
    return largest, sizes


def one_kind(label: str, functions: tuple[Callable, ...], inputs: list[Tensor], size: float, table: Tensor) -> float:
    """Asserts the rule for one kind of numbers; returns the largest ratio of an error to torch's."""
    dtype = inputs[0].dtype
    finfo = torch.finfo(dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    copies = [x.detach().clone().requires_grad_() for x in inputs]
    weight = (random(S, 2, 2, D, dtype=torch.float64, seed=90).detach() * size).clamp(finfo.min, finfo.max).to(dtype)
    results = [_run(f, x, [weight]) for f, x in zip(functions, (inputs, copies, exact))]
    largest, sizes = terms(*(x.detach() for x in exact), weight.double(), table)
    # Products beyond the range of fp32 are infinite in every implementation, also those of keys that are not seen.
    held = torch.einsum("qbhd,kbgd->bhqk", *(x.detach().abs() for x in exact[:2])).amax(-1) < 3e38
    lost = (largest.abs() > LOST * 1.001) & held
    lost = lost.permute(2, 0, 1).unsqueeze(-1).expand_as(weight)
    assert results[0][0][0][lost].isnan().all(), f"{label}: weights of scores of {largest.abs().max():.1e} are not NaN"
    if (largest.abs() > LOST * 0.999).any():
        return 0.0
    bound = EPS * (4 + largest.abs().max().item() / math.log(2))
    noise = [torch.zeros_like(weight, dtype=torch.float64), *(bound * x for x in sizes)]
    worst = 0.0
    for index, (ours, theirs, right) in enumerate(zip(*(a + b for a, b in results), strict=True)):
        counts = theirs.isfinite() & right.to(dtype).isfinite()
        assert ours[counts].isfinite().all(), f"{label}, result {index}: not finite where fp64 and torch are"
        if not counts.any():
            continue
        error, peer, most = ((x.double())[counts].abs().max().item() for x in (ours - right, theirs - right, right))
        rounding = max(finfo.eps * most, finfo.smallest_normal * finfo.eps, noise[index][counts].max().item())
        assert error <= FACTOR * peer + rounding, (
            f"{label}, result {index}: error {error:.3e}, torch's {peer:.3e}, allowed besides {rounding:.3e}"
        )
        worst = max(worst, error / max(peer, rounding))
    return worst


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_extremes(dtype: torch.dtype) -> None:
    segments = Segments.from_rows(ROWS, 2, S, S, torch.get_default_device())
    options = _options(D, True, None, (-1, -1), 0.0, (0.0, None))
    functions = (
        lambda *x: attention(*x, segments=segments, backend="triton"),
        framework(segments.table, options),
        lambda *x: ref.explicit(*x, segments.table, options)[0],
    )
    worst = (0.0, "nothing")
    for kind, values in extreme_values(dtype).items():
        for size in (1.0, 1e-30, 1e30) if kind == "magnitude 1" else (1.0,):
            inputs = [values(S, 2, heads, D, seed=seed) for seed, heads in enumerate((2, 1, 1))]
            label = f"{kind}, upstream {size:g}"
            worst = max(worst, (one_kind(label, functions, inputs, size, segments.table), label))
    print(f"attention {dtype}: worst ratio to torch's error {worst[0]:.2f} ({worst[1]})")
