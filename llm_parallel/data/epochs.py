"""The epochs of one token file: the documents that take part, in a new order in each epoch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from llm_parallel import _C
from llm_parallel.data.indexed import TokenFile

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

    def contains(self, document: int) -> bool:
        """Whether a document takes part (csrc/epoch.h)."""
        held_out = _C.mix64((self.key + document) & MASK64) < self.threshold
        return self.part == "all" or held_out == (self.part == "eval")


class Epochs:
    """``tokens`` is the size of one epoch. Without ``shuffled`` every epoch has the order of the file."""

    def __init__(self, file: TokenFile, key: int, selection: Selection, shuffled: bool = True) -> None:
        self.file, self.key, self.selection, self.shuffled = file, key, selection, shuffled
        self._open: dict[int, _C.Epoch] = {}
        self.tokens = self._epoch(0).tokens

    def pieces(self, number: int, start: int, length: int) -> list[tuple[int, int, int]]:
        """Document, first token and length of each piece of tokens [start, start + length) of epoch ``number``."""
        return list(zip(*(column.tolist() for column in self._epoch(number).pieces(start, length))))

    def _epoch(self, number: int) -> _C.Epoch:
        if not self.shuffled:
            number = 0
        if number not in self._open:
            while len(self._open) >= CACHED_EPOCHS:
                del self._open[min(self._open, key=lambda held: (abs(held - number) <= 1, held))]
            many = self.file.num_documents >= DOCUMENTS_FOR_THREADS
            self._open[number] = _C.Epoch(
                self.file.length_bytes,
                derive_key(self.key, number, 0),
                self.shuffled,
                self.selection.part,
                self.selection.key,
                self.selection.threshold,
                min(MAX_THREADS, os.cpu_count() or 1) if many else 1,
            )
        return self._open[number]
