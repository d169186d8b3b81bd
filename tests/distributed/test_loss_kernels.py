"""The losses over a vocabulary divided over processes equal those over the whole, with every gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from llm_kernels.cross_entropy.op import cross_entropy
from llm_kernels.linear_cross_entropy.op import linear_cross_entropy, weighted_linear_cross_entropy
from tests.support.harness import run_ranks

pytestmark = pytest.mark.gloo

TOKENS, HIDDEN, COLUMNS = 10, 16, 320  # columns of one process
# Words of two processes: all, the last columns padding, and a process of padding alone.
WORDS = (640, 600, 300)
CAP = 4.0
OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": CAP}


def problem(words: int, parts: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(hidden, whole vocabulary's weight and bias, labels with ignored ones, token weights), the same everywhere."""
    generator = torch.Generator().manual_seed(words)
    hidden = torch.randn(2, TOKENS // 2, HIDDEN, generator=generator)
    weight = torch.randn(COLUMNS * parts, HIDDEN, generator=generator) * 0.3
    bias = torch.randn(COLUMNS * parts, generator=generator)
    labels = torch.randint(0, words, (2, TOKENS // 2), generator=generator)
    labels[0, 1] = -100
    token_weights = torch.rand(2, TOKENS // 2, generator=generator)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), labels, token_weights


def unfused(hidden, weight, bias, labels, token_weights, **options) -> torch.Tensor:
    return cross_entropy(hidden @ weight.t() + bias, labels, **options)  # type: ignore[return-value]


def fused(hidden, weight, bias, labels, token_weights, **options) -> torch.Tensor:
    return linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_tokens=4, **options)


def weighted(hidden, weight, bias, labels, token_weights, **options) -> torch.Tensor:
    """The sum; its gradients are those of losses times token weights."""
    return weighted_linear_cross_entropy(hidden, weight, labels, token_weights, bias=bias, chunk_tokens=4, **options)[0]


WAYS = {"unfused": unfused, "fused": fused, "weighted": weighted}


def run(rank: int, parts: int, way: str, words: int, backend: str, dtype: torch.dtype) -> dict[str, Any]:
    """Loss and gradients on one of ``parts`` processes, and how many collectives forward and backward had."""
    hidden, weight, bias, labels, token_weights = problem(words, parts, dtype)
    own, own_bias = (x[rank * COLUMNS : (rank + 1) * COLUMNS].clone().requires_grad_() for x in (weight, bias))
    hidden.requires_grad_()
    group = dist.group.WORLD if parts > 1 else None
    num_valid = min(max(words - rank * COLUMNS, 0), COLUMNS)
    calls = []
    names = ("all_gather_into_tensor", "all_reduce")
    originals = {name: getattr(dist, name) for name in names}
    for name, original in originals.items():
        setattr(dist, name, lambda *a, f=original, n=name, **k: (calls.append(n), f(*a, **k))[1])
    options = {"num_valid": num_valid, "group": group, "backend": backend, **OPTIONS}
    out = WAYS[way](hidden, own, own_bias, labels, token_weights, **options)
    (out if way == "weighted" else out * token_weights).sum().backward()
    for name, original in originals.items():
        setattr(dist, name, original)
    assert hidden.grad is not None and own.grad is not None and own_bias.grad is not None
    if way == "unfused" and group is not None:  # the caller's linear layer does this
        dist.all_reduce(hidden.grad, group=group)
    numbers = {"out": out, "hidden": hidden.grad, "weight": own.grad, "bias": own_bias.grad}
    return {name: x.detach().float().numpy() for name, x in numbers.items()} | {"calls": calls}


def expected(way: str, words: int, parts: int) -> dict[str, np.ndarray]:
    """In fp64, on one process, by torch's own operators."""
    hidden, weight, bias, labels, token_weights = problem(words, parts, torch.float32)
    hidden, weight, bias = (x.double().requires_grad_() for x in (hidden, weight, bias))
    logits = CAP * ((hidden @ weight.t() + bias)[..., :words].flatten(0, 1) / CAP).tanh()
    losses = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="none", label_smoothing=0.1)
    losses = losses + 1e-2 * logits.logsumexp(-1).square() * (labels.flatten() != -100)
    total = (losses.view(labels.shape) * token_weights).sum()
    total.backward()
    assert hidden.grad is not None and weight.grad is not None and bias.grad is not None
    out = total if way == "weighted" else losses.view(labels.shape)
    gradients = {"hidden": hidden.grad.numpy(), "weight": weight.grad.numpy(), "bias": bias.grad.numpy()}
    return {"out": out.detach().numpy(), **gradients}


def run_all(rank: int, parts: int, way: str, backend: str) -> list[dict[str, Any]]:
    """``run`` of each of ``WORDS``."""
    return [run(rank, parts, way, words, backend, torch.float32) for words in WORDS]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_equal_one(way: str, backend: str) -> None:
    for words, *found in zip(WORDS, *run_ranks(run_all, 2, way, backend)):
        wanted = expected(way, words, 2)
        assert np.array_equal(found[0]["out"], found[1]["out"]), "every process has the same losses, bit for bit"
        whole = {
            "out": found[0]["out"],
            "hidden": found[1]["hidden"],
            **{name: np.concatenate([x[name] for x in found]) for name in ("weight", "bias")},
        }
        for name, right in wanted.items():
            error = np.abs(whole[name] - right).max() / np.abs(right).max()
            assert error < 2e-6, (words, name, error)
        assert not whole["weight"][words:].any() and not whole["bias"][words:].any(), "padding has no gradient"


@pytest.mark.parametrize(
    ("way", "calls"),
    [
        ("unfused", ["all_gather_into_tensor"]),
        # Three chunks of tokens, then dhidden.
        ("fused", ["all_gather_into_tensor"] * 3 + ["all_reduce"]),
        ("weighted", ["all_gather_into_tensor", "all_reduce"] * 3),
    ],
)
def test_collectives(way: str, calls: list[str]) -> None:
    assert run_ranks(run, 2, way, 600, "triton", torch.bfloat16)[0]["calls"] == calls


def test_no_collective_in_one_process() -> None:
    assert run_ranks(run, 1, "unfused", 300, "triton", torch.float32)[0]["calls"] == []
