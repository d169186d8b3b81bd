"""Opens the sources of a configuration: which samples training and evaluation take from each, and how much that is."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llm_parallel.config.tree import DataConfig, Source
from llm_parallel.data.epochs import Epochs, Selection, derive_key
from llm_parallel.data.indexed import REPORT_ENDING, TokenFile
from llm_parallel.data.order import MixtureOrder
from llm_parallel.data.segments import Segment, continued, identities
from llm_parallel.data.stream import Stream, Window
from llm_parallel.data.tokenizer import Tokenizer
from llm_parallel.errors import UserError

REPORTED = {"vocab_size": int, "tokens": int, "tokenizer": str, "tokenizer_fingerprint": str}
"""Fields that are read from a report of ``prepare``, with their types."""
MARKS = {"prepend_bos": (False, "begin", "--prepend-bos"), "append_eod": (True, "end", "--append-eod")}
"""Fields of a report that say whether every document begins or ends with a token: what holds for reports without them,
the token's name, and the option."""
NOTICES = 8
"""Sources that a notice lists."""
HOLD_OUT, ORDER = 1, 2
"""The uses of a derived key: to hold documents out, and to order samples."""


class Mixture:
    """The streams of one split (``streams[i]`` reads ``sources[i]``) and the ``order`` in which they take turns.

    Training streams are shuffled; held-out ones come in file order. ``history`` and ``consumed`` are the segments of a
    run that goes on, and how many samples it has had; ``history`` then has the present segment too, and ``notices`` say
    where the sources of one that begins here stand. Raises UserError on missing or damaged files and on sources with
    too little text for one sample.
    """

    def __init__(
        self,
        data: DataConfig,
        seed: int,
        split: Literal["train", "eval"],
        history: Sequence[Segment] = (),
        consumed: int = 0,
    ) -> None:
        self.sources = _sources(data, split)
        files = [TokenFile(source.path) for source in self.sources]
        self.history: tuple[Segment, ...] = ()
        self.notices: list[str] = []
        if split == "train":
            present = Segment.of(data, seed, consumed)
            uses = [
                replace(use, documents=file.num_documents, tokens=file.num_tokens)
                for use, file in zip(present.sources, files)
            ]
            self.history = continued(history, replace(present, sources=tuple(uses)))
            self._past = Past(self.history, files)
            self.streams = self._past.streams
            self.order = self._past.orders[-1]
            if self.history[-1].first == consumed > 0:
                self.notices = self._past.notices()
            return
        selection = Selection()
        if not data.eval:
            selection = Selection("eval", hold_out_key(history[0].seed if history else seed), data.eval_fraction)
        self.streams = [
            Stream(Epochs(file, derive_key(seed, ORDER, place), selection, shuffled=False), data.seq_length_tokens)
            for place, file in enumerate(files)
        ]
        self.order = MixtureOrder([source.weight for source in self.sources])

    def read(self, number: int, vocab_size: int | None) -> Window:
        """Sample ``number``, as ``Stream.read`` returns it. Raises UserError if it holds ids that are not below
        ``vocab_size``."""
        if self.history:
            stream, place = self._past.locate(number)
        else:
            source, place = self.order.locate(number)
            stream = self.streams[source]
        window = stream.read(place)
        for ids in (window.tokens, window.labels) if vocab_size is not None else ():
            # As unsigned numbers negative ids are large too: one pass finds both.
            if int(ids.view(np.uint64).max()) >= (vocab_size or 0):
                _refuse_ids(stream.epochs.file.prefix, ids, vocab_size or 0)
        return window


