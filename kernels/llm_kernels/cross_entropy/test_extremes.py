"""Losses of logits that are finite but extreme, have a common offset or are masked, against a closed form in fp64.

No loss and no gradient may have more than twice the error of torch in the same dtype, nor NaN or infinity where torch
has none. The closed form works on differences from the maximum, since torch's logsumexp loses precision at an offset of
1e30 even in fp64.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_kernels.cross_entropy.op import cross_entropy
from llm_kernels.cross_entropy.ref import Terms
from llm_kernels.linear_cross_entropy.op import linear_cross_entropy, weighted_linear_cross_entropy
from llm_kernels.testing import FACTOR, default_device, grid

pytest.importorskip("triton", reason="the kernels need triton")

# Rows of every kind; the error is the worst of them, since a single number, torch's or ours, may be right by chance.
SEEDS = 2
# An odd width: rows are unaligned, and each is one whole tile of 2,048 columns and a part of one.
COLUMNS = 2349
OPTIONS = {
    "plain": {},
    "smoothing, z-loss": {"label_smoothing": 0.1, "z_loss": 1e-3},
    "all": {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 30.0},
}


def extreme_rows(columns: int, dtype: torch.dtype, masked: bool) -> tuple[list[str], Tensor, Tensor]:
    """Names, logits [names x SEEDS, columns] that are finite in ``dtype`` (or, ``masked``, -inf), and labels."""
    noise = torch.randn(SEEDS, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label = 3
    rows = {f"times 1e{k}": noise * 10.0**k for k in (-45, -38, -20, 0, 1, 2, 4, 37)}
    for offset in (1e2, 1e3, 1e4, 3e38):
        rows |= {f"offset {offset:g}": noise + offset, f"offset {-offset:g}": noise - offset}
    rows |= {f"all {x:g}": noise * 0 + x for x in (0.0, 1e4, 3e38, torch.finfo(dtype).min)}
    for name, number in {"1e2": 1e2, "1e4": 1e4, "3e38": 3e38}.items():
        rows[f"label {name}"] = noise.clone()
        rows[f"label {name}"][:, label] = number
        rows[f"other {name}"] = noise.clone()
        rows[f"other {name}"][:, label + 1] = number
        rows[f"all but the label {name} lower"] = noise - number
        rows[f"all but the label {name} lower"][:, label] = 0.0
    if masked:
        rows["every other masked"] = noise.clone()
        rows["every other masked"][:, ::2] = -torch.inf
        rows["all but the label masked"] = torch.full_like(noise, -torch.inf)
        rows["all but the label masked"][:, label] = 1.0
        rows["a tile masked, offset"] = noise + 1e4
        rows["a tile masked, offset"][:, 8:2100] = -torch.inf
        rows["the label masked"] = noise.clone()
        rows["the label masked"][:, label] = -torch.inf
    cast = {name: row.to(dtype) for name, row in rows.items()}
    kept = {name: row for name, row in cast.items() if not ((row == torch.inf) | row.isnan()).any()}
    if not masked:
        kept = {name: row for name, row in kept.items() if row.isfinite().all()}
    logits = torch.cat(list(kept.values())).to(default_device())
    return list(kept), logits, torch.full((len(logits),), label, device=logits.device)


def truth(logits: Tensor, labels: Tensor, upstream: Tensor, **options: float) -> tuple[Tensor, Tensor]:
    """Losses and the gradient of the logits in fp64."""
    smoothing, z_loss, cap = (options.get(name, 0.0) for name in ("label_smoothing", "z_loss", "softcap"))
    raw = logits.double()
    x = cap * (raw / cap).tanh() if cap else raw
    top = x.amax(-1, keepdim=True)
    exponentials = (x - top).exp()
    total = exponentials.sum(-1, keepdim=True)
    lse = top + total.log()
    gap = top - x.gather(1, labels[:, None])
    losses = total.log() + (1 - smoothing) * gap + z_loss * lse.square()
    if smoothing:
        losses = losses + smoothing * (top - x).mean(-1, keepdim=True)
    target = torch.zeros_like(x).scatter_(1, labels[:, None], 1 - smoothing) + smoothing / x.shape[1]
    gradient = upstream[:, None].double() * ((1 + 2 * z_loss * lse) * exponentials / total - target)
    return losses[:, 0], gradient / (raw / cap).cosh().square() if cap else gradient


def peer(logits: Tensor, labels: Tensor, **options: float) -> Tensor:
    """torch's operators in the logits' dtype."""
    cap, z_loss = options.get("softcap", 0.0), options.get("z_loss", 0.0)
    x = cap * (logits / cap).tanh() if cap else logits
    losses = F.cross_entropy(x, labels, reduction="none", label_smoothing=options.get("label_smoothing", 0.0))
    return losses + z_loss * x.logsumexp(-1).square() if z_loss else losses


def hold(case: str, dtype: torch.dtype, names: list[str], pairs: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Asserts the rule row by row; a pair is (ours, torch's, truth). Always allowed is one rounding: in fp32 of a loss
    of at least 1, and in the dtype of a gradient's largest number. Prints the worst ratio of errors."""
    worst = (0.0, "", 0.0, 0.0)
    for what, (ours, theirs, right) in zip(("loss", "gradient"), pairs):
        roundings = torch.finfo(torch.float32 if what == "loss" else dtype).eps
        for name, found, torchs, exact in zip(
            names, *(x.double().reshape(len(names), -1) for x in (ours, theirs, right))
        ):
            label = f"{case}, {dtype}, {what} of '{name}'"
            sure = exact.isfinite() & (exact.abs() < torch.finfo(torch.float32).max) & torchs.isfinite()
            assert found[sure].isfinite().all(), f"{label}: {found[sure & ~found.isfinite()]}, torch has {torchs[sure]}"
            assert torch.equal(found[exact.isinf()], exact[exact.isinf()]), label
            if not sure.any():
                continue
            scale = max(exact[sure].abs().max().item(), 1.0 if what == "loss" else 1e-30)
            error, of_torch = ((x - exact)[sure].abs().max().item() / scale for x in (found, torchs))
            limit = FACTOR * max(of_torch, roundings)
            assert error <= limit, f"{label}: error {error:.2e}, torch's {of_torch:.2e}, limit {limit:.2e}"
            worst = max(worst, (error / max(of_torch, roundings), name, error, of_torch))
    print(f"{case}, {str(dtype)[6:]}: worst ratio to torch's error {worst[0]:.2f} ({worst[2]:.1e}, '{worst[1]}')")


