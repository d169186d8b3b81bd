"""Which keys each token of a pass sees, as tables for the C++ extension; see csrc/decode/chunk.h."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llm_parallel.generate.scheduler import Draft, Part

if TYPE_CHECKING:
    from llm_parallel.generate.paged import Pass


class PageArrays:
    """The pages of sequences as arrays. Those of a sequence are converted once: a text of 32,768 tokens has 2,048 of
    them, whose conversion from a list takes 60 us, and a pass has up to 64 such texts."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Draft, tuple[list[int], NDArray[np.int32], int]]
        self._known = weakref.WeakKeyDictionary()

    def of(self, sequence: Draft) -> NDArray[np.int32]:
        """The sequence's pages, int32."""
        pages = sequence.pages
        of, array, known = self._known.get(sequence, (None, None, 0))
        if of is not pages or array is None:  # a sequence that was interrupted has another list
            array, known = np.empty(0, dtype=np.int32), 0
        if len(pages) > len(array):
            array = np.concatenate([array[:known], np.empty(len(pages), dtype=np.int32)])
        if known < len(pages):
            array[known : len(pages)] = pages[known:]
            self._known[sequence] = pages, array, len(pages)
        return array[: len(pages)]


@dataclass(frozen=True)
class Seen:
    """pages: int32, of all sequences; starts: int64 [rows], where in ``pages`` those of a row's sequence begin;
    lengths: int64 [rows], keys that a row sees with its own. Rows are the tokens of the pass, or its single tokens
    only."""

    pages: NDArray[np.int32]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @staticmethod
    def of(parts: Sequence[Part], arrays: PageArrays) -> Seen:
        """Of all tokens of these parts."""
        pages = [arrays.of(part.sequence) for part in parts]
        counts = np.array([part.count for part in parts])
        first = np.cumsum([0, *(len(one) for one in pages[:-1])])
        lengths = [np.arange(part.start + 1, part.start + part.count + 1) for part in parts]
        return Seen(np.concatenate(pages), np.repeat(first, counts), np.concatenate(lengths))

    def addresses(self, info: Pass) -> tuple[int, int, int, int, int, int]:
        """What the extension takes; ``info`` is the pass that holds this."""
        tensors = (info.slots.data_ptr(), info.cos.data_ptr(), info.sin.data_ptr())
        return *tensors, self.pages.ctypes.data, self.starts.ctypes.data, self.lengths.ctypes.data
