"""Samples against a reference that concatenates the documents of each epoch and cuts them."""

from __future__ import annotations

import hashlib
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_parallel import _C
from llm_parallel.config.tree import DataConfig, Source
from llm_parallel.data import ref
from llm_parallel.data.epochs import MASK64, Epochs, Selection, derive_key
from llm_parallel.data.indexed import TokenFile
from llm_parallel.data.mix import mixture_table
from llm_parallel.data.samples import SampleSource
from llm_parallel.data.stream import Stream
from llm_parallel.errors import UserError
from tests.support.data_helpers import numbered_documents, write_token_file

RNG = np.random.default_rng(3)
LENGTHS = [0, *RNG.integers(0, 40, 150).tolist(), 0, 260, 1]
TOKENS = sum(LENGTHS)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of TOKENS tokens that are all different."""
    return write_token_file(tmp_path_factory.mktemp("data") / "numbered", numbered_documents(LENGTHS))


def config(*prefixes: str, **fields: object) -> DataConfig:
    sources = tuple(Source(path=path, weight=weight) for path, weight in zip(prefixes, (0.7, 0.2, 0.1)))
    return DataConfig(train=sources, **{"eval_fraction": 0.0, "seq_length_tokens": 32, **fields})


@pytest.mark.parametrize("part", ["all", "train", "eval"])
@pytest.mark.parametrize("shuffled", [True, False])
def test_epoch_equals_its_twin(prefix: str, part: str, shuffled: bool) -> None:
    lengths = TokenFile(prefix).length_bytes
    for threads in (1, 3):
        ours = _C.Epoch(lengths, 5, shuffled, part, 9, 1 << 62, threads)
        twin = ref.Epoch(lengths, 5, shuffled, part, 9, 1 << 62)
        assert ours.tokens == twin.tokens > 0
        for start in range(0, ours.tokens, 13):
            for length in (0, 1, 33, ours.tokens - start):
                if start + length <= ours.tokens:
                    for one, other in zip(ours.pieces(start, length), twin.pieces(start, length)):
                        np.testing.assert_array_equal(one, other)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=200),
    st.integers(0, MASK64),
    st.integers(0, MASK64),
    st.integers(1, 4),
    st.data(),
)
def test_epoch_equals_its_twin_on_any_lengths(
    lengths: list[int], key: int, threshold: int, threads: int, data: st.DataObject
) -> None:
    raw = np.array(lengths, np.int32).view(np.uint8)
    ours = _C.Epoch(raw, key, True, "train", 3, threshold, threads)
    twin = ref.Epoch(raw, key, True, "train", 3, threshold)
    assert ours.tokens == twin.tokens
    start = data.draw(st.integers(0, ours.tokens))
    length = data.draw(st.integers(0, ours.tokens - start))
    for one, other in zip(ours.pieces(start, length), twin.pieces(start, length)):
        np.testing.assert_array_equal(one, other)


def test_stretch_outside_an_epoch_is_refused(prefix: str) -> None:
    epoch = _C.Epoch(TokenFile(prefix).length_bytes, 5, True, "all", 0, 0, 1)
    for start, length in ((-1, 3), (0, TOKENS + 1), (TOKENS, 1)):
        with pytest.raises(IndexError):
            epoch.pieces(start, length)


def test_lengths_that_are_not_bytes_are_refused_and_not_copied() -> None:
    with pytest.raises(TypeError):
        _C.Epoch(np.zeros(5, np.int64), 5, True, "all", 0, 0, 1)


@pytest.mark.parametrize("length", [1, 7, 32, 300, TOKENS - 1])
def test_stream_is_the_concatenated_epochs_cut_and_shuffled(prefix: str, length: int) -> None:
    documents, key, epochs = numbered_documents(LENGTHS), 11, 4
    stream = Stream(Epochs(TokenFile(prefix), key, Selection()), length)
    text: list[int] = []
    for epoch in range(epochs + 1):
        for document in ref.permutation(len(documents), derive_key(key, epoch, 0)):
            text += documents[document].tolist()
    windows = [text[start : start + length + 1] for start in range(0, len(text) - length, length)]
    first = 0
    for epoch in range(epochs):
        here = [k for k in range(len(windows)) if k * length // TOKENS == epoch]
        shuffle = ref.permutation(len(here), derive_key(key, epoch, 1))
        for place in range(0, len(here), max(1, len(here) // 100)):
            window = stream.read(first + place)
            expected = windows[here[shuffle[place]]]
            assert window.tokens.dtype == window.labels.dtype == np.int64
            assert (window.tokens.tolist(), window.labels.tolist()) == (expected[:-1], expected[1:])
            starts = {int(document[0]) for document in documents if len(document)}
            boundaries = [at for at in range(1, length + 1) if expected[at] in starts]
            assert window.starts.tolist() == [at for at in boundaries if at < length]
            assert window.crossings.tolist() == [at - 1 for at in boundaries] and not len(window.excluded)
        first += len(here)


def test_order_of_visits_does_not_matter(prefix: str) -> None:
    source = SampleSource(config(prefix), 1, "train")
    numbers = np.random.default_rng(0).permutation(600).tolist()
    seen = {number: source.sample(number).tokens for number in numbers}
    for number in range(600):
        fresh = seen[number] if number % 50 else SampleSource(config(prefix), 1, "train").sample(number).tokens
        np.testing.assert_array_equal(seen[number], fresh)
        np.testing.assert_array_equal(seen[number], source.sample(number).tokens)


def test_every_token_of_an_epoch_comes_exactly_once(tmp_path: Path) -> None:
    lengths = [*LENGTHS[:100], 0]
    lengths[-1] = -sum(lengths) % 32 + 32
    path = write_token_file(tmp_path / "x", numbered_documents(lengths))
    source = SampleSource(config(path), 4, "train")
    per_epoch = sum(lengths) // 32
    orders = []
    for epoch in range(3):
        samples = [source.sample(number) for number in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        inputs = np.concatenate([sample.tokens for sample in samples])
        assert sorted(inputs.tolist()) == list(range(sum(lengths)))
        for sample in samples:
            np.testing.assert_array_equal(sample.tokens[1:], sample.labels[:-1])
        orders.append(inputs.tolist())
    assert orders[0] != orders[1] != orders[2]


def test_epochs_of_a_length_that_does_not_divide_are_complete_too(prefix: str) -> None:
    source = SampleSource(config(prefix), 4, "train")
    for epochs in (1, 2, 5):
        samples = -(-epochs * TOKENS // 32)
        inputs = np.concatenate([source.sample(number).tokens for number in range(samples)])
        counts = np.bincount(inputs, minlength=TOKENS)
        assert counts.min() == epochs and counts.sum() - epochs * TOKENS < 32


def test_neighbouring_samples_come_from_different_places(prefix: str) -> None:
    source = SampleSource(config(prefix, seq_length_tokens=8), 4, "train")
    followed = sum(
        source.sample(number).labels[-1] == source.sample(number + 1).tokens[0] for number in range(TOKENS // 8 - 1)
    )
    assert followed <= 4


@pytest.mark.parametrize("split", ["train", "eval"])
def test_isolation_marks_exactly_the_boundaries(prefix: str, split: str) -> None:
    owner = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    isolated = SampleSource(config(prefix, packing="isolate", eval_fraction=0.3), 2, split)
    joined = SampleSource(config(prefix, eval_fraction=0.3), 2, split)
    boundaries = 0
    for number in range(200):
        sample, plain = isolated.sample(number), joined.sample(number)
        np.testing.assert_array_equal(sample.tokens, plain.tokens)
        np.testing.assert_array_equal(sample.labels, plain.labels)
        same = owner[sample.tokens] == owner[sample.labels]
        # One document after itself, where an epoch ends and the next begins with it, is a boundary too.
        same &= sample.labels == sample.tokens + 1
        np.testing.assert_array_equal(sample.weights, same)
        assert sample.document_starts.dtype == np.int32
        assert sample.document_starts.tolist() == [0, *(np.flatnonzero(~same[:-1]) + 1)]
        assert plain.weights.all() and plain.document_starts.tolist() == [0]
        boundaries += len(sample.document_starts) - 1
    assert boundaries > 100


def test_held_out_documents_are_never_trained_on(prefix: str, tmp_path: Path) -> None:
    other = write_token_file(tmp_path / "other", numbered_documents(LENGTHS, first=TOKENS))
    data = config(prefix, other, prefix, eval_fraction=0.2)
    train, held_out = (SampleSource(data, 5, split) for split in ("train", "eval"))
    owner = np.repeat(np.arange(2 * len(LENGTHS)), LENGTHS * 2)
    seen = [
        set(owner[np.concatenate([source.sample(n).tokens for n in range(1200)])].tolist())
        for source in (train, held_out)
    ]
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == set(np.flatnonzero(LENGTHS * 2).tolist())
    assert 0.1 < len(seen[1]) / len(seen[0] | seen[1]) < 0.3
    assert seen[1] != {
        int(owner[token]) for n in range(1200) for token in SampleSource(data, 6, "eval").sample(n).tokens[:1]
    }, "another seed holds others out"


def test_held_out_samples_come_in_file_order_and_start_over(prefix: str) -> None:
    data = config("unused", eval=(Source(path=prefix),))
    with pytest.raises(UserError, match="unused"):
        SampleSource(data, 5, "train")
    source = SampleSource(data, 5, "eval")
    stream = np.concatenate([source.sample(number).tokens for number in range(200)])
    np.testing.assert_array_equal(stream, np.resize(np.arange(TOKENS), 200 * 32))


def test_mixture_of_sources_and_its_table(prefix: str, tmp_path: Path) -> None:
    others = [
        write_token_file(tmp_path / str(i), numbered_documents(LENGTHS[: 90 * i], first=i * 10**6)) for i in (1, 2)
    ]
    data = config(prefix, *others, eval_fraction=0.1)
    source = SampleSource(data, 1, "train")
    origin = [int(source.sample(number).tokens[0] // 10**6) for number in range(1000)]
    assert np.bincount(origin).tolist() == [700, 200, 100]
    rows = mixture_table(data, 1, 1000)
    assert [(row.path, row.tokens_used) for row in rows] == [
        (prefix, 22400),
        (others[0], 6400),
        (others[1], 3200),
    ]
    assert [row.weight for row in rows] == [0.7, 0.2, 0.1]
    for row in rows:
        assert row.epochs == row.tokens_used / row.tokens_available
        assert 0.75 * TokenFile(row.path).num_tokens < row.tokens_available < TokenFile(row.path).num_tokens


def test_same_file_twice_is_shuffled_differently(prefix: str) -> None:
    source = SampleSource(
        DataConfig(train=(Source(path=prefix),) * 2, eval_fraction=0, seq_length_tokens=32), 1, "train"
    )
    samples = [source.sample(number).tokens.tolist() for number in range(60)]
    assert samples[0::2] != samples[1::2]


def test_order_never_changes_between_versions(prefix: str) -> None:
    """A run that goes on after an update must see the samples it would have seen. This hash is not to be changed."""
    source = SampleSource(config(prefix, prefix, eval_fraction=0.1), 1234, "train")
    content = b"".join(source.sample(number).tokens.astype("<i8").tobytes() for number in range(0, 5000, 7))
    assert hashlib.sha256(content).hexdigest()[:16] == "a44cc43869022bac"


def test_seeds_give_different_orders(prefix: str) -> None:
    orders = [[SampleSource(config(prefix), seed, "train").sample(n).tokens[0] for n in range(20)] for seed in range(4)]
    assert all(one != other for one, other in pairwise(orders))


@pytest.mark.parametrize(
    ("fields", "split", "message"),
    [
        ({"seq_length_tokens": TOKENS}, "train", rf"{TOKENS} tokens to use.*lower data.seq_length_tokens to at most"),
        ({"seq_length_tokens": 1000, "eval_fraction": 0.05}, "eval", "data.eval_fraction=0.05 holds .* tokens of"),
        ({"eval_fraction": 1e-9}, "eval", "data.eval_fraction=1e-09 holds 0 tokens"),
        ({"eval_fraction": 0.0}, "eval", "data.eval is empty and data.eval_fraction is 0"),
        ({"train": ()}, "train", "data.train is empty"),
    ],
)
def test_too_little_text_is_one_clear_sentence(prefix: str, fields: dict, split: str, message: str) -> None:
    data = config(prefix).model_copy(update=fields)
    with pytest.raises(UserError, match=message) as caught:
        SampleSource(data, 1, split)
    assert "\n" not in str(caught.value)


def test_longest_possible_sample_is_the_whole_file(prefix: str) -> None:
    source = SampleSource(config(prefix, seq_length_tokens=TOKENS - 1), 1, "train")
    for number in islice(range(100), 5):
        assert len(set(source.sample(number).tokens.tolist())) > TOKENS // 2
