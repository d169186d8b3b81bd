"""Which tokens of an epoch a run sees whose data section changes: counted in files whose tokens are all different."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llm_parallel import _C
from llm_parallel.checkpoint.state import TrainState
from llm_parallel.config.tree import DataConfig, Source
from llm_parallel.data import ref
from llm_parallel.data.epochs import MASK64
from llm_parallel.data.samples import Sample, SampleSource
from llm_parallel.data.segments import Segment, SourceUse
from llm_parallel.errors import UserError
from tests.support.data_helpers import numbered_documents, write_token_file

RNG = np.random.default_rng(8)
LENGTHS = {name: RNG.integers(0, 60, count).tolist() for name, count in (("a", 50), ("b", 23), ("c", 35))}
FIRST = {"a": 0, "b": 10_000, "c": 20_000}
TOKENS = {name: sum(lengths) for name, lengths in LENGTHS.items()}
LONGEST = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files; no token is in two of them or twice in one."""
    made = tmp_path_factory.mktemp("data")
    for name, lengths in LENGTHS.items():
        write_token_file(made / name, numbered_documents(lengths, FIRST[name]))
    return made


def data_of(folder: Path, sources: str = "a", **fields: object) -> DataConfig:
    """``sources``: names, each of which may be followed by a digit, its weight."""
    train = [
        Source(
            path=str(folder / name), weight=float(sources[at + 1 : at + 2]) if sources[at + 1 : at + 2].isdigit() else 1
        )
        for at, name in enumerate(sources)
        if name.isalpha()
    ]
    return DataConfig(train=tuple(train), **{"eval_fraction": 0.0, "seq_length_tokens": 32, **fields})


class Trained:
    """The samples that a run reads, and what they count to."""

    def __init__(self) -> None:
        self.history: tuple[Segment, ...] = ()
        self.consumed = 0
        self.samples: list[Sample] = []
        self.notices: list[str] = []

    def train(self, data: DataConfig, samples: int, seed: int = 1) -> SampleSource:
        """Goes on under these settings, as a run does that was started again; the checkpoint is JSON."""
        self.history = TrainState.from_record(
            json.loads(json.dumps(TrainState(segments=self.history).record()))
        ).segments
        source = SampleSource(data, seed, "train", None, self.history, self.consumed)
        self.history, self.notices = source.history, source.notices
        self.samples += [source.sample(number) for number in range(self.consumed, self.consumed + samples)]
        self.consumed += samples
        return source

    def counts(self, name: str, part: str = "tokens", learned: bool = False) -> NDArray[np.int64]:
        """How often each token of a file was an input, or a label (``learned``: with weight)."""
        found = [
            getattr(sample, part)[sample.weights > 0] if learned else getattr(sample, part) for sample in self.samples
        ]
        ids = np.concatenate(found) - FIRST[name]
        return np.bincount(ids[(ids >= 0) & (ids < TOKENS[name])], minlength=TOKENS[name])


def surplus(counts: NDArray[np.int64]) -> int:
    """Visits of tokens that came again before all had come. The token that comes least is left out: no window has that
    before the first one as its input, so that it lacks a visit as a label."""
    return int(np.maximum(counts - np.sort(counts)[1] - 1, 0).sum())


def repeated(counts: NDArray[np.int64]) -> int:
    """Tokens that came more than once; in the first epoch only what a window has of the second."""
    return int((counts > 1).sum())


@given(st.integers(1, 1500), st.integers(0, MASK64), st.data())
@settings(max_examples=40, deadline=None)
def test_what_a_shuffle_leaves_equals_its_twin(size: int, key: int, data: st.DataObject) -> None:
    taken = data.draw(st.integers(0, size))
    left, twin = _C.Rest(size, key, taken), ref.rest(size, key, taken).tolist()
    assert [left.element(place) for place in range(left.count)] == twin
    assert sorted([*twin, *(_C.permute(place, size, key) for place in range(taken))]) == list(range(size))
    for place in (-1, left.count):
        with pytest.raises(IndexError):
            left.element(place)


STAGE = st.tuples(
    st.sampled_from(["a", "a3b1", "a1b3", "b1a1", "c2a1", "c1b1a5", "b"]),
    st.integers(1, LONGEST),
    st.sampled_from(["concatenate", "isolate"]),
    st.integers(0, 90),
)


@given(st.lists(STAGE, min_size=2, max_size=5))
@settings(max_examples=40, deadline=None)
def test_no_token_comes_again_before_all_have_come(folder: Path, stages: list[tuple[str, int, str, int]]) -> None:
    """Whatever weights, lengths and sources change: less than one window of each length that was trained runs ahead
    into the next epoch, since what a length leaves of an epoch begins the next one's windows of the same length."""
    run = Trained()
    for sources, length, packing, samples in stages:
        run.train(data_of(folder, sources, seq_length_tokens=length, packing=packing), samples)
    ahead = sum(length for _, length, _, samples in stages if samples)
    for name in FIRST if run.samples else ():
        assert surplus(run.counts(name)) < ahead
        assert surplus(run.counts(name, "labels")) < ahead


