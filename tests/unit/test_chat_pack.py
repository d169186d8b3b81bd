"""Which conversations share a sample: every one in every epoch, never too many tokens, the same whenever it is asked
for."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_parallel.data.pack import Packer, best_fit, shuffled
from llm_parallel.errors import UserError
from llm_parallel.tune.sft import TokenCount

SIZE = 24
LENGTHS = st.lists(st.integers(1, SIZE), min_size=1, max_size=60).map(lambda found: np.array(found, np.int64))


def one_by_one(lengths: np.ndarray, size: int) -> list[int]:
    """Tokens of each sample by the textbook's best-fit decreasing: one item at a time, all samples looked at."""
    filled: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [place for place, held in enumerate(filled) if held + length <= size]
        if fitting:
            filled[max(fitting, key=lambda place: filled[place])] += length
        else:
            filled.append(length)
    return sorted(filled)


@settings(max_examples=150, deadline=None)
@given(LENGTHS)
def test_as_full_as_the_textbooks_best_fit_decreasing(lengths: np.ndarray) -> None:
    of_items, per_sample = best_fit(np.bincount(lengths, minlength=SIZE + 1), SIZE)
    filled = np.bincount(of_items, weights=np.sort(lengths)[::-1], minlength=len(per_sample))
    assert sorted(filled.astype(int).tolist()) == one_by_one(lengths, SIZE)
    assert np.bincount(of_items).tolist() == per_sample.tolist()


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(0, 2**32), st.booleans())
def test_an_epoch_has_each_conversation_once_and_no_sample_overflows(
    lengths: np.ndarray, seed: int, together: bool
) -> None:
    packer = Packer(lengths, SIZE, seed, together=together)
    rows = packer.samples_of(0)
    for epoch in range(3):
        found = [packer.sample(epoch * rows + place) for place in range(rows)]
        assert sorted(np.concatenate(found).tolist()) == list(range(len(lengths)))
        assert all(lengths[row].sum() <= SIZE for row in found)
        assert together or all(len(row) == 1 for row in found)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(0, 2**32), st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0]), min_size=2, max_size=2))
def test_a_sample_depends_on_seed_and_number_alone(lengths: np.ndarray, seed: int, weights: list[float]) -> None:
    sources = np.arange(len(lengths)) % 2
    whole = Packer(lengths, SIZE, seed, sources=sources, weights=weights)
    numbers = list(range(3 * max(whole.samples_of(0), 1)))
    straight = [whole.sample(number).tolist() for number in numbers]
    again = Packer(lengths, SIZE, seed, sources=sources, weights=weights)
    backwards = [again.sample(number).tolist() for number in reversed(numbers)]
    assert backwards[::-1] == straight


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(0, 2**32), st.sampled_from([0.25, 0.4, 1.0, 1.75, 3.0]))
def test_a_weight_is_how_often_a_conversation_is_seen(lengths: np.ndarray, seed: int, weight: float) -> None:
    sources = np.arange(len(lengths)) % 3 // 2
    packer = Packer(lengths, SIZE, seed, sources=sources, weights=[1.0, weight])
    epochs = 5
    seen = np.zeros(len(lengths), int)
    for number in range(packer.samples_before(epochs)):
        row = packer.sample(number)
        assert lengths[row].sum() <= SIZE
        np.add.at(seen, row, 1)
        if (number + 1) in (packer.samples_before(n + 1) for n in range(epochs)):
            done = next(n + 1 for n in range(epochs) if packer.samples_before(n + 1) >= number + 1)
            other = seen[sources == 1]
            assert (seen[sources == 0] == done).all()
            assert ((other >= np.floor(done * weight)) & (other <= np.ceil(done * weight))).all()


