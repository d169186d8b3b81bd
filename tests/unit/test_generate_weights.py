"""Weights in few bits: their products against fp64, their codes in two tensor-parallel parts, and the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_parallel.errors import UserError
from llm_parallel.generate.packed import GROUP, PackedMatrix, fits
from llm_parallel.generate.weights import check_packable
from tests.support.harness import run_ranks
from tests.support.in_process import in_process
from tests.support.parity_models import random_folder


def stored(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The matrix that codes of so many bits can hold, in fp64, and half a step of each number's scale."""
    if bits == 8:
        scale = np.abs(values).max(1, keepdims=True) / 127
        return np.round(values / scale) * scale, np.broadcast_to(scale / 2, values.shape)
    grouped = values.reshape(len(values), -1, GROUP)
    low, high = grouped.min(2, keepdims=True), grouped.max(2, keepdims=True)
    scale = (high - low) / 15
    codes = np.round((grouped - low) / scale)
    half = np.broadcast_to(scale / 2, grouped.shape)
    return (codes * scale + low).reshape(values.shape), half.reshape(values.shape)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_packed_product_is_that_of_the_rounded_matrix(bits: Any, tokens: int) -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(48, 96, generator=draw) * torch.rand(48, 1, generator=draw)
    x = torch.randn(tokens, 96, generator=draw).bfloat16()
    packed = PackedMatrix(values, bits)
    found = packed(x).double().numpy()
    rounded, half = stored(values.double().numpy(), bits)
    exact, x64 = values.double().numpy(), x.double().numpy()
    # Each number is off by half a step, a little more since scales are bf16, and the result is rounded to bf16.
    bound = np.abs(x64) @ (1.1 * half + 2.0**-8 * np.abs(exact).max(1, keepdims=True)).T + 2.0**-8 * np.abs(found)
    assert (np.abs(found - x64 @ exact.T) <= bound).all()
    close = x64 @ rounded.T
    assert np.sqrt(((found - close) ** 2).mean()) < (0.02 if bits == 8 else 0.04) * close.std(), (
        "the same as its plain formula but for bf16"
    )
    assert packed.bytes < values.numel() * 4 / (3.5 if bits == 8 else 5.5)


def test_rows_of_zeros_stay_zero_and_shapes_that_do_not_fit_are_known() -> None:
    for bits in (4, 8):
        assert not PackedMatrix(torch.zeros(16, 32), bits)(torch.ones(2, 32).bfloat16()).any()  # type: ignore[arg-type]
    assert fits(torch.empty(17, 32), 8)
    assert not fits(torch.empty(17, 32), 4) and not fits(torch.empty(32, 40), 8)
    with pytest.raises(UserError, match=r"weights in int8 and int4 are for a CPU.*take bf16"):
        check_packable(torch.device("cuda"))


def parts(rank: int, world_size: int, bits: Any) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of this rank's columns of a matrix."""
    values = torch.randn(32, 128, generator=torch.Generator().manual_seed(3))
    packed = PackedMatrix(values.chunk(world_size, 1)[rank].contiguous(), bits, torch.distributed.group.WORLD)
    return packed.codes.numpy(), packed.scales.float().numpy()


@pytest.mark.gloo
def test_ranks_that_divide_the_columns_hold_the_codes_of_the_whole() -> None:
    (codes, scales), divided = run_ranks(parts, 1, 8)[0], run_ranks(parts, 2, 8)
    np.testing.assert_array_equal(np.concatenate([part for part, _ in divided], 1), codes)
    for _, own in divided:
        np.testing.assert_array_equal(own, scales)
    _, offsets = run_ranks(parts, 1, 4)[0]
    np.testing.assert_array_equal(np.concatenate([own for _, own in run_ranks(parts, 2, 4)], 0), offsets)


@pytest.mark.gloo
@pytest.mark.parametrize(("weights", "largest"), [("bf16", 0.03), ("int8", 0.1), ("int4", 0.6)])
def test_a_model_in_few_bits_says_how_far_it_is_from_fp32(tmp_path: Path, weights: str, largest: float) -> None:
    from llm_parallel.generate.load import load_model
    from llm_parallel.generate.weights import text_logits
    from llm_parallel.parallel.groups import close_groups

    folder, tokens = random_folder("llama-2", tmp_path / "model"), [5, 9, 30, 7, 7, 21, 60, 3]
    found = {}
    for kind in ("fp32", weights):
        loaded = load_model(folder, "cpu", weights=kind)
        found[kind] = text_logits(loaded.network, tokens)
        close_groups()
    error = (found[weights] - found["fp32"]).square().mean().sqrt() / found["fp32"].std()
    assert 0 < error < largest
    from tests.support.parity_models import load_hf

    with torch.no_grad():
        exact = load_hf(folder, torch.float64).eval()(torch.tensor([tokens])).logits[0]
    np.testing.assert_allclose(found["fp32"].numpy(), exact.numpy(), atol=2e-5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--weights", "int3"), "weights is 'int3'; it must be one of saved, fp32, bf16, int8, int4"),
        (("--weights", "int4", "--deterministic"), "weights is int4 and deterministic is given"),
    ],
)
def test_weights_that_cannot_be_had_are_refused(tmp_path: Path, options: tuple[str, ...], named: str) -> None:
    folder = random_folder("llama-2", tmp_path / "model")
    done = in_process("generate", folder, "--prompt", "x", "--device", "cpu", *options)
    assert done.returncode == 2 and named in done.stderr, done.stderr