def test_two_lengths_may_run_ahead_by_a_window_each(folder: Path) -> None:
    run = Trained()
    for length, samples in ((63, 8), (81, 4), (4, 20)):
        run.train(data_of(folder, "a1b3", seq_length_tokens=length), samples)
    assert 81 < surplus(run.counts("b")) < 63 + 81 + 4


def test_the_share_seen_twice_or_never_is_nothing_where_windows_divide_the_epoch(tmp_path: Path) -> None:
    """Without remainders every token of an epoch comes exactly once, across four changes of length and weight."""
    lengths = [*RNG.integers(0, 60, 60).tolist(), 0]
    lengths[-1] = -sum(lengths) % 256
    path = write_token_file(tmp_path / "x", numbered_documents(lengths))
    (tmp_path / "y").mkdir()
    other = write_token_file(tmp_path / "y" / "x", numbered_documents(lengths, 50_000))
    run, read = Trained(), 0
    for length, weights in ((64, (1, 1)), (32, (1, 3)), (16, (3, 1)), (16, (5, 1)), (8, (1, 1))):
        train = (Source(path=path, weight=weights[0]), Source(path=other, weight=weights[1]))
        run.train(DataConfig(train=train, eval_fraction=0.0, seq_length_tokens=length), 8)
    while (read := int((np.concatenate([sample.tokens for sample in run.samples]) < 50_000).sum())) < sum(lengths):
        run.train(DataConfig(train=train[:1], eval_fraction=0.0, seq_length_tokens=8), 1)
    seen = np.concatenate([sample.tokens for sample in run.samples])
    assert read == sum(lengths) and sorted(seen[seen < 50_000].tolist()) == list(range(read))


def test_labels_are_the_tokens_that_follow_and_isolation_knows_every_break(folder: Path) -> None:
    """Where windows join parts that other windows had left, the last label of a part is the token after it in its
    document, and no attention crosses into the next part."""
    owner = np.repeat(np.arange(len(LENGTHS["a"])), LENGTHS["a"])
    runs = {packing: Trained() for packing in ("isolate", "concatenate")}
    for packing, run in runs.items():
        for length, samples in ((32, 20), (80, 6), (48, 40)):
            run.train(data_of(folder, packing=packing, seq_length_tokens=length), samples)
    breaks = 0
    for sample, plain in zip(*(run.samples for run in runs.values())):
        np.testing.assert_array_equal(sample.tokens, plain.tokens)
        np.testing.assert_array_equal(sample.labels, plain.labels)
        follows = (sample.labels == sample.tokens + 1) & (owner[sample.labels] == owner[sample.tokens])
        np.testing.assert_array_equal(sample.weights > 0, follows)
        joined = (sample.tokens[1:] == sample.tokens[:-1] + 1) & (owner[sample.tokens[1:]] == owner[sample.tokens[:-1]])
        assert sample.document_starts.tolist() == [0, *(np.flatnonzero(~joined) + 1)]
        breaks += int((follows[:-1] & ~joined).sum())
        assert (plain.weights == 1).all() and plain.document_starts.tolist() == [0]
    assert breaks > 3, "parts were joined"


def test_settings_that_stay_give_the_same_samples_as_a_run_that_was_never_stopped(folder: Path) -> None:
    data = data_of(folder, "a3b1", eval_fraction=0.1)
    run = Trained()
    for samples in (7, 0, 30):
        run.train(data, samples)
    whole = SampleSource(data, 1, "train")
    for number, sample in enumerate(run.samples):
        np.testing.assert_array_equal(sample.tokens, whole.sample(number).tokens)
    assert len(run.history) == 1 and run.notices == []
    run.train(data_of(folder, "a1b3", eval_fraction=0.1), 0)
    run.train(data, 10)
    assert len(run.history) == 1, "a change under which nothing was read leaves no trace"


def test_a_sample_is_a_function_of_its_number_in_every_segment(folder: Path) -> None:
    run = Trained()
    for sources, length in (("a", 32), ("a1b2", 80), ("b1c1", 16)):
        source = run.train(data_of(folder, sources, seq_length_tokens=length), 25)
    for number in RNG.permutation(75).tolist():
        np.testing.assert_array_equal(source.sample(number).tokens, run.samples[number].tokens)


def test_another_mixture_leaves_each_source_its_order(folder: Path) -> None:
    """Only weights change: a source's samples are those of a run that reads it alone."""
    run = Trained()
    for sources in ("a3b1", "b5a1", "c", "a1c1"):
        run.train(data_of(folder, sources), 20)
    for name, place in (("a", 0), ("b", 1), ("c", 2)):
        data = data_of(folder, "".join(sorted(FIRST))[:3])
        alone = SampleSource(data, 1, "train")
        mine = [sample.tokens for sample in run.samples if FIRST[name] <= sample.tokens[0] < FIRST[name] + 10_000]
        assert len(mine) > 5
        for number, tokens in enumerate(mine):
            np.testing.assert_array_equal(tokens, alone.sample(3 * number + place).tokens)


