"""Saving: whole or not at all, in the background, old checkpoints removed only when a newer one is safe."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

from llm_parallel.checkpoint.content import metadata, training_state, write_config
from llm_parallel.checkpoint.folders import LATEST_NAME, complete_checkpoints, folder_name, latest_checkpoint, step_of
from llm_parallel.checkpoint.optimizer import allocate_moments
from llm_parallel.checkpoint.state import TrainState
from llm_parallel.config.tree import CheckpointConfig, RunConfig
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write, fsync_dir
from llm_parallel.parallel.groups import Groups
from llm_parallel.parallel.wrap import Engine

SPARE_BYTES = 1 << 20


class CheckpointStore:
    """The checkpoints of one run. Every process of the job holds one and calls the same methods at the same steps.

    A save writes ``.iter_….saving``, syncs every file, and renames it when all processes are done; then
    ``latest_checkpointed_iteration.txt`` is replaced, then old checkpoints go. A kill at any moment leaves the last
    good one. Raises UserError if the folder's disk is too small or full.
    """

    def __init__(self, folder: Path, settings: CheckpointConfig, config: RunConfig, groups: Groups) -> None:
        if importlib.util.find_spec("psutil") is None:
            # megatron-core's writer process dies without it and every rank waits until the collective times out.
            raise UserError("the package psutil is missing, which saving a checkpoint needs; pip install psutil")
        self.folder, self.settings, self.config, self.groups = folder, settings, config, groups
        use_forked_results_queue()
        self._queue = AsyncCallsQueue()
        self._saving: Path | None = None

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None. What killed saves left is not looked at."""
        return latest_checkpoint(self.folder)

    def save(self, engine: Engine, state: TrainState, *, blocking: bool = False) -> None:
        """Saves weights, optimizer and counters. In the background (``checkpoint.asynchronous``) this returns when the
        state is copied, and ``poll`` or ``wait`` completes it; a save in flight is completed first."""
        self.wait()
        final = self.folder / folder_name(state.step)
        if final in complete_checkpoints(self.folder):
            return
        saving = self.folder / f".{final.name}.saving"
        with self._cleaning_up(saving):
            self._prepare(saving, engine, state)
            engine.parameters_up_to_date()
            allocate_moments(engine)
            described = metadata(engine, self.groups)
            strategy = get_default_save_sharded_strategy("torch_dist")
            if self.groups.layout.dp * self.groups.layout.cp > 1:
                strategy = FullyParallelSaveStrategyWrapper(strategy, described["dp_cp_group"])
            asynchronous = self.settings.asynchronous and not blocking
            request = dist_checkpointing.save(
                training_state(engine, loading=False),
                str(saving),
                strategy,
                async_sharded_save=asynchronous,
                content_metadata={name: value for name, value in described.items() if name != "dp_cp_group"},
            )
            if request is None:
                self._commit(saving, final)
                return
            request.add_finalize_fn(lambda: self._commit(saving, final))
            self._saving = saving
            self._queue.schedule_async_request(request)

    def poll(self) -> None:
        """Completes a background save if all processes have written their part. One collective while one is in flight,
        nothing otherwise."""
        if self._saving is not None:
            self._finalize(blocking=False)

    def wait(self) -> None:
        """Completes a background save, however long it takes."""
        if self._saving is not None:
            self._finalize(blocking=True)

    def _finalize(self, blocking: bool) -> None:
        assert self._saving is not None
        with self._cleaning_up(self._saving):
            self._queue.maybe_finalize_async_calls(blocking=blocking)
        if self._queue.get_num_unfinalized_calls() == 0:
            self._saving = None

    def _prepare(self, saving: Path, engine: Engine, state: TrainState) -> None:
        """Makes an empty folder if the disk has room; all processes learn whether."""
        needed, free, problem = float(checkpoint_bytes(engine)), 0.0, 0.0
        needed, *_ = self.groups.sum_over_world(needed)
        if self.groups.is_first_rank:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for leftover in self.folder.glob(".iter_*.saving"):
                    shutil.rmtree(leftover)
                free = float(shutil.disk_usage(self.folder).free)
                if free > needed + SPARE_BYTES:
                    saving.mkdir()
                    state.write(saving)
                    write_config(saving, self.config)
            except OSError as error:
                problem = float(error.errno or errno.EIO)
        free, problem = self.groups.sum_over_world(free, problem)
        if problem:
            raise OSError(int(problem), os.strerror(int(problem)))
        if free <= needed + SPARE_BYTES:
            raise UserError(
                f"a checkpoint needs {needed / 2**30:.3f} GiB and {self.folder} has {free / 2**30:.3f} GiB free; make "
                "room, or lower checkpoint.keep_last"
            )

    def _commit(self, saving: Path, final: Path) -> None:
        """Makes a written checkpoint the latest. The other processes go on; nobody reads it before rank 0 is done."""
        if not self.groups.is_first_rank:
            return
        for path in [*saving.rglob("*"), saving]:
            if path.is_dir():
                fsync_dir(path)
            else:
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())
        if final.exists():  # incomplete: a complete one of this step is not saved again
            shutil.rmtree(final)
        saving.rename(final)
        fsync_dir(self.folder)
        with atomic_write(self.folder / LATEST_NAME) as handle:
            handle.write(str(step_of(final)))
        for old in self._expired(complete_checkpoints(self.folder)):
            shutil.rmtree(old)

    def _expired(self, complete: list[Path]) -> Iterator[Path]:
        every = self.settings.keep_every_steps
        for path in complete[: -self.settings.keep_last]:
            if not every or (step_of(path) or 0) % every:
                yield path

    @contextlib.contextmanager
    def _cleaning_up(self, saving: Path) -> Iterator[None]:
        """Removes what a failed save wrote, and says a full disk in one sentence."""
        try:
            yield
        except (CheckpointingException, OSError, RuntimeError) as error:
            self._saving = None
            if dist.get_rank() == 0:
                shutil.rmtree(saving, ignore_errors=True)
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> Exception:
        text = f"{error} {getattr(error, 'failures', '')}"
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text or "Errno 28" in text:
            free = shutil.disk_usage(self.folder).free
            return UserError(
                f"the disk of {self.folder} became full while a checkpoint was saved ({free / 2**20:.0f} MiB free); "
                "the checkpoint before it is untouched: make room and start again"
            )
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            return UserError(f"a checkpoint cannot be saved in {self.folder}: {reason}; give another run_dir")
        return error


def use_forked_results_queue() -> None:
    """Gives megatron-core's writer a plain queue in place of a manager process's.

    Writers are forked, so nothing has to be pickled; the manager would be spawned, which imports the main program again
    (5 to 15 s at the first save), and stay behind when its owner is killed.
    """
    if getattr(filesystem_async, "_results_queue", False) is None:
        filesystem_async._results_queue = multiprocessing.get_context("fork").Queue()


def checkpoint_bytes(engine: Engine) -> int:
    """About what this process's distinct share of a checkpoint takes: weights, and fp32 master, two moments."""
    layout = engine.groups.layout
    numbers: list[Any] = [parameter for model in engine.models for parameter in model.parameters()]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in numbers)
    optimizer = sum(parameter.numel() for parameter in numbers) * 12
    return (weights + optimizer) // (layout.dp * layout.cp)
