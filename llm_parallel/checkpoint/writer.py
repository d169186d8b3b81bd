"""The background writer: one forked process for each rank, which cannot hang the rank that waits for it.

A forked process sees the tensors as they were when it was forked, so nothing is copied on a CPU. A process that the
kernel kills for want of memory is a failed save, which every rank learns of, and not a wait without end.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import queue
import struct
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from llm_parallel.checkpoint.integrity import seal_file
from llm_parallel.parallel.groups import Groups

LENGTH = struct.Struct("<Q")


class ForkedResults:
    """One value from a forked child, in memory that parent and child share.

    A pipe (``multiprocessing.Queue``) holds 64 KiB and the parent reads only when the child has ended: with a model of
    thirty layers the child would never end.
    """

    def __init__(self) -> None:
        self._fd = os.memfd_create("checkpoint-results")

    def put(self, value: Any) -> None:
        """Stores ``value``; the parent sees it whole or, if the child is killed, not at all."""
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

    def close(self) -> None:
        """Gives the memory back."""
        os.close(self._fd)


class WriterKilled(CheckpointException):
    """The system has killed a process that wrote, as it does when memory runs out. Raised on every process."""


class BackgroundWrite:
    """One checkpoint's tensors on their way to disk. Every process of the job makes one, asks ``running`` until it is
    False, and then calls ``finish``; all three are collective."""

    def __init__(self, folder: Path, planner: Any, groups: Groups, here: bool = False) -> None:
        """planner: torch's save planner, set up for what this process writes; ``here``: write in this process, before
        this returns."""
        self._groups, self._results = groups, ForkedResults()
        # Nothing is copied ahead: a forked process must not touch CUDA.
        self._storage = FileSystemWriter(folder, single_file_per_rank=True, thread_count=1, per_thread_copy_ahead=0)
        self._storage.set_up_storage_writer(groups.is_first_rank)
        local = planner.create_local_plan()
        plans: list[Any] = [None] * groups.mesh.world_size
        dist.gather_object(local, plans if groups.is_first_rank else None)
        self._metadata = planner.create_global_plan(plans)[1] if groups.is_first_rank else None
        # The storage names a file after the place of its plan in the list.
        mine = planner.finish_plan(self._storage.prepare_global_plan([local] * (groups.rank + 1))[groups.rank])
        self._process: Any = None
        if not mine.items:
            self._results.put([])
            return
        if groups.platform.is_cuda:
            planner = _OnHost(planner, mine.items)
        if here:
            _write(self._storage, mine, planner, self._results)
            return
        self._process = multiprocessing.get_context("fork").Process(
            target=_write, args=(self._storage, mine, planner, self._results)
        )
        self._process.start()

    def running(self) -> bool:
        """Whether a process is still writing."""
        alive = self._process is not None and self._process.is_alive()
        return bool(self._groups.sum_over_world(float(alive))[0])

    def finish(self) -> None:
        """Waits for this process's writer and writes the index ``.metadata``, on rank 0.

        Raises CheckpointException on every process if a writer failed (WriterKilled if nothing else went wrong), and
        OSError on rank 0 if the index cannot be written; the caller tells the other processes of that."""
        if self._process is not None:
            self._process.join()
            self._process.close()
        try:
            outcome = self._results.get_nowait()
        except queue.Empty:
            outcome = _Killed("the process that writes the checkpoint was killed")
        self._results.close()
        outcomes: list[Any] = [None] * self._groups.mesh.world_size
        dist.gather_object(outcome, outcomes if self._groups.is_first_rank else None)
        failed = {rank: result for rank, result in enumerate(outcomes) if isinstance(result, Exception)}
        other = [error for error in failed.values() if not isinstance(error, _Killed)]
        any_failed, any_other = self._groups.sum_over_world(float(bool(failed)), float(bool(other)))
        if any_failed:
            frames = {rank: (error, traceback.StackSummary()) for rank, error in failed.items()}
            raise (CheckpointException if any_other else WriterKilled)("write", frames)
        if self._groups.is_first_rank:
            self._storage.finish(self._metadata, outcomes)


class _Killed(RuntimeError):
    """A writer that left no answer."""


class _OnHost:
    """Hands out copies of tensors in host memory, made before training changes those on the GPU."""

    def __init__(self, planner: Any, items: list[Any]) -> None:
        values = {item.index: planner.resolve_data(item) for item in items}
        self._values = {
            index: value.detach().to("cpu", non_blocking=True) if isinstance(value, torch.Tensor) else value
            for index, value in values.items()
        }
        torch.cuda.synchronize()

    def resolve_data(self, item: Any) -> Any:
        """The copy of what a plan's item names."""
        return self._values[item.index]


def _write(storage: FileSystemWriter, plan: Any, planner: Any, results: ForkedResults) -> None:
    """Runs in a forked process, or at last in the one that trains. Objects that the parent holds on a GPU must not be
    collected in a forked one."""
    collected = gc.isenabled()
    gc.disable()
    try:
        written = storage.write_data(plan, planner).wait()
        for name in {result.storage_data.relative_path for result in written}:
            seal_file(Path(storage.path) / name)
    except Exception as error:
        written = error if isinstance(error, OSError) else RuntimeError(f"{type(error).__name__}: {error}")
    results.put(written)
    if collected:
        gc.enable()
