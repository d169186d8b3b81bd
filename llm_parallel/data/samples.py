"""Samples by number: sample n is a pure function of n and the run's segments, each of which is the data section and
seed from some sample on (segments.py); most runs have one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llm_parallel.config.tree import DataConfig
from llm_parallel.data.mix import Mixture
from llm_parallel.data.segments import Segment


@dataclass(frozen=True)
class Sample:
    """tokens, labels int64 [L]; weights fp32 [L], of each label's loss; document_starts int32, the positions in [0, L)
    at which a document begins, the first always 0; columns fp32 [L] by name, a number for each label; facts fp32
    [documents] by name, a number for each document; mismatched: see ``Batch``. Token files without isolation have
    document_starts [0] and weights 1, but 0 for labels of documents that were held out later."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    weights: NDArray[np.float32]
    document_starts: NDArray[np.int32]
    columns: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    facts: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    mismatched: Sample | None = None


class SampleSource:
    """Training or held-out samples of a configuration, without end.

    Held-out samples come from ``data.eval`` if that is given, else from ``data.eval_fraction`` of the documents of each
    training source, which training never sees; they come in file order, starting over when all have been seen.
    ``history`` and ``consumed``: the segments of a run that goes on, and how many samples it has had.
    Raises UserError on missing or damaged files and on sources with too little text for one sample, and later for a
    sample with ids that a model with ``vocab_size`` rows does not have.
    """

    def __init__(
        self,
        data: DataConfig,
        seed: int,
        split: Literal["train", "eval"],
        vocab_size: int | None = None,
        history: Sequence[Segment] = (),
        consumed: int = 0,
    ) -> None:
        self._vocab_size = vocab_size
        self.seq_length = data.seq_length_tokens
        self.isolate = data.packing == "isolate"
        self._mixture: Mixture | None = Mixture(data, seed, split, history, consumed)
        self.history = self._mixture.history
        self.notices = self._mixture.notices

    def sample(self, number: int) -> Sample:
        """Sample ``number``, from 0."""
        assert self._mixture is not None, "closed"
        window = self._mixture.read(number, self._vocab_size)
        weights = np.ones(self.seq_length, np.float32)
        weights[window.excluded] = 0.0
        starts = np.zeros(1, np.int32)
        if self.isolate:
            weights[window.crossings] = 0.0
            starts = np.concatenate([starts, window.starts])
        return Sample(window.tokens, window.labels, weights, starts)

    def close(self) -> None:
        """Closes the memory-mapped files; the source must not be used after that."""
        self._mixture = None
