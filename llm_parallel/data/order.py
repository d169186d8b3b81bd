"""The order in which a mixture's sources take turns."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from llm_parallel import _C

BLOCK = 1 << 16
"""Number of samples that are computed at a time."""
CACHED_BLOCKS = 4
MAX_TOTAL = 1 << 40
"""Largest sum of integer weights; with this resolution it takes 10^12 samples to be off by one."""


def integer_weights(weights: Sequence[float]) -> list[int]:
    """The smallest integers in the proportion of ``weights``, where 0.1 means exactly one tenth; rounded to a
    resolution of 2^-40 if their sum would be over ``MAX_TOTAL``. Every weight stays at least 1."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*whole)
    whole = [weight // divisor for weight in whole]
    if sum(whole) <= MAX_TOTAL:
        return whole
    total = sum(whole)
    return [max(1, (2 * weight * MAX_TOTAL + total) // (2 * total)) for weight in whole]


class MixtureOrder:
    """Sample number → (source, number within the source), a pure function of the weights.

    Among the first n samples each source of share w has more than n w - 1 and less than n w + 1 (csrc/mixture.h). The
    order repeats after the sum of the integer weights; within a period, block follows block, and the state at the start
    of each block seen is kept (one integer per source for 65536 samples).
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = integer_weights(weights)
        self.period = sum(self.weights)
        self._states: list[list[int]] = [[0] * len(self.weights)]
        self._blocks: OrderedDict[int, tuple[NDArray[np.int32], NDArray[np.int64]]] = OrderedDict()

    def locate(self, number: int) -> tuple[int, int]:
        """Source of sample ``number`` and the sample's number within that source."""
        periods, place = divmod(number, self.period)
        block, offset = divmod(place, BLOCK)
        sources, numbers = self._block(block)
        source = int(sources[offset])
        return source, periods * self.weights[source] + int(numbers[offset])

    def counts(self, number: int) -> list[int]:
        """How many of the first ``number`` samples each source gives."""
        periods, place = divmod(number, self.period)
        block, offset = divmod(place, BLOCK)
        taken = self._state(block)
        if offset:
            taken = [held + int((self._block(block)[0][:offset] == i).sum()) for i, held in enumerate(taken)]
        return [periods * weight + held for weight, held in zip(self.weights, taken)]

    def _state(self, block: int) -> list[int]:
        while len(self._states) <= block:
            self._fill(len(self._states) - 1)
        return self._states[block]

    def _block(self, block: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        if block not in self._blocks:
            self._state(block)
            self._blocks[block] = self._fill(block)
            if len(self._blocks) > CACHED_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(block)
        return self._blocks[block]

    def _fill(self, block: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        start = block * BLOCK
        count = min(BLOCK, self.period - start)
        sources, numbers, taken = _C.continue_mixture(self.weights, start, self._states[block], count)
        if len(self._states) == block + 1:
            self._states.append(taken)
        return sources, numbers