class Past:
    """Which stream gives a sample of a run that consists of segments. ``files`` are those of the last one; those that
    only earlier ones read are opened when one of their samples is asked for."""

    def __init__(self, history: Sequence[Segment], files: Sequence[TokenFile]) -> None:
        self._history = history
        self._numbers = identities(history)
        self._files = dict(zip(self._numbers[-1], files))
        self._salts: dict[int, int] = {}
        for numbers in self._numbers:
            for place, number in enumerate(numbers):
                used = set(self._salts.values())
                self._salts.setdefault(number, place if place not in used else max(used) + 1)
        self.orders = [MixtureOrder([source.weight for source in segment.sources]) for segment in history]
        self._epochs: dict[tuple[int, int, Selection], Epochs] = {}
        self._streams: dict[tuple[int, int], tuple[Stream, int]] = {}
        self._left: dict[int, tuple[str, int, int, float]] = {}
        last = len(history) - 1
        self.streams = [self._stream(last, place)[0] for place in range(len(files))]

    def locate(self, number: int) -> tuple[Stream, int]:
        """The stream of sample ``number``, and the sample's number in it."""
        segment = bisect_right(self._history, number, key=lambda held: held.first) - 1
        source, place = self.orders[segment].locate(number - self._history[segment].first)
        stream, before = self._stream(segment, source)
        return stream, before + place

    def notices(self) -> list[str]:
        """Where each source of the last segment stands at its beginning."""
        earlier = {source.path for segment in self._history[:-1] for source in segment.sources}
        found = []
        for place, source in enumerate(self._history[-1].sources):
            if place not in self._left:
                text = "begins at its start" + (": its file was replaced" if source.path in earlier else "")
                found.append(f"{source.path} {text}")
                continue
            path, epoch, left, part = self._left[place]
            moved = "" if path == source.path else f", which was {path},"
            text = f"goes on with {left:,} tokens that are left of its epoch {epoch + 1}"
            lengths = [segment.seq_length_tokens for segment in self._history]
            cut = f", in parts of {part:,.0f} tokens on average" if lengths[-1] > lengths[-2] else ""
            found.append(f"{source.path}{moved} {text}{cut}")
        rest = [f"and {len(found) - NOTICES} more sources"] if len(found) > NOTICES else []
        return found[:NOTICES] + rest

    def _stream(self, segment: int, place: int) -> tuple[Stream, int]:
        """The stream that a source of a segment reads, and how many of its samples came before the segment."""
        if (segment, place) not in self._streams:
            self._streams[segment, place] = self._opened(segment, place)
        return self._streams[segment, place]

    def _opened(self, segment: int, place: int) -> tuple[Stream, int]:
        settings, number = self._history[segment], self._numbers[segment][place]
        epochs, length = self._epochs_of(settings, number), settings.seq_length_tokens
        earlier = next((at for at in range(segment - 1, -1, -1) if number in self._numbers[at]), None)
        if earlier is None:
            return Stream(epochs, length), 0
        there = self._numbers[earlier].index(number)
        stream, before = self._stream(earlier, there)
        samples = self._history[earlier + 1].first - self._history[earlier].first
        taken = before + self.orders[earlier].counts(samples)[there]
        if segment == len(self._history) - 1:
            self._left[place] = (self._history[earlier].sources[there].path, *stream.left_after(taken))
        if stream.epochs is epochs and stream.length == length:
            return stream, taken
        return stream.continued(taken, epochs, length), 0

    def _epochs_of(self, settings: Segment, number: int) -> Epochs:
        if number not in self._files:
            uses = [(segment.sources, held) for segment, held in zip(self._history, self._numbers) if number in held]
            sources, held = uses[-1]
            self._files[number] = TokenFile(sources[held.index(number)].path)
        selection = Selection()
        if settings.held_out:
            # The first segment's seed: a document that was held out once is not trained on because a seed changed. The
            # key does not depend on the place in the mixture: a file that is listed twice holds the same ones out.
            selection = Selection("train", hold_out_key(self._history[0].seed), settings.held_out)
        key = derive_key(settings.seed, ORDER, self._salts[number])
        if (number, key, selection) not in self._epochs:
            self._epochs[number, key, selection] = Epochs(self._files[number], key, selection)
        return self._epochs[number, key, selection]


def hold_out_key(seed: int) -> int:
    """The key by which documents are held out."""
    return derive_key(seed, HOLD_OUT)


@dataclass(frozen=True)
class MixtureRow:
    """What a source contributes to a run: its share of the samples (0 to 1), tokens that one epoch of it has, tokens
    that the run takes from it, and how many epochs that is."""

    path: str
    weight: float
    tokens_available: int
    tokens_used: int
    epochs: float


def mixture_table(data: DataConfig, seed: int, total_samples: int) -> list[MixtureRow]:
    """One row per training source for a run of ``total_samples`` samples. Raises UserError as Mixture does."""
    mixture = Mixture(data, seed, "train")
    weights = mixture.order.weights
    rows = []
    for place, count in enumerate(mixture.order.counts(total_samples)):
        held, used = mixture.streams[place].tokens, count * data.seq_length_tokens
        rows.append(MixtureRow(mixture.sources[place].path, weights[place] / sum(weights), held, used, used / held))
    return rows


