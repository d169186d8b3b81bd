"""Numbers in 8 bits: the values are bitsandbytes', codes are the nearest, and blocks are those of the whole tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_parallel.parallel.adamw8 import largest_of
from llm_parallel.parallel.boxes import Box
from llm_parallel.parallel.low_bits import BLOCK, Blocks, dynamic_map, nearest_codes, scales_for, values_of


@pytest.mark.parametrize("signed", [True, False])
def test_the_values_are_those_of_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(signed), functional.create_dynamic_map(signed))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest(signed: bool) -> None:
    """Next to every border on both sides, at zeros of both signs and on many scales."""
    values = dynamic_map(signed)
    borders = (values[1:] + values[:-1]) / 2
    scales = 10.0 ** -torch.arange(9)
    x = torch.cat(
        [
            *(borders.nextafter(torch.full_like(borders, to)) for to in (-2.0, 2.0)),
            *(borders, values, torch.tensor([0.0, -0.0, 1e-45, 1.0 + 2**-23])),
            (torch.rand(9, 4000, generator=torch.Generator().manual_seed(0)) * 2 - int(signed))
            .mul(scales[:, None])
            .flatten(),
        ]
    )
    codes = nearest_codes(x, signed)
    assert torch.equal(codes.int(), torch.bucketize(x, borders, out_int32=True))
    distance = (x.double()[:, None] - values.double()).abs()
    chosen = (x.double() - values.double()[codes.int()]).abs()
    assert bool((chosen <= distance.amin(1) + 2e-7 * x.double().abs()).all()), "but for the rounding of a border"


@given(st.integers(0, 10**6), st.sampled_from([1e-30, 1e-8, 1.0, 3e7]))
@settings(max_examples=60, deadline=None)
def test_numbers_made_from_codes_become_the_same_again(seed: int, size: float) -> None:
    """Bit for bit, whichever sign the largest number of a block has."""
    x = size * torch.randn(32, BLOCK, generator=torch.Generator().manual_seed(seed))
    for signed, numbers in ((True, x), (False, x.square())):
        negative = (-numbers).amax(1) if signed else None
        scales = scales_for(numbers.amax(1), negative, fresh=True)[:, None]
        codes = nearest_codes(numbers / scales, signed)
        made = values_of(codes, signed) * scales
        largest = made.abs().amax(1)
        assert torch.allclose(largest, numbers.abs().amax(1), rtol=0.008)
        again = scales_for(made.amax(1), (-made).amax(1) if signed else None, fresh=False)[:, None]
        assert torch.equal(again, scales)
        assert torch.equal(values_of(nearest_codes(made / again, signed), signed) * again, made)


def _box(whole: tuple[int, int], offset: tuple[int, int], shape: tuple[int, int], begin: int = 0) -> Box:
    return Box("w", (3, *offset), (1, *shape), begin, (7, *whole), 1)


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_processes_with_any_parts_of_a_tensor_find_the_scales_of_its_blocks(data: Any) -> None:
    """Columns over two ranks, or two stacked matrices with their rows over two ranks, and of each rank's part three
    ranges: together they see every number once, and their maxima are those of the whole tensor's blocks."""
    columns = data.draw(st.sampled_from([2, 10, 96, 256, 512, 576]))
    rows = 4 * data.draw(st.integers(1, 12))
    whole = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    if data.draw(st.booleans()):
        half = columns // 2
        parts = [([_box((rows, columns), (0, n * half), (rows, half))], whole[:, n * half :][:, :half]) for n in (0, 1)]
    else:
        each = rows // 4
        parts = []
        for n in (0, 1):
            offsets = (n * each, rows // 2 + n * each)
            boxes = [
                _box((rows, columns), (at, 0), (each, columns), place * each * columns)
                for place, at in enumerate(offsets)
            ]
            parts.append((boxes, torch.cat([whole[at : at + each] for at in offsets])))
    expected = torch.nn.functional.pad(whole.flatten(), (0, -whole.numel() % BLOCK)).view(-1, BLOCK)
    maxima, seen = torch.zeros(3, len(expected)), torch.zeros(len(expected), dtype=torch.int64)
    spread, kept = [], []
    for boxes, numbers in parts:
        flat = numbers.flatten()
        cuts = sorted(data.draw(st.lists(st.integers(0, flat.numel()), min_size=2, max_size=2)))
        for start, stop in zip([0, *cuts], [*cuts, flat.numel()]):
            if start == stop:
                continue
            blocks = Blocks(boxes, start, stop, torch.device("cpu"))
            found, shard = torch.zeros(3, len(blocks.numbers)), flat[start:stop].clone()
            assert [s.start for s in blocks.strips] == [0, *[s.stop for s in blocks.strips]][:-1]
            assert blocks.strips[-1].stop == stop - start
            for strip in blocks.strips:
                largest_of(strip, (strip.of(shard), strip.of(shard).abs()), found)
            maxima[:, blocks.numbers] = maxima[:, blocks.numbers].maximum(found)
            seen[blocks.numbers[blocks.complete]] += 1
            kept.append((blocks, shard))
    assert bool((seen <= 1).all())
    for found, of_all in zip(maxima, (expected, -expected, expected.abs())):
        assert torch.equal(found, of_all.amax(1).clamp(min=0))
    for blocks, shard in kept:
        for strip in blocks.strips:
            scaled = strip.of(shard) / strip.spread(maxima[2][blocks.numbers])
            spread.append(scaled.flatten())
    together = (expected / expected.abs().amax(1, keepdim=True)).flatten()[: whole.numel()]
    assert torch.equal(torch.cat(spread).sort().values, together.sort().values)