Loss = Callable[[Tensor], Tensor]


def run(loss: Loss, logits: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x = logits.clone().requires_grad_()
    losses = loss(x)
    return losses.detach(), torch.autograd.grad(losses, x, upstream.to(losses.dtype))[0]


def upstream_of(labels: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, len(labels), device=labels.device).bfloat16().float()


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize(("case", "dtype"), grid(OPTIONS, fp16=["all"]))
def test_cross_entropy(case: str, dtype: torch.dtype) -> None:
    hold_backend("triton", OPTIONS[case], dtype)


@pytest.mark.parametrize(("case", "dtype"), grid(OPTIONS, bf16=["all"], fp16=[]))
def test_cross_entropy_by_torch(case: str, dtype: torch.dtype) -> None:
    hold_backend("torch", OPTIONS[case], dtype)


def hold_backend(backend: str, options: dict[str, float], dtype: torch.dtype) -> None:
    names, logits, labels = extreme_rows(COLUMNS, dtype, masked=True)
    upstream = upstream_of(labels)
    ours = run(lambda x: cross_entropy(x, labels, **options, backend=backend), logits, upstream)  # type: ignore
    theirs = run(lambda x: peer(x, labels, **options), logits, upstream)
    triples = list(zip(ours, theirs, truth(logits, labels, upstream, **options)))
    hold(f"cross_entropy ({backend})", dtype, names, triples)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_divided_vocabulary(dtype: torch.dtype) -> None:
    """Computes in one process what four ranks would. All columns of one of them are masked in a row, and all columns of
    the last are padding."""
    from llm_kernels.cross_entropy import kernel

    options = OPTIONS["all"]
    names, logits, labels = extreme_rows(COLUMNS, dtype, masked=True)
    upstream, parts = upstream_of(labels), ((0, 800), (800, 1600), (1600, COLUMNS), (COLUMNS, COLUMNS))
    terms = [Terms(first, end - first, **options) for first, end in parts]  # type: ignore[arg-type]
    slices = [torch.cat([logits[:, a:b], logits[:, :8] * 0 + 7], 1) for a, b in parts]  # with padding
    stats: list = [kernel.forward(x, labels, t, whole=False) for x, t in zip(slices, terms)]
    losses, _, saved = kernel.join(torch.cat(stats), labels, terms[0])
    for x, t in zip(slices, terms):
        kernel.backward(upstream, None, x, labels, saved, t, x)
        assert not x[:, t.num_valid :].any()
    gradient = torch.cat([x[:, : t.num_valid] for x, t in zip(slices, terms)], 1)
    theirs = run(lambda x: peer(x, labels, **options), logits, upstream)
    triples = list(zip((losses, gradient), theirs, truth(logits, labels, upstream, **options)))
    hold("cross_entropy (parallel)", dtype, names, triples)


LINEAR = {
    f"{kind}, {options}": (kind == "weighted", OPTIONS[options])
    for kind in ("recomputing", "weighted")
    for options in ("plain", "all")
}


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize(("case", "dtype"), grid(LINEAR, bf16=["recomputing, all", "weighted, all"], fp16=[]))
def test_linear_cross_entropy(case: str, dtype: torch.dtype) -> None:
    """The hidden states are the unit matrix, so the logits are the transposed weight, and so are their gradients."""
    weighted, options = LINEAR[case]
    names, logits, labels = extreme_rows(300, dtype, masked=False)
    upstream, unit = upstream_of(labels), torch.eye(len(labels), dtype=dtype, device=labels.device)
    chunks = {"chunk_tokens": 16, "backend": "triton"}

    def ours(x: Tensor) -> Tensor:
        return linear_cross_entropy(unit, x.t(), labels, **options, **chunks)  # type: ignore[arg-type]

    theirs = run(lambda x: peer(x, labels, **options), logits, upstream)
    if weighted:
        weight = logits.t().clone().requires_grad_()
        found = weighted_linear_cross_entropy(unit, weight, labels, upstream, **options, **chunks)  # type: ignore
        results = found[1], torch.autograd.grad(found[0], weight)[0].t()
    else:
        results = run(ours, logits, upstream)
    triples = list(zip(results, theirs, truth(logits, labels, upstream, **options)))
    hold(f"{'weighted_' * weighted}linear_cross_entropy", dtype, names, triples)
