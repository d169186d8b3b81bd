"""The C++ extension (csrc/). llm_parallel/data/ref.py computes the same in numpy."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def mix64(x: int) -> int:
    """SplitMix64's finaliser: uint64 to uint64."""

def permute(position: int, size: int, key: int) -> int:
    """Element at ``position`` of the shuffle of ``range(size)`` that the uint64 ``key`` names."""

def continue_mixture(
    weights: Sequence[int], start: int, taken: Sequence[int], count: int
) -> tuple[NDArray[np.int32], NDArray[np.int64], list[int]]:
    """Source and number within it of samples ``start`` to ``start + count``; then how many each source has given."""

class Rest:
    """``range(size)`` without the first ``taken`` elements of the shuffle of ``key``, ascending; see csrc/rest.h."""

    def __init__(self, size: int, key: int, taken: int) -> None: ...
    @property
    def count(self) -> int:
        """Number of elements."""

    def element(self, place: int) -> int:
        """Element number ``place``."""

class Epoch:
    """One epoch's documents in order; see csrc/epoch.h. ``lengths`` is the bytes of an int32 array, not copied."""

    def __init__(
        self,
        lengths: NDArray[np.uint8],
        key: int,
        shuffled: bool,
        part: str,
        hold_key: int,
        hold_threshold: int,
        threads: int,
    ) -> None: ...
    @property
    def tokens(self) -> int:
        """Tokens of one epoch."""

    @property
    def bytes(self) -> int:
        """Memory that the index takes."""

    def pieces(self, start: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Documents, first tokens and lengths of the pieces that make up a stretch of the epoch."""
