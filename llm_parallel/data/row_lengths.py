"""How long rows are whose samples end in padding (``chat.packing: pad``): as long as the longest text of the micro
batch needs.

A row's loss does not depend on what stands behind its text, so this changes what a step costs and nothing else. The
length follows from the numbers of the samples and from the layout, so every process knows it without asking.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llm_parallel.config.tree import RunConfig
from llm_parallel.data.batch import Batch
from llm_parallel.data.pack import Packer
from llm_parallel.parallel.layout import Layout

GPU_UNIT = 64
"""Rows on a GPU are multiples of this: their products fill the tiles of tensor cores, and few sizes of tensors keep
torch's allocator from fragmenting."""


@dataclass(frozen=True)
class RowLengths:
    """filled: the tokens of a sample by its number, without padding; whole: the tokens of a sample with it; unit: what
    a length must be a multiple of; together: whether all micro batches of a pass have the same length, as stages of a
    pipeline exchange tensors of one shape."""

    filled: Callable[[int], int]
    whole: int
    unit: int
    together: bool

    @classmethod
    def of_run(cls, config: RunConfig, layout: Layout, packer: Packer, device_type: str) -> RowLengths | None:
        """Those of a run's samples; None if all rows are whole samples, as they are when several texts share one."""
        if config.chat.packing != "pad":
            return None
        unit = config.parallel.sequence_unit
        unit = math.lcm(unit, GPU_UNIT) if device_type == "cuda" else unit
        return cls(packer.filled, config.data.seq_length_tokens, unit, layout.pp > 1)

    def of(self, micro_batches: Sequence[range]) -> list[int]:
        """The length of the rows of each of one replica's micro batches, which are sample numbers."""
        longest = [max(self.filled(number) for number in numbers) for numbers in micro_batches]
        if self.together and longest:
            longest = [max(longest)] * len(longest)
        return [min(-(-length // self.unit) * self.unit, self.whole) for length in longest]

    def cut(self, batches: Sequence[Batch], micro_batches: Sequence[range]) -> list[Batch]:
        """One replica's micro batches of one pass without the padding that none of their rows needs."""
        return [batch.cut(length) for batch, length in zip(batches, self.of(micro_batches), strict=True)]
