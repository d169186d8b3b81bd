"""Helpers of the operator tests: random inputs, errors against fp64, and the table of errors at the end of a run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Relative to the largest reference value; about two roundings of the dtype. Only for assert_matches.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
# An operator's error may be at most this many times the error of torch's own operator in the same dtype.
FACTOR = 2.0


@dataclass
class Summary:
    """Errors of all cases, relative to the largest value, by operator and dtype: pairs of our error and torch's."""

    rows: dict[tuple[str, str], list[tuple[float, float]]] = field(default_factory=dict)

    def add(self, case: str, dtype: torch.dtype, error: float, framework: float) -> None:
        """Records one case, named "<operator>/<what>"."""
        key = (case.split("/", 1)[0], str(dtype).removeprefix("torch."))
        self.rows.setdefault(key, []).append((error, framework))

    def lines(self) -> list[str]:
        """The recorded cases as the lines of a table."""
        out = [f"{'operator':24s} {'dtype':10s} {'cases':>6s} {'worst error':>12s} {'framework':>12s}"]
        for (name, dtype), errors in sorted(self.rows.items()):
            worst = max(errors)
            peer = max(framework for _, framework in errors)
            out.append(f"{name:24s} {dtype:10s} {len(errors):6d} {worst[0]:12.2e} {peer:12.2e}")
        return out


SUMMARY = Summary()


def random(*shape: int, dtype: torch.dtype, seed: int = 0, device: str | torch.device | None = None) -> Tensor:
    """A leaf tensor of standard normal numbers that requires a gradient; the same numbers on every device."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(device=device or default_device(), dtype=dtype).requires_grad_()


def far_apart(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, folder: Path) -> Tensor:
    """Standard normal numbers in a tensor whose rows lie gigabytes apart. It lives in a sparse file in ``folder``, so
    only the pages that are touched take memory. Its offsets do not fit in 32 bits, and interpreter.py makes Triton's
    interpreter raise where an integer overflows."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
    path = folder / f"{elements}-{len(list(folder.iterdir()))}"
    storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=elements * dtype.itemsize)
    out = torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape), tuple(strides))
    return out.copy_(random(*shape, dtype=dtype).detach())


def cases_of(cases: Mapping[str, Sequence[Any]], quick: Collection[str]) -> list[Any]:
    """pytest parameters, one set for every name, which is their id; those not in ``quick`` are marked slow."""
    import pytest  # here, since benchmarks import this module on machines without pytest

    assert set(quick) <= cases.keys(), set(quick) - cases.keys()
    return [
        pytest.param(*values, id=name, marks=() if name in quick else pytest.mark.slow)
        for name, values in cases.items()
    ]


def grid(
    names: Collection[str], *, bf16: Collection[str] | None = None, fp16: Collection[str] | None = None
) -> list[Any]:
    """pytest parameters (name, dtype) for every name in every dtype, those that repeat a proof marked slow.

    Quick are all names in fp32, those of ``bf16`` (default: all) and those of ``fp16``; without ``fp16`` there are no
    parameters in fp16. A kernel computes in fp16 as in bf16, in fp32, and differs only in the conversion where it loads
    and stores, so one quick case in fp16 per operator is enough.
    """
    import pytest  # as above

    quick = {torch.float32: names, torch.bfloat16: names if bf16 is None else bf16, torch.float16: fp16}
    return [
        pytest.param(name, dtype, id=f"{name}-{dtype}", marks=() if name in chosen else pytest.mark.slow)
        for dtype, chosen in quick.items()
        if chosen is not None
        for name in names
    ]


def default_device() -> torch.device:
    """The GPU where there is one; the CPU and Triton's interpreter elsewhere."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _run(op: Callable, inputs: Sequence[Tensor], weights: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the gradients of their sum with ``weights`` (fixed random numbers if None)."""
    out = op(*inputs)
    outputs = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if x is not None]
    if weights is None:
        generator = torch.Generator().manual_seed(99)
        weights = [torch.randn(x.shape, generator=generator).to(x.device) for x in outputs]
    wanted = [x for x in inputs if x.requires_grad]
    if not wanted:  # an operator without a derivative
        return [x.detach() for x in outputs], []
    pairs = [(x, w.to(x.dtype)) for x, w in zip(outputs, weights) if x.requires_grad]
    gradients = torch.autograd.grad([x for x, _ in pairs], wanted, [w for _, w in pairs], allow_unused=True)
    zeros = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, gradients)]
    return [x.detach() for x in outputs], zeros


