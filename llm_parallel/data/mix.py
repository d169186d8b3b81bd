"""The sources of a configuration, opened: what training and evaluation take from each, and how much that is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llm_parallel.config.tree import DataConfig, Source
from llm_parallel.data.indexed import REPORT_ENDING, TokenFile
from llm_parallel.data.order import MixtureOrder
from llm_parallel.data.stream import Selection, Stream, derive_key
from llm_parallel.errors import UserError

HOLD_OUT, ORDER = 1, 2
"""What a derived key is for."""


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


def check_token_files(data: DataConfig, vocab_size: int) -> None:
    """Raises UserError if a source was prepared with more tokens than the model has. Only ``prepare``'s own files say;
    others are taken as they are."""
    for source in (*data.train, *data.eval):
        try:
            report = json.loads(Path(source.path + REPORT_ENDING).read_text(encoding="utf-8"))
            prepared, tokenizer = int(report["vocab_size"]), report["tokenizer"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if prepared > vocab_size:
            raise UserError(
                f"{source.path} was prepared with {tokenizer} of {prepared} tokens, more than model.vocab_size="
                f"{vocab_size}; prepare it with the model's tokenizer or set model.vocab_size to {prepared} or more"
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