def check_token_files(data: DataConfig, vocab_size: int, tokenizer: Tokenizer | None = None) -> list[str]:
    """Compares the tokenizers that the reports of all sources, for training and held out, name with ``tokenizer`` or,
    where none is given, with each other. Returns notices about files without a report, and about sources whose
    documents begin or end in different ways.

    Raises UserError if the vocabularies of two of them, or of a source and the tokenizer, are not the same, or one is
    larger than the model's."""
    reported: dict[str, dict[str, Any]] = {}
    notices = []
    for path in dict.fromkeys(source.path for source in (*data.train, *data.eval)):
        report = _report_of(path)
        if report is None:
            notices.append(
                f"{path} came without a report of `prepare`: whether it was made with the run's tokenizer is not known"
            )
            _refuse_ids(path, next(iter(TokenFile(path).token_chunks())), vocab_size)
            continue
        reported[path] = report
        if report["vocab_size"] > vocab_size:
            raise UserError(
                f"{path} was prepared with {report['tokenizer']} of {report['vocab_size']} tokens, more than "
                f"model.vocab_size={vocab_size}; prepare it with the model's tokenizer or set model.vocab_size to "
                f"{report['vocab_size']} or more"
            )
    _refuse_mixed_tokenizers(reported, tokenizer)
    return notices + _different_marks(reported)


def _different_marks(reported: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A notice for each token that begins or ends the documents of some sources and not of others."""
    notices = []
    for field, (_, token, option) in MARKS.items():
        marked = [path for path, report in reported.items() if report[field]]
        others = [path for path, report in reported.items() if not report[field]]
        if marked and others:
            notices.append(
                f"the documents of {_listed(marked)} {token} with the tokenizer's {token} token and those of "
                f"{_listed(others)} do not; prepare all with {option} or all without, unless that is meant"
            )
    return notices


def _listed(paths: list[str]) -> str:
    more = f" and {len(paths) - NOTICES} more sources" if len(paths) > NOTICES else ""
    return ", ".join(paths[:NOTICES]) + more


def _refuse_mixed_tokenizers(reported: Mapping[str, Mapping[str, Any]], tokenizer: Tokenizer | None) -> None:
    """Raises UserError if a source's tokenizer is not ``tokenizer`` or, where none is given, not that of the first
    source."""
    if not reported:
        return
    first, of_first = next(iter(reported.items()))
    name = f"data.tokenizer={tokenizer.name}" if tokenizer else f"{of_first['tokenizer']}, which {first} was made with,"
    wanted = tokenizer.fingerprint if tokenizer else of_first["tokenizer_fingerprint"]
    for path, report in reported.items():
        if report["tokenizer_fingerprint"] != wanted:
            raise UserError(
                f"{path} was prepared with another tokenizer ({report['tokenizer']}, fingerprint "
                f"{report['tokenizer_fingerprint']}) than {name} (fingerprint {wanted}), so its numbers mean other "
                "tokens; name the tokenizer that it was prepared with, or prepare it again"
            )


def tokenizer_of_reports(data: DataConfig) -> str | None:
    """The tokenizer that the report of the first source names, if that is there."""
    report = _report_of(data.train[0].path) if data.train else None
    return report["tokenizer"] if report is not None and Path(report["tokenizer"]).exists() else None


def _report_of(path: str) -> dict[str, Any] | None:
    """The report that `prepare` wrote about a pair of token files; None if there is none. Raises UserError if it is
    damaged or about other files."""
    try:
        report = json.loads(Path(path + REPORT_ENDING).read_text(encoding="utf-8"))
        found = {name: kind(report[name]) for name, kind in REPORTED.items()}
        found |= {name: bool(report.get(name, usual)) for name, (usual, _, _) in MARKS.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}{REPORT_ENDING} is damaged ({error}); prepare {path} again, or remove it") from None
    held = TokenFile(path).num_tokens
    if held != found["tokens"]:
        raise UserError(
            f"{path}{REPORT_ENDING} is of other files: it says {found['tokens']} tokens, and {path}.bin holds {held}; "
            "prepare them again, or remove the report"
        )
    return found


def _refuse_ids(path: str, ids: NDArray[Any], vocab_size: int) -> None:
    """Raises UserError if the model's embedding has no row for some of ``ids``."""
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= vocab_size:
        raise UserError(
            f"{path} holds the token id {least if least < 0 else most}, and model.vocab_size={vocab_size} has the ids "
            f"0 to {vocab_size - 1}; name the tokenizer that it was made with, or set model.vocab_size"
        )


def _sources(data: DataConfig, split: Literal["train", "eval"]) -> tuple[Source, ...]:
    if not data.train:
        raise UserError("data.train is empty; name at least one prefix of token files that `prepare` wrote")
    if split == "eval" and not data.eval and not data.eval_fraction:
        raise UserError("data.eval is empty and data.eval_fraction is 0, so nothing is held out; set one of them")
    return data.eval if data.eval and split == "eval" else data.train