def compare(
    case: str, op: Callable, framework: Callable, truth: Callable, inputs: Sequence[Tensor], floor: float = 1.0
) -> None:
    """Asserts that the errors of ``op``, in outputs and all gradients, are at most twice those of ``framework``.

    ``op`` and ``framework`` take ``inputs``, ``truth`` takes fp64 copies of them; each returns a tensor or a tuple of
    tensors. The error is the difference from ``truth``, once its largest value and once its root mean square. Always
    allowed are ``floor`` roundings (of the inputs' dtype) of the largest value. ``op`` must not change its inputs.
    ``case`` is "<operator>/<what>".
    """
    dtype = inputs[0].dtype
    copies = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    before = [x.detach().clone() for x in inputs]
    exact = [
        (x.detach().double() if x.is_floating_point() else x.detach()).requires_grad_(x.requires_grad) for x in inputs
    ]
    generator = torch.Generator().manual_seed(99)
    with torch.no_grad():
        probe = truth(*exact)
    shapes = [x for x in (probe if isinstance(probe, (tuple, list)) else [probe]) if x is not None]
    weights = [torch.randn(x.shape, generator=generator).to(x.device, dtype) for x in shapes]
    found, peers, wanted = (_run(f, x, weights) for f, x in ((op, inputs), (framework, copies), (truth, exact)))
    for index, (x, old) in enumerate(zip(inputs, before)):
        same = torch.allclose(x.detach(), old, rtol=0, atol=0, equal_nan=True)
        assert same, f"{case}: input {index} was changed"
    worst = (0.0, 0.0)
    # Where the terms of a gradient cancel, a few fp32 roundings of the size of those terms remain.
    largest = max((x[x.isfinite()].abs().amax().item() for x in chain(*wanted) if x.isfinite().any()), default=0.0)
    noise = 4 * torch.finfo(torch.float32).eps * largest
    labels = [f"output {i}" for i in range(len(found[0]))] + [f"gradient {i}" for i in range(len(found[1]))]
    for label, ours, theirs, right in zip(labels, *(a + b for a, b in (found, peers, wanted)), strict=True):
        assert ours.shape == right.shape, f"{case}, {label}: shape {tuple(ours.shape)}, not {tuple(right.shape)}"
        limits = floor * torch.finfo(dtype).eps, noise
        worst = max(worst, _hold(f"{case}, {label}", ours, theirs, right, limits))
    SUMMARY.add(case, dtype, *worst)


def _hold(label: str, ours: Tensor, theirs: Tensor, right: Tensor, limits: tuple[float, float]) -> tuple[float, float]:
    """Asserts the rule of ``compare`` for one tensor; returns our largest error and the framework's, relative to the
    largest value.

    limits: the error that is always allowed, relative to the largest value, and as an absolute number.
    """
    if not right.numel():
        return 0.0, 0.0
    floor, noise = limits
    scale = right.abs().max().item() or 1.0
    assert not ours.isnan().any(), f"{label}: {int(ours.isnan().sum())} of {ours.numel()} numbers are NaN"
    difference, peer = (x.double() - right for x in (ours, theirs))
    largest, of_peer = difference.abs().max().item(), peer.abs().max().item()
    limit = FACTOR * of_peer + floor * scale + noise
    assert largest <= limit, f"{label}: largest error {largest:.3e}, framework {of_peer:.3e}, limit {limit:.3e}"
    mean, of_peer_mean = difference.square().mean().sqrt().item(), peer.square().mean().sqrt().item()
    limit = FACTOR * of_peer_mean + floor * right.square().mean().sqrt().item() + noise
    assert mean <= limit, f"{label}: rms error {mean:.3e}, framework {of_peer_mean:.3e}, limit {limit:.3e}"
    return largest / scale, of_peer / scale


# Magnitudes from the smallest to the largest that fp32 and bf16 hold; fp16 is cut to its own range.
MAGNITUDES = (1e-45, 1e-40, 1e-38, 1e-30, 1e-19, 1e-10, 1e-4, 1.0, 1e2, 1e4, 1e10, 1e18, 1e25, 1e37, 3e38)


