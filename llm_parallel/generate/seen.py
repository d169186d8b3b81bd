"""Which keys each token of a pass sees, as tables for the C++ extension; see csrc/decode/chunk.h."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm_parallel.generate.scheduler import Draft, Part


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

    pages: Tensor
    starts: Tensor
    lengths: Tensor

    @staticmethod
    def of(parts: Sequence[Part], arrays: PageArrays) -> Seen:
        """Of all tokens of these parts."""
        pages = [arrays.of(part.sequence) for part in parts]
        starts, lengths, first = list[int](), list[int](), 0
        for part, own in zip(parts, pages):
            starts += [first] * part.count
            lengths += range(part.start + 1, part.start + part.count + 1)
            first += len(own)
        joined = pages[0] if len(pages) == 1 else np.concatenate(pages)
        numbers = torch.tensor([starts, lengths])
        return Seen(torch.from_numpy(joined), numbers[0], numbers[1])

    def addresses(self, slots: Tensor, cos: Tensor, sin: Tensor) -> tuple[int, int, int, int, int, int]:
        """What the extension takes: the addresses of these tensors of the pass, and of its own."""
        own = (self.pages.data_ptr(), self.starts.data_ptr(), self.lengths.data_ptr())
        return slots.data_ptr(), cos.data_ptr(), sin.data_ptr(), *own
