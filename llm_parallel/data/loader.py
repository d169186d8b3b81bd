"""Micro batches: samples stacked into tensors on the training device by a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from llm_parallel.data.batch import Batch, Documents
from llm_parallel.data.samples import Sample

POLL_S = 0.1
"""Seconds after which a waiting thread checks again whether the loader was closed."""


class Samples(Protocol):
    """What the loader reads from; see ``samples.SampleSource``."""

    isolate: bool

    def sample(self, number: int) -> Sample:
        """Sample ``number``, from 0."""


class MicroBatchLoader(Iterator[Batch]):
    """Iterates over the micro batches whose sample numbers ``numbers`` lists, reading ``prefetch`` of them ahead.

    Tensors are on ``device``; for CUDA they are staged in pinned memory and copied without blocking. An exception in
    the reading thread is raised by ``next`` after the batches that were read before it. Call ``close``, or use it in
    ``with``.
    """

    def __init__(
        self, samples: Samples, numbers: Iterable[Sequence[int]], device: torch.device, prefetch: int = 2
    ) -> None:
        self._samples, self._numbers, self._device = samples, numbers, torch.device(device)
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(max(prefetch, 1))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="micro-batches", daemon=True)
        self._thread.start()

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, Batch):
            return self._on_device(item)
        self._stop.set()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Ends the reading thread. Closing twice does no harm."""
        self._stop.set()
        with suppress(queue.Empty):
            while True:  # make room, so that a waiting put of the thread returns at once
                self._ready.get_nowait()
        self._thread.join()

    def __enter__(self) -> MicroBatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                # A new thread's current device is 0, and pinning would open a context there on every rank.
                torch.cuda.set_device(self._device)
            for numbers in self._numbers:
                batch = self._stack([self._samples.sample(number) for number in numbers])
                self._put(replace(batch, numbers=torch.tensor(numbers)))
                if self._stop.is_set():
                    return
            self._put(None)
        except BaseException as error:  # whatever it is, the consumer must hear of it instead of waiting for ever
            self._put(error)

    def _put(self, item: Batch | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=POLL_S)
                return
            except queue.Full:
                continue

    def _stack(self, samples: Sequence[Sample]) -> Batch:
        documents = None
        if self._samples.isolate:
            documents = Documents(tuple(torch.from_numpy(sample.document_starts) for sample in samples))
        tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
        labels = torch.from_numpy(np.stack([sample.labels for sample in samples]))
        weights = torch.from_numpy(np.stack([sample.weights for sample in samples]))
        columns = {
            name: torch.from_numpy(np.stack([sample.columns[name] for sample in samples]))
            for name in samples[0].columns
        }
        facts = {name: by_document([sample.facts[name] for sample in samples]) for name in samples[0].facts}
        if self._device.type == "cuda":
            tokens, labels, weights = tokens.pin_memory(), labels.pin_memory(), weights.pin_memory()
            columns = {name: column.pin_memory() for name, column in columns.items()}
            facts = {name: values.pin_memory() for name, values in facts.items()}
        beside = [sample.mismatched for sample in samples if sample.mismatched is not None]
        mismatched = self._stack(beside) if beside else None
        return Batch(tokens, labels, weights, documents, columns, facts, mismatched=mismatched)

    def _on_device(self, batch: Batch) -> Batch:
        return batch if self._device.type == "cpu" else batch.to(self._device)


def by_document(rows: Sequence[NDArray[np.float32]]) -> torch.Tensor:
    """Numbers of the documents of each row as fp32 [b, d], 0 where a row has fewer documents than another."""
    found = np.zeros((len(rows), max(map(len, rows))), np.float32)
    for place, row in enumerate(rows):
        found[place, : len(row)] = row
    return torch.from_numpy(found)
