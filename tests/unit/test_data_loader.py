"""The background reader of micro batches."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from llm_parallel.data.loader import MicroBatchLoader
from llm_parallel.data.samples import Sample

CPU = torch.device("cpu")
LENGTH = 8


class Counting:
    """Sample n is filled with n; remembers what was asked for."""

    def __init__(self, isolate: bool = False, fail_at: int | None = None) -> None:
        self.isolate, self.fail_at = isolate, fail_at
        self.asked: list[int] = []

    def sample(self, number: int) -> Sample:
        if number == self.fail_at:
            raise OSError(f"sample {number} cannot be read")
        self.asked.append(number)
        tokens = np.full(LENGTH, number, np.int64)
        weights = (np.arange(LENGTH) != number % LENGTH).astype(np.float32)
        return Sample(tokens, tokens + 1, weights, np.array([0, 1 + number % 3], np.int32))


def threads() -> int:
    return sum(thread.name == "micro-batches" for thread in threading.enumerate())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60  # a hang lasts for ever; a busy machine may take seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("isolate", [False, True])
def test_batches_hold_the_samples_asked_for_in_order(isolate: bool) -> None:
    samples = Counting(isolate)
    groups = [[4, 5], [0, 9], range(20, 22)]
    with MicroBatchLoader(samples, groups, CPU, 2) as loader:
        batches = list(loader)
    assert len(batches) == len(groups)
    for numbers, batch in zip(groups, batches):
        assert batch.tokens.dtype == batch.labels.dtype == torch.int64
        assert batch.weights.dtype == torch.float32
        assert batch.tokens.tolist() == [[number] * LENGTH for number in numbers]
        assert batch.labels.tolist() == [[number + 1] * LENGTH for number in numbers]
        assert batch.weights.tolist() == [[float(i != n % LENGTH) for i in range(LENGTH)] for n in numbers]
        if isolate:
            assert batch.documents is not None
            assert all(starts.dtype == torch.int32 for starts in batch.documents.starts)
            assert [starts.tolist() for starts in batch.documents.starts] == [[0, 1 + number % 3] for number in numbers]
        else:
            assert batch.documents is None


def test_reads_ahead_but_not_further_than_asked() -> None:
    samples = Counting()

    def endless() -> Iterator[list[int]]:
        number = 0
        while True:
            yield [number]
            number += 1

    with MicroBatchLoader(samples, endless(), CPU, 3) as loader:
        # Three are ready and a fourth waits for room.
        wait_until(lambda: len(samples.asked) == 4)
        time.sleep(0.05)
        assert samples.asked == [0, 1, 2, 3]
        assert next(loader).tokens[0, 0] == 0
        wait_until(lambda: len(samples.asked) == 5)


def test_error_of_the_reading_thread_reaches_the_consumer_in_its_place() -> None:
    loader = MicroBatchLoader(Counting(fail_at=2), [[0], [1], [2], [3]], CPU, 4)
    assert [int(next(loader).tokens[0, 0]) for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="sample 2 cannot be read"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)
    loader.close()
    assert threads() == 0


def test_error_of_the_numbers_reaches_the_consumer() -> None:
    def numbers() -> Iterator[list[int]]:
        yield [1]
        raise RuntimeError("no more numbers")

    with MicroBatchLoader(Counting(), numbers(), CPU) as loader, pytest.raises(RuntimeError, match="no more numbers"):
        list(loader)


def test_ends_with_its_numbers_and_stays_ended() -> None:
    loader = MicroBatchLoader(Counting(), [[1]], CPU)
    next(loader)
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(loader)
    loader.close()


def test_closing_ends_the_thread_even_if_nothing_was_read() -> None:
    before = threads()
    loader = MicroBatchLoader(Counting(), ([number] for number in range(10**9)), CPU, 1)
    assert threads() == before + 1
    loader.close()
    loader.close()
    assert threads() == before
    with pytest.raises(StopIteration):
        next(loader)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_arrive_on_the_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    with MicroBatchLoader(Counting(), [[1, 2]], device) as loader:
        batch = next(loader)
    assert batch.tokens.device == batch.labels.device == batch.weights.device == device
    assert batch.tokens.tolist() == [[1] * LENGTH, [2] * LENGTH]
