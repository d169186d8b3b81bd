"""One source of text as an endless sequence of samples, each found without reading those before it.

The documents of an epoch are shuffled and concatenated, epoch follows epoch, and sample window k covers tokens
[k L, k L + L] of that stream, so each token of an epoch is predicted exactly once. The windows that begin in one epoch
are shuffled among themselves. Both shuffles are permutations keyed by (seed, source, epoch), so nothing is stored but
one small index per epoch in use (csrc/epoch.h).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llm_parallel import _C
from llm_parallel.data.indexed import TokenFile
from llm_parallel.errors import UserError

MASK64 = (1 << 64) - 1
CACHED_EPOCHS = 2
"""A window may run into the next epoch, so two are alive at a time."""
DOCUMENTS_FOR_THREADS = 1 << 20
MAX_THREADS = 8


def derive_key(*parts: int) -> int:
    """A uint64 that depends on every part and on their order."""
    key = 0
    for part in parts:
        key = _C.mix64(key ^ (part & MASK64))
    return key


@dataclass(frozen=True)
class Selection:
    """Which documents of a source take part. ``part`` is "all", "train" (not held out) or "eval" (held out);
    ``key`` and ``fraction`` say which are held out: those whose hash of key and number falls in that fraction."""

    part: str = "all"
    key: int = 0
    fraction: float = 0.0

    @property
    def threshold(self) -> int:
        """A document is held out if its hash (uint64) is below this number."""
        return min(int(self.fraction * 2.0**64), MASK64)


class Stream:
    """Samples of ``length`` + 1 tokens of one token file; ``tokens`` is the size of one epoch.

    Raises UserError if an epoch has too few tokens for one sample.
    """

    def __init__(self, file: TokenFile, length: int, key: int, selection: Selection, shuffled: bool = True) -> None:
        self.file, self.length, self.key = file, length, key
        self._selection, self._shuffled = selection, shuffled
        self._epochs: dict[int, _C.Epoch] = {}
        self.tokens = self._epoch(0).tokens
        if self.tokens <= length:
            raise UserError(self._too_short())

    def read(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Sample ``number``: tokens int64 [length + 1], and the positions in it, int32, at which a new document begins
        (a document that begins at position 0 is not listed)."""
        window = np.empty(self.length + 1, np.int64)
        boundaries = []
        filled = 0
        for document, start, length in self._pieces(number):
            if filled:
                boundaries.append(filled)
            window[filled : filled + length] = self.file.tokens(document, start, length)
            filled += length
        assert filled == len(window)
        return window, np.array(boundaries, np.int32)

    def _pieces(self, number: int) -> list[tuple[int, int, int]]:
        epoch = number * self.length // self.tokens
        first = -(-epoch * self.tokens // self.length)
        last = -(-(epoch + 1) * self.tokens // self.length)
        place = number - first
        if self._shuffled:
            place = _C.permute(place, last - first, derive_key(self.key, epoch, 1))
        start = (first + place) * self.length - epoch * self.tokens
        inside = min(self.length + 1, self.tokens - start)
        found = self._piece_list(epoch, start, inside)
        if inside <= self.length:
            found += self._piece_list(epoch + 1, 0, self.length + 1 - inside)
        return found

    def _piece_list(self, epoch: int, start: int, length: int) -> list[tuple[int, int, int]]:
        return list(zip(*(column.tolist() for column in self._epoch(epoch).pieces(start, length))))

    def _epoch(self, number: int) -> _C.Epoch:
        if not self._shuffled:
            number = 0
        if number not in self._epochs:
            while len(self._epochs) >= CACHED_EPOCHS:
                del self._epochs[min(self._epochs, key=lambda held: (abs(held - number) <= 1, held))]
            many = self.file.num_documents >= DOCUMENTS_FOR_THREADS
            self._epochs[number] = _C.Epoch(
                self.file.length_bytes,
                derive_key(self.key, number, 0),
                self._shuffled,
                self._selection.part,
                self._selection.key,
                self._selection.threshold,
                min(MAX_THREADS, os.cpu_count() or 1) if many else 1,
            )
        return self._epochs[number]

    def _too_short(self) -> str:
        need = f"fewer than one sample needs (data.seq_length_tokens + 1 = {self.length + 1})"
        if self._selection.part == "eval":
            return (
                f"data.eval_fraction={self._selection.fraction:g} holds {self.tokens} tokens of {self.file.prefix} out "
                f"for evaluation, {need}; hold out more, set it to 0, or name held-out files in data.eval"
            )
        return f"{self.file.prefix} has {self.tokens} tokens to use, {need}; add text" + (
            f" or lower data.seq_length_tokens to at most {self.tokens - 1}" if self.tokens > 1 else ""
        )
