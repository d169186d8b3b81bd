"""Shuffles and mixtures: the extension against its twin, and what each must guarantee."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_parallel import _C
from llm_parallel.data import order, ref
from llm_parallel.data.order import BLOCK, MixtureOrder, integer_weights

KEYS = st.integers(0, 2**64 - 1)


@given(KEYS)
def test_mix64_equals_its_twin(x: int) -> None:
    assert _C.mix64(x) == int(ref.mix64(np.full(1, x, np.uint64))[0])


def test_mix64_is_splitmix64() -> None:
    # First outputs of the generator seeded with 0 and with 0x9E3779B97F4A7C15 (the second), as its authors publish.
    assert [_C.mix64(0), _C.mix64(0x9E3779B97F4A7C15)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), KEYS)
def test_permutation_is_a_bijection_and_equals_its_twin(size: int, key: int) -> None:
    ours = [_C.permute(position, size, key) for position in range(size)]
    assert sorted(ours) == list(range(size))
    assert ours == ref.permutation(size, key).tolist()


@pytest.mark.parametrize("size", [2**31 + 11, 2**40 + 1, 2**61])
def test_permutation_of_large_sizes_stays_inside_and_does_not_repeat(size: int) -> None:
    found = [_C.permute(position, size, 7) for position in range(20000)]
    assert len(set(found)) == len(found) and min(found) >= 0 and max(found) < size
    assert abs(np.mean(found) / size - 0.5) < 0.01


def test_position_outside_a_permutation_is_refused() -> None:
    with pytest.raises(IndexError):
        _C.permute(10, 10, 1)


def chi_squared(counts: np.ndarray) -> float:
    """Per degree of freedom, against equal counts; about 1 if they are random."""
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum() / (counts.size - 1))


def test_all_orders_of_few_are_equally_likely() -> None:
    seen = Counter(tuple(_C.permute(i, 4, key) for i in range(4)) for key in range(12000))
    assert len(seen) == 24
    assert chi_squared(np.array(list(seen.values()))) < 2.2


@pytest.mark.parametrize("size", [1000, 4097, 100_003])
def test_neighbours_do_not_stay_together(size: int) -> None:
    for key in range(4):
        order = ref.permutation(size, key)
        steps = np.diff(order) % size * 16 // size
        assert chi_squared(np.bincount(steps, minlength=16)) < 3
        drift = np.corrcoef(np.arange(size), order)[0, 1] * size**0.5
        assert abs(drift) < 4.5


WEIGHTS = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(WEIGHTS, st.integers(1, 1500))
def test_every_prefix_of_a_mixture_keeps_to_the_weights_within_one_sample(weights: list[float], count: int) -> None:
    mixture = MixtureOrder(weights)
    exact = [Fraction(weight) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    taken = [0] * len(weights)
    for number in range(count):
        source, place = mixture.locate(number)
        assert place == taken[source], "samples of a source come in order, none left out"
        taken[source] += 1
        for held, share in zip(taken, shares):
            assert abs(held - (number + 1) * share) < 1 + 1e-6


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 2**38), min_size=1, max_size=6), st.integers(0, 400), st.integers(1, 300))
def test_mixture_equals_its_twin(weights: list[int], start: int, count: int) -> None:
    sources, numbers, taken = ref.continue_mixture(weights, 0, [0] * len(weights), start)
    ours, theirs = (module.continue_mixture(weights, start, taken, count) for module in (_C, ref))
    for one, other in zip(ours, theirs):
        np.testing.assert_array_equal(one, other)
    whole = _C.continue_mixture(weights, 0, [0] * len(weights), start + count)
    np.testing.assert_array_equal(whole[0], np.concatenate([sources, ours[0]]))
    np.testing.assert_array_equal(whole[1], np.concatenate([numbers, ours[1]]))


@pytest.mark.parametrize(
    "weights", [[0.7, 0.2, 0.1], [1, 3], [0.123457, 0.3333333, 1e-9], [5.0]], ids=["decimal", "ratio", "long", "one"]
)
def test_any_sample_is_found_without_those_before_it(weights: list[float]) -> None:
    walked = MixtureOrder(weights)
    numbers = [0, 1, 9, 10, 11, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5, 2 * BLOCK, 7 * BLOCK, 3]
    expected = {number: walked.locate(number) for number in range(7 * BLOCK + 1)}
    jumping = MixtureOrder(weights)
    for number in numbers:
        assert jumping.locate(number) == MixtureOrder(weights).locate(number) == expected[number]
        counts = Counter(expected[earlier][0] for earlier in range(number))
        assert jumping.counts(number) == [counts[source] for source in range(len(weights))]


def test_mixture_far_out_costs_no_walk_when_weights_are_short() -> None:
    mixture = MixtureOrder([0.7, 0.2, 0.1])
    assert mixture.period == 10
    source, place = mixture.locate(10**15 + 4)
    near_source, near_place = mixture.locate(4)
    assert (source, place - near_place) == (near_source, 10**14 * mixture.weights[near_source])


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([0.7, 0.2, 0.1], [7, 2, 1]), ([2, 4], [1, 2]), ([1e-3, 1], [1, 1000]), ([0.3], [1]), ([1e6, 1e-6], [10**12, 1])],
)
def test_weights_become_the_smallest_integers(weights: list[float], expected: list[int]) -> None:
    assert integer_weights(weights) == expected


def test_extreme_weights_are_rounded_but_never_to_nothing() -> None:
    weights = [1.0, 1e-30, 0.123456789012345]
    whole = integer_weights(weights)
    assert min(whole) == 1 and sum(whole) < 1.01 * order.MAX_TOTAL
    for weight, integer in zip(weights, whole):
        assert abs(integer / sum(whole) - weight / sum(weights)) < 2**-39
