"""Answers of a round as micro batches: several share a row and do not see each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from llm_parallel.data.batch import Batch, Documents
from llm_parallel.data.pack import best_fit
from llm_parallel.parallel.layout import Layout


@dataclass(frozen=True)
class Text:
    """A prompt's tokens and an answer's; numbers for each token of the answer, by name."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    columns: Mapping[str, NDArray[np.float32]]

    @property
    def length(self) -> int:
        """Positions that it takes: the last token is a label only."""
        return len(self.prompt) + len(self.answer) - 1


@dataclass(frozen=True)
class Rows:
    """Which texts stand in which row, one behind the other."""

    texts: Sequence[Text]
    of_row: Sequence[Sequence[int]]
    length: int

    @classmethod
    def pack(cls, texts: Sequence[Text], length: int) -> Rows:
        """Best-fit decreasing; texts of the same length keep their order."""
        lengths = np.array([text.length for text in texts], np.int64)
        if not len(texts):
            return cls(texts, [], length)
        order = np.argsort(-lengths, kind="stable")
        row_of, sizes = best_fit(np.bincount(lengths, minlength=length + 1), length)
        rows: list[list[int]] = [[] for _ in sizes]
        for text, row in zip(order.tolist(), row_of.tolist()):
            rows[row].append(text)
        return cls(texts, rows, length)

    def batches(self, layout: Layout, dp_rank: int, device: torch.device, pad: int) -> list[Batch]:
        """This replica's micro batches; rows that only complete the number that the schedule needs weigh nothing."""
        return [self._batch(numbers, pad).to(device) for numbers in self.numbers(layout, dp_rank)]

    def _batch(self, numbers: range, pad: int) -> Batch:
        shape = len(numbers), self.length
        tokens, labels = np.full(shape, pad, np.int64), np.full(shape, pad, np.int64)
        weights = np.zeros(shape, np.float32)
        names = self.texts[0].columns if len(self.texts) else ()
        columns = {name: np.zeros(shape, np.float32) for name in names}
        starts = []
        for row, number in enumerate(numbers):
            at, begins = 0, []
            for text in self.of_row[number] if number < len(self.of_row) else ():
                ids = np.array([*self.texts[text].prompt, *self.texts[text].answer], np.int64)
                end = at + len(ids) - 1
                own = slice(end - len(self.texts[text].answer), end)
                tokens[row, at:end], labels[row, at:end], weights[row, own] = ids[:-1], ids[1:], 1.0
                for name, values in self.texts[text].columns.items():
                    columns[name][row, own] = values
                begins.append(at)
                at = end
            if at < self.length:
                begins.append(at)
            starts.append(torch.tensor(begins, dtype=torch.int32))
        return Batch(
            torch.from_numpy(tokens),
            torch.from_numpy(labels),
            torch.from_numpy(weights),
            Documents(tuple(starts)),
            {name: torch.from_numpy(column) for name, column in columns.items()},
        )

    def numbers(self, layout: Layout, dp_rank: int) -> list[range]:
        """Rows of each of this replica's micro batches."""
        unit = layout.micro_batch_size * layout.dp * (layout.pp if layout.vpp > 1 else 1)
        filled = max(-(-len(self.of_row) // unit), 1) * unit
        return list(layout.micro_batches(0, filled, dp_rank))

    def by_text(self, values: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Of numbers for every label, [rows, length], those of each text's answer."""
        found: list[NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(self.texts)
        for row, texts in enumerate(self.of_row):
            at = 0
            for text in texts:
                end = at + self.texts[text].length
                found[text] = values[row, end - len(self.texts[text].answer) : end]
                at = end
        return found
