"""Opens the sources of a configuration: which samples training and evaluation take from each, and how much that is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llm_parallel.config.tree import DataConfig, Source
from llm_parallel.data.indexed import REPORT_ENDING, TokenFile
from llm_parallel.data.order import MixtureOrder
from llm_parallel.data.stream import Selection, Stream, derive_key
from llm_parallel.data.tokenizer import Tokenizer
from llm_parallel.errors import UserError

REPORTED = {"vocab_size": int, "tokens": int, "tokenizer": str, "tokenizer_fingerprint": str}
"""Fields that are read from a report of ``prepare``, with their types."""
HOLD_OUT, ORDER = 1, 2
"""The uses of a derived key: to hold documents out, and to order samples."""


class Mixture:
    """The streams of one split (``streams[i]`` reads ``sources[i]``) and the ``order`` in which they take turns.

    Training streams are shuffled; held-out ones come in file order. Raises UserError on missing or damaged files and on
    sources with too little text for one sample.
    """

    def __init__(self, data: DataConfig, seed: int, split: Literal["train", "eval"]) -> None:
        self.sources, selection = _divided(data, seed, split)
        self.streams = [
            Stream(
                TokenFile(source.path),
                data.seq_length_tokens,
                derive_key(seed, ORDER, place),
                selection,
                shuffled=split == "train",
            )
            for place, source in enumerate(self.sources)
        ]
        self.order = MixtureOrder([source.weight for source in self.sources])

    def read(self, number: int, vocab_size: int | None) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Sample ``number`` as ``Stream.read`` returns it. Raises UserError if it holds ids that are not below
        ``vocab_size``."""
        source, place = self.order.locate(number)
        window, boundaries = self.streams[source].read(place)
        # As unsigned numbers negative ids are large too: one pass finds both.
        if vocab_size is not None and int(window.view(np.uint64).max()) >= vocab_size:
            _refuse_ids(self.sources[source].path, window, vocab_size)
        return window, boundaries


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
    where none is given, with each other. Returns notices about files without a report.

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
    return notices


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


def _report_of(path: str) -> dict[str, Any] | None:
    """The report that `prepare` wrote about a pair of token files; None if there is none. Raises UserError if it is
    damaged or about other files."""
    try:
        report = json.loads(Path(path + REPORT_ENDING).read_text(encoding="utf-8"))
        found = {name: kind(report[name]) for name, kind in REPORTED.items()}
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


def _divided(data: DataConfig, seed: int, split: Literal["train", "eval"]) -> tuple[tuple[Source, ...], Selection]:
    if not data.train:
        raise UserError("data.train is empty; name at least one prefix of token files that `prepare` wrote")
    if data.eval:
        return (data.train if split == "train" else data.eval), Selection()
    if split == "eval" and not data.eval_fraction:
        raise UserError("data.eval is empty and data.eval_fraction is 0, so nothing is held out; set one of them")
    if not data.eval_fraction:
        return data.train, Selection()
    # The key does not depend on the place in the mixture: a file that is listed twice holds the same documents out.
    return data.train, Selection(split, derive_key(seed, HOLD_OUT), data.eval_fraction)