@pytest.mark.parametrize("weights", [(1e-9, 1e-5), (1.0, 1e9), (1e300, 1e300)])
def test_weights_that_make_no_epoch_are_refused(weights: tuple[float, float]) -> None:
    """The first would look for a conversation in many thousands of empty epochs, the others need more memory than there
    is."""
    lengths, sources = np.full(8, 3), np.arange(8) % 2
    with pytest.raises(UserError, match=r"chat\.train\.N\.weight, .* lets an epoch see .* of the 8 that there are"):
        Packer(lengths, 64, 5, sources=sources, weights=weights)


def test_epochs_differ_in_what_shares_a_sample_and_in_order() -> None:
    lengths = np.random.default_rng(0).integers(1, SIZE, 200)
    packer = Packer(lengths, SIZE, 1)
    rows = packer.samples_of(0)
    first, second = ([packer.sample(epoch * rows + n).tolist() for n in range(rows)] for epoch in (0, 1))
    assert first != second
    assert {tuple(sorted(row)) for row in first} != {tuple(sorted(row)) for row in second}
    assert Packer(lengths, SIZE, 2).sample(0).tolist() != first[0]


def test_held_out_samples_come_in_the_same_order_again() -> None:
    lengths = np.array([5, 9, 24, 3, 3])
    packer = Packer(lengths, SIZE, 0, shuffled=False)
    rows = packer.samples_of(0)
    assert [packer.sample(n).tolist() for n in range(rows)] == [packer.sample(rows + n).tolist() for n in range(rows)]
    apart = Packer(lengths, SIZE, 0, shuffled=False, together=False)
    assert sorted(apart.sample(n).item() for n in range(5)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("together", [True, False])
def test_the_first_held_out_samples_stand_for_all(together: bool) -> None:
    """Of 400 conversations that grow from file to file, an evaluation may judge a few: not the longest, nor those of
    the first source."""
    lengths, sources = np.repeat(np.arange(1, 21), 20), np.repeat(np.arange(4), 100)
    packer = Packer(lengths, 21, 0, sources=sources, weights=[1.0] * 4, shuffled=False, together=together)
    items = np.concatenate([packer.sample(n) for n in range(packer.samples_of(0) // 4)])
    assert set(sources[items].tolist()) == {0, 1, 2, 3}
    assert abs(lengths[items].mean() / lengths.mean() - 1) < 0.25


def test_part_of_an_epoch_is_counted_up() -> None:
    packer = Packer(np.full(10, SIZE), SIZE, 0)
    assert [packer.samples_before(epochs) for epochs in (0.25, 1, 2.5)] == [3, 10, 25]


@pytest.mark.parametrize("size", [0, 1, 2, 257])
def test_a_shuffle_has_each_number_once(size: int) -> None:
    assert sorted(shuffled(size, 7).tolist()) == list(range(size))


def test_a_million_conversations_are_planned_in_seconds_of_processor_time() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.0, 1_000_000), 8, 4096).astype(np.int64)
    start = time.process_time()
    packer = Packer(lengths, 4096, 0)
    rows = packer.samples_of(0)
    packer.sample(0)
    spent = time.process_time() - start
    filled = lengths.sum() / (rows * 4096)
    assert filled > 0.999 and spent < 5.0, (filled, spent)


@pytest.mark.parametrize("weights", [(1.0, 2.0), (0.5, 1.7)])
def test_tokens_are_counted_from_any_sample_on(weights: tuple[float, float]) -> None:
    """As a resumed run counts them, and one that logs every other step."""
    lengths = np.arange(3, 43)
    packer = Packer(lengths, 64, 5, sources=np.arange(40) % 2, weights=weights)
    sums = np.concatenate([[0], np.cumsum([lengths[packer.sample(n)].sum() for n in range(3 * packer.samples_of(0))])])
    for step in (1, 3, 17):
        count = TokenCount(packer, lengths)
        for samples in range(step, len(sums), step):
            assert count.before(samples) == sums[samples]
    assert TokenCount(packer, lengths).before(len(sums) - 1) == sums[-1]
    assert count.before(4) == sums[4], "after a step back too"