def test_another_seed_shuffles_the_rest_and_holds_the_same_documents_out(folder: Path) -> None:
    run, same = Trained(), Trained()
    for seed in (1, 2):
        run.train(data_of(folder, eval_fraction=0.2), 15, seed)
        same.train(data_of(folder, eval_fraction=0.2), 15)
    assert run.samples[20].tokens.tolist() not in [sample.tokens.tolist() for sample in same.samples]
    assert repeated(run.counts("a")) < 32
    run.train(data_of(folder, eval_fraction=0.2), 200, 2)
    data = data_of(folder, eval_fraction=0.2)
    held_out = SampleSource(data, 2, "eval", None, run.history).sample(0).tokens
    np.testing.assert_array_equal(held_out, SampleSource(data, 1, "eval").sample(0).tokens)
    assert not run.counts("a")[held_out].any()


def held_out_tokens(folder: Path, share: float) -> NDArray[np.int64]:
    data = data_of(folder, eval_fraction=share)
    source = SampleSource(data, 1, "eval")
    return np.unique(np.concatenate([source.sample(number).tokens for number in range(40)]))


def test_documents_that_join_the_held_out_ones_are_not_learned_any_more(folder: Path) -> None:
    run = Trained()
    run.train(data_of(folder, eval_fraction=0.1), 10)
    before = run.counts("a", "labels", learned=True)
    run.train(data_of(folder, eval_fraction=0.4), 150)
    after = run.counts("a", "labels", learned=True) - before
    few, many = held_out_tokens(folder, 0.1), held_out_tokens(folder, 0.4)
    assert set(few) < set(many) and before[many].any()
    assert not after[many].any() and not before[few].any()
    stays = np.setdiff1d(np.arange(TOKENS["a"]), many)
    assert surplus((before + after)[stays]) < 2 * 32


def test_documents_that_leave_the_held_out_ones_come_with_the_next_epoch(folder: Path) -> None:
    run = Trained()
    run.train(data_of(folder, eval_fraction=0.4), 10)
    run.train(data_of(folder, eval_fraction=0.1), 12)
    few, many = held_out_tokens(folder, 0.1), held_out_tokens(folder, 0.4)
    assert not run.counts("a")[many].any(), "the epoch is completed as it was begun"
    run.train(data_of(folder, eval_fraction=0.1), 70)
    counts = run.counts("a")
    assert counts[np.setdiff1d(many, few)].any() and not counts[few].any()


def test_sources_that_moved_were_replaced_or_come_back(folder: Path, tmp_path: Path) -> None:
    for kind in ("bin", "idx"):
        (tmp_path / f"a.{kind}").write_bytes((folder / f"a.{kind}").read_bytes())
    run = Trained()
    run.train(data_of(folder, "a1b1"), 20)
    run.train(data_of(folder, "b"), 3)
    run.train(data_of(tmp_path, "a"), 20)
    assert repeated(run.counts("a")) < 32
    epoch = TOKENS["a"] - 10 * 32
    assert run.notices == [
        f"{tmp_path}/a, which was {folder}/a, goes on with {epoch:,} tokens that are left of its epoch 1"
    ]
    write_token_file(tmp_path / "a", numbered_documents(LENGTHS["c"], FIRST["c"]))
    run.train(data_of(tmp_path, "a"), 1)
    assert run.notices == [f"{tmp_path}/a begins at its start: its file was replaced"]
    run.train(data_of(folder, "a1c1", seq_length_tokens=64), 8)
    assert repeated(run.counts("a")) < 32 + 64
    assert run.notices[1] == f"{folder}/c begins at its start"
    assert f"{epoch - 20 * 32:,} tokens that are left of its epoch 1, in parts of " in run.notices[0]


def test_a_file_that_is_listed_twice_has_two_places(folder: Path) -> None:
    run = Trained()
    run.train(data_of(folder, "aa"), 40)
    run.train(data_of(folder, "baa", seq_length_tokens=16), 60)
    assert int((run.counts("a") > 2).sum()) < 2 * 32


def test_old_checkpoints_have_no_segments_and_damaged_ones_are_refused(folder: Path, tmp_path: Path) -> None:
    state = TrainState(step=3, consumed_samples=24, segments=(Segment.of(data_of(folder, "a1b2"), 5),))
    state.write(tmp_path)
    assert TrainState.read(tmp_path) == state
    written = (tmp_path / "train_state.json").read_text()
    (tmp_path / "train_state.json").write_text(written.replace('"seq_length_tokens"', '"length"'))
    with pytest.raises(UserError, match=r"train_state.json is missing or damaged"):
        TrainState.read(tmp_path)
    assert TrainState.from_record({k: v for k, v in state.record().items() if k != "segments"}).segments == ()


def test_an_old_checkpoints_sources_go_on_where_their_counts_are_not_known(folder: Path) -> None:
    data = data_of(folder, "a")
    run = Trained()
    run.train(data, 20)
    run.history = (Segment.of(data, 1),)
    assert run.history[0].sources == (SourceUse(str(folder / "a"), 1.0),)
    run.train(data_of(folder, "a1b1", seq_length_tokens=64), 20)
    assert repeated(run.counts("a")) < 32 + 64 and run.history[0] == replace(run.history[0], first=0)
