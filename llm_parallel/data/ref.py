"""What csrc/ computes, in numpy and plain Python: slow and short, the reference with which the tests compare the
extension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDS = 5
MIN_BITS = 8


def mix64(x: NDArray[Any]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014), uint64 to uint64, elementwise and wrapping."""
    with np.errstate(over="ignore"):
        x = np.asarray(x, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def permutation(size: int, key: int) -> NDArray[np.int64]:
    """The shuffle of ``range(size)`` that the uint64 ``key`` names: int64 [size]."""
    if size <= 1:
        return np.arange(size)
    bits = max(MIN_BITS, (size - 1).bit_length())
    mask, shift = np.uint64((1 << bits) - 1), np.uint64((bits + 1) // 2)
    with np.errstate(over="ignore"):
        constants = mix64(mix64(np.full(1, key, np.uint64)) + np.arange(2 * ROUNDS, dtype=np.uint64))

        def once(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
            for multiplier, addend in zip(constants[0::2] | np.uint64(1), constants[1::2]):
                x = (x * multiplier + addend) & mask
                x = x ^ (x >> shift)
            return x

        found = once(np.arange(size, dtype=np.uint64))
        while (outside := found >= size).any():
            found[outside] = once(found[outside])
    return found.astype(np.int64)


def rest(size: int, key: int, taken: int) -> NDArray[np.int64]:
    """``range(size)`` without the first ``taken`` elements of the shuffle that ``key`` names, ascending: int64."""
    return np.sort(permutation(size, key)[taken:])


class Epoch:
    """One epoch's documents in order, with the arguments, properties and results of csrc/epoch.h."""

    def __init__(
        self,
        lengths: NDArray[np.uint8],
        key: int,
        shuffled: bool,
        part: str,
        hold_key: int,
        hold_threshold: int,
    ) -> None:
        held = np.frombuffer(lengths.tobytes(), np.int32).astype(np.int64)
        if part != "all":
            with np.errstate(over="ignore"):
                hashes = mix64(np.full(1, hold_key, np.uint64) + np.arange(len(held), dtype=np.uint64))
            held[(hashes < np.uint64(hold_threshold)) != (part == "eval")] = 0
        self.order = permutation(len(held), key) if shuffled else np.arange(len(held))
        self.ends = np.cumsum(held[self.order])
        self.begins = self.ends - held[self.order]

    @property
    def tokens(self) -> int:
        """Tokens of one epoch."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def pieces(self, start: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Documents, first tokens and lengths (int64 each) of the pieces that make up a stretch of the epoch."""
        first = np.maximum(self.begins, start)
        last = np.minimum(self.ends, start + length)
        hit = first < last
        return self.order[hit], (first - self.begins)[hit], (last - first)[hit]


def continue_mixture(
    weights: Sequence[int], start: int, taken: Sequence[int], count: int
) -> tuple[NDArray[np.int32], NDArray[np.int64], list[int]]:
    """Source (int32) and number within it (int64) of samples ``start`` to ``start + count``; then how many samples each
    source has given by then."""
    total, taken = sum(weights), list(taken)
    sources, numbers = [], []
    for n in range(start + 1, start + count + 1):
        released = [i for i, weight in enumerate(weights) if taken[i] * total < n * weight]
        chosen = released[0]
        for i in released[1:]:
            # (taken + 1) / weight is the deadline of the source's next sample.
            if (taken[i] + 1) * weights[chosen] < (taken[chosen] + 1) * weights[i]:
                chosen = i
        sources.append(chosen)
        numbers.append(taken[chosen])
        taken[chosen] += 1
    return np.array(sources, np.int32), np.array(numbers, np.int64), taken