def extreme_values(dtype: torch.dtype) -> dict[str, Callable[..., Tensor]]:
    """Name → function of a shape (and ``seed=``) that makes finite but extreme numbers: normal numbers of every
    magnitude, small differences on a large offset, rows of equal numbers, zeros, one huge number among small ones."""
    largest = torch.finfo(dtype).max

    def scaled(factor: float, offset: float = 0.0) -> Callable[..., Tensor]:
        def make(*shape: int, seed: int = 0) -> Tensor:
            wide = random(*shape, dtype=torch.float64, seed=seed).detach() * factor + offset
            return wide.clamp(-largest, largest).to(dtype).requires_grad_()

        return make

    def equal(value: float) -> Callable[..., Tensor]:
        return lambda *shape, seed=0: torch.full(shape, value, dtype=dtype, device=default_device()).requires_grad_()

    def one_huge(*shape: int, seed: int = 0) -> Tensor:
        values = scaled(1.0)(*shape, seed=seed).detach()
        values[..., seed % shape[-1]] = largest / 8
        return values.requires_grad_()

    kinds = {f"magnitude {size:g}": scaled(size) for size in MAGNITUDES if size < largest}
    kinds |= {f"offset {offset:g}": scaled(1.0, offset) for offset in (30.0, -30.0, 90.0, -90.0, 1e3, -1e3, 1e4)}
    kinds |= {f"all {value:g}": equal(value) for value in (0.0, 1.0, -1e4, largest / 2)}
    return kinds | {"one huge": one_huge}


def sweep_extremes(
    operator: str,
    dtype: torch.dtype,
    functions: tuple[Callable, Callable, Callable],
    make: Callable[[Callable[..., Tensor]], list[Tensor]],
    gradients: Sequence[float] = (1.0, 1e-30, 1e30),
) -> float:
    """Runs an operator forward and backward on ``extreme_values`` and asserts the rule of ``compare``: its error is at
    most twice the framework's plus one rounding, and it is finite wherever both fp64 (in that dtype) and the framework
    are.

    functions: the operator, the framework's operator and the truth in fp64, all of the same inputs. make(values): makes
    the inputs from one of ``extreme_values``. gradients: magnitudes of the upstream gradient. Prints and returns the
    worst ratio of the operator's error to the framework's, where the latter counts as one rounding of the largest value
    at least.
    """
    worst, where = 0.0, "nothing"
    for kind, values in extreme_values(dtype).items():
        for size in gradients:
            inputs = make(values)
            exact = [
                x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs
            ]
            copies = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
            with torch.no_grad():
                out = functions[2](*exact)
            shapes = [x.shape for x in (out if isinstance(out, (tuple, list)) else [out])]
            finfo = torch.finfo(dtype)
            weights = [
                (random(*shape, dtype=torch.float64, seed=90 + i).detach() * size).clamp(finfo.min, finfo.max).to(dtype)
                for i, shape in enumerate(shapes)
            ]
            results = [_run(f, x, weights) for f, x in zip(functions, (inputs, copies, exact))]
            for index, (ours, theirs, right) in enumerate(zip(*(a + b for a, b in results), strict=True)):
                label = f"{operator}, {kind}, upstream {size:g}, result {index}"
                ratio = _extreme_ratio(label, ours, theirs, right)
                worst, where = max((worst, where), (ratio, label))
    print(f"{operator:24s} {str(dtype).removeprefix('torch.'):10s} worst ratio to torch's error {worst:.2f} ({where})")
    return worst


def _extreme_ratio(label: str, ours: Tensor, theirs: Tensor, right: Tensor) -> float:
    """Asserts the rule of ``sweep_extremes`` for one result; returns our error divided by the framework's."""
    finfo = torch.finfo(ours.dtype)
    counts = theirs.isfinite() & right.to(ours.dtype).isfinite()
    bad = counts & ~ours.isfinite()
    assert not bad.any(), f"{label}: {int(bad.sum())} numbers are not finite where fp64 and torch are: {ours[bad][:3]}"
    if not counts.any():
        return 0.0
    error, peer = ((x.double() - right)[counts].abs().max().item() for x in (ours, theirs))
    scale = right[counts].abs().max().item()
    rounding = max(finfo.eps * scale, finfo.smallest_normal * finfo.eps)
    assert error <= FACTOR * peer + rounding, (
        f"{label}: error {error:.3e}, torch's {peer:.3e}, one rounding of the largest value {rounding:.3e}"
    )
    return error / max(peer, rounding)


def assert_matches(op: Callable[..., Tensor], truth: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Asserts that the output of ``op`` and the gradient of every input match ``truth`` in fp64 within TOLERANCE, and
    that the inputs are unchanged. For ref.py, which consists of the framework's operators and so has no peer."""
    before = [x.detach().clone() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = op(*inputs), truth(*exact)
    assert out.shape == expected.shape
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(99)).to(out.device)
    (out.float() * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    pairs = [(out, expected), *((x.grad, y.grad) for x, y in zip(inputs, exact))]
    for found, wanted in pairs:
        assert found is not None and wanted is not None
        scale = max(wanted.abs().max().item(), 1.0) if wanted.numel() else 1.0
        error = (found.double() - wanted).abs().max().item() / scale if wanted.numel() else 0.0
        assert error <= TOLERANCE[inputs[0].dtype], error
    assert all(torch.equal(x, old) for x, old in zip(inputs, before))
