"""The background writer: one forked process for each rank, which cannot hang the rank that waits for it."""

from __future__ import annotations

import os
import pickle
import queue
import struct
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from llm_parallel.checkpoint.integrity import seal_file

LENGTH = struct.Struct("<Q")


class ForkedResults:
    """One value from a forked child, in memory that both see, with the two methods of a queue that are called.

    A pipe (``multiprocessing.Queue``) holds 64 KiB and the parent reads only when the child has ended: the child of a
    model of thirty layers would never end.
    """

    def __init__(self) -> None:
        self._fd = os.memfd_create("checkpoint-results")

    def put(self, value: Any) -> None:
        """Stores ``value``; seen whole or, if the child is killed, not at all."""
        data = pickle.dumps(value)
        os.ftruncate(self._fd, 0)
        offset, view = LENGTH.size, memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, offset)
            offset, view = offset + written, view[written:]
        os.pwrite(self._fd, LENGTH.pack(len(data)), 0)

    def get_nowait(self) -> Any:
        """Takes the value. Raises queue.Empty if there is none."""
        header = os.pread(self._fd, LENGTH.size, 0)
        size = LENGTH.unpack(header)[0] if len(header) == LENGTH.size else 0
        if not size:
            raise queue.Empty
        data = bytearray()
        while len(data) < size:
            data += os.pread(self._fd, size - len(data), LENGTH.size + len(data))
        os.ftruncate(self._fd, 0)
        return pickle.loads(bytes(data))


def use_forked_results() -> None:
    """Gives megatron-core's writer ``ForkedResults`` in place of a manager process's queue.

    Writers are forked, so nothing has to be pickled; the manager would be spawned, which imports the main program again
    (5 to 15 s at the first save), and stay behind when its owner is killed.
    """
    if getattr(filesystem_async, "_results_queue", False) is None:
        filesystem_async._results_queue = ForkedResults()


def in_one_process(request: Any) -> Any:
    """megatron-core's request to write, done by threads of the writer.

    By itself the writer forks a process for each file and waits for their number to reach zero, for ever if the kernel
    kills one for want of memory.
    """
    if request.async_fn is None:  # nothing to write on this rank
        return request
    transforms, *_ = request.async_fn.args
    return request._replace(async_fn=partial(_write, transforms))


def _write(transforms: list[Any], _rank: int, buckets: list[Any], results: ForkedResults) -> None:
    outcomes: queue.Queue[Any] = queue.Queue()
    unfinished: queue.Queue[int] = queue.Queue()
    with ThreadPoolExecutor(len(buckets)) as pool:
        for number, bucket in enumerate(buckets):
            unfinished.put(number)
            pool.submit(
                FileSystemWriterAsync.write_preloaded_data, transforms, number, bucket, outcomes, unfinished, True
            )
    written = dict(outcomes.get_nowait() for _ in buckets)
    try:
        for path, *_ in buckets:
            seal_file(Path(path))
    except OSError as error:
        written[-1] = error
    failed = [outcome for outcome in written.values() if isinstance(outcome, Exception)]
    results.put(failed[0] if failed else written)
