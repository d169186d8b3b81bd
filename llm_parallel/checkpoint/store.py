"""Saves checkpoints whole or not at all, in the background; old ones are removed only when a newer one is complete."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from torch.distributed.checkpoint.api import CheckpointException

from llm_parallel.checkpoint.content import (
    ADAPTED,
    BASE,
    DISTRIBUTED,
    MODELS,
    SHARDING,
    adapted_models,
    described_models,
    metadata,
    training_state,
)
from llm_parallel.checkpoint.folders import LATEST_NAME, complete_checkpoints, folder_name, latest_checkpoint, step_of
from llm_parallel.checkpoint.integrity import damage, seal_folder
from llm_parallel.checkpoint.optimizer import allocate_moments, engines_of
from llm_parallel.checkpoint.run_file import write_config
from llm_parallel.checkpoint.sharded import divide, save_planner, split, write_common
from llm_parallel.checkpoint.state import TrainState
from llm_parallel.checkpoint.writer import BackgroundWrite, WriterKilled
from llm_parallel.config.tree import CheckpointConfig, RunConfig
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write, fsync_dir
from llm_parallel.parallel.engine import POLICY, Engine, Models, network_of
from llm_parallel.parallel.groups import Groups

SPARE_BYTES = 1 << 20


@dataclass(frozen=True)
class _Save:
    """A save in flight: the folder that is written, the name that it gets in the end, and the writer."""

    folder: Path
    final: Path
    write: BackgroundWrite


class WriterLost(UserError):
    """A checkpoint was not saved because the system killed a process that wrote it."""


class CheckpointStore:
    """The checkpoints of one run. Every process of the job holds one and calls the same methods at the same steps.

    A save writes ``.iter_….saving``, syncs every file, and renames it when all processes are done; then
    ``latest_checkpointed_iteration.txt`` is replaced, then old checkpoints go. A kill at any moment leaves the last
    good one. Raises UserError if the folder's disk is too small or full.
    """

    def __init__(self, folder: Path, settings: CheckpointConfig, config: RunConfig, groups: Groups) -> None:
        self.folder, self.settings, self.config, self.groups = folder, settings, config, groups
        self._saving: _Save | None = None
        self.saved_step = 0
        """Step of the newest checkpoint that this store has completed."""
        self.missing: str | None = None
        """What the newest save lacks, on rank 0: a sentence of ``write_config``."""

    def latest(self) -> tuple[Path | None, list[str]]:
        """The newest complete checkpoint whose files are as they were written, or None if there never was one, and a
        sentence for each damaged one, which is renamed, so that its step can be saved again.

        What killed saves left is ignored. Raises UserError if every checkpoint is damaged."""
        passed_over: list[str] = []
        while (newest := self._agreed_latest()) is not None:
            wrong = damage(newest, self.groups) if self.settings.verify else None
            if wrong is None:
                return newest, passed_over
            problem: Exception | None = None
            if self.groups.is_first_rank:
                try:
                    self._set_aside(newest)
                except OSError as error:
                    problem = UserError(
                        f"{newest} is damaged ({wrong}) and cannot be renamed ({error.strerror}); remove it"
                    )
            try:
                self._agree(problem)
            except CheckpointException as error:
                raise UserError(f"{newest} is damaged and cannot be renamed; rank 0 says why") from error
            passed_over.append(f"{newest.name} is damaged ({wrong}) and was set aside")
        if passed_over:
            raise UserError(
                f"no checkpoint of {self.folder} is left: {'; '.join(passed_over)}; give another run_dir, or remove "
                "the folder to begin anew"
            )
        return None, []

    def _agreed_latest(self) -> Path | None:
        """The newest checkpoint that rank 0 sees: on a shared file system others may see an older state of the
        folder."""
        newest = latest_checkpoint(self.folder) if self.groups.is_first_rank else None
        (number,) = self.groups.sum_over_world(float((step_of(newest) or 0) + 1) if newest else 0.0)
        return self.folder / folder_name(int(number) - 1) if number else None

    def _set_aside(self, damaged: Path) -> None:
        """Renames a damaged checkpoint and makes the one before it the latest."""
        number = len(list(self.folder.glob(f"{damaged.name}.damaged*")))
        damaged.rename(self.folder / f"{damaged.name}.damaged{number or ''}")
        fsync_dir(self.folder)
        before = complete_checkpoints(self.folder)
        if before:
            with atomic_write(self.folder / LATEST_NAME) as handle:
                handle.write(str(step_of(before[-1])))

    def save(self, models: Models, state: TrainState, *, blocking: bool = False) -> None:
        """Saves weights and optimizers of all models, and counters. In the background
        (``checkpoint.asynchronous``) this returns when the state is copied, and ``poll`` or ``wait`` completes it; a
        save in flight is completed first.

        A checkpoint of this step that ``latest_checkpointed_iteration.txt`` names is kept; one that it does not name is
        of steps that the run went back on, and is replaced."""
        self.wait()
        final = self.folder / folder_name(state.step)
        known = self.groups.is_first_rank and latest_checkpoint(self.folder) == final
        if any(self.groups.sum_over_world(float(known))):  # rank 0 decides: others may see an older state of the folder
            return
        self._save(final, models, state)
        if blocking:
            try:
                self.wait()
            except WriterLost:
                # No other save may follow. This process has the memory that a forked one found no more.
                self._save(final, models, state, here=True)
                self.wait()
        elif not self.settings.asynchronous:
            self.wait()

    def _save(self, final: Path, models: Models, state: TrainState, here: bool = False) -> None:
        saving = self._prepare(final, models, state)
        with self._cleaning_up(saving):
            for engine in engines_of(models).values():
                engine.parameters_up_to_date()
                allocate_moments(engine)
            self._saving = _Save(saving, final, self._begin(saving, models, here))

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
        save = self._saving
        with self._cleaning_up(save.folder):
            if not blocking and save.write.running():
                return
            self._collect(save)
            self._commit(save.folder, save.final)
        self._saving, self.saved_step = None, step_of(save.final) or 0

    def _collect(self, save: _Save) -> None:
        """Waits for all writers and writes the index, on rank 0."""
        problem: Exception | None = None
        try:
            save.write.finish()
        except OSError as error:
            problem = error
        self._agree(problem)

    def _prepare(self, final: Path, models: Models, state: TrainState) -> Path:
        """Makes an empty folder if the disk has room; all processes learn its name, or why not.

        The name is new every time: a writer that outlived its killed run must not write into the next one's save."""
        needed, free, problem = float(checkpoint_bytes(models)), 0.0, 0.0
        needed = self.groups.sum_over_world(needed)[0] + SPARE_BYTES
        mark = secrets.randbits(40) if self.groups.is_first_rank else 0
        saving = self.folder / f".{final.name}.{mark:010x}.saving"
        if self.groups.is_first_rank:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for leftover in self.folder.glob(".iter_*.saving"):
                    shutil.rmtree(leftover, ignore_errors=True)
                free = float(shutil.disk_usage(self.folder).free)
                if free >= needed:
                    saving.mkdir()
                    state.write(saving)
                    self.missing = write_config(saving, self.config)
            except OSError as error:
                shutil.rmtree(saving, ignore_errors=True)
                problem = float(error.errno or errno.EIO)
        free, problem, shared_mark = self.groups.sum_over_world(free, problem, float(mark))
        if problem:
            raise self._explained(OSError(int(problem), os.strerror(int(problem))))
        if free < needed:
            raise UserError(
                f"a checkpoint needs {needed / 2**20:.1f} MiB and {self.folder} has {free / 2**20:.1f} MiB free; "
                "make room, or lower checkpoint.keep_last"
            )
        return self.folder / f".{final.name}.{int(shared_mark):010x}.saving"

    def _begin(self, saving: Path, models: Models, here: bool) -> BackgroundWrite:
        """Writes the part that is the same on every process, divides the rest among them, and begins to write it."""
        described: dict[str, Any] = {}
        for model in models.values():
            described |= metadata(model)
        replicas = described.pop("dp_cp_group")
        described[DISTRIBUTED] = [name for name, model in models.items() if SHARDING in metadata(model)]
        if others := described_models(models):
            described[MODELS] = others
            described[ADAPTED] = adapted_models(models)
        if base := network_of(models[POLICY]).base:
            described[BASE] = {"path": base.path, "fingerprint": base.fingerprint}
        problem: Exception | None = None
        try:
            sharded, common = split(training_state(models, loading=False), described)
            if self.groups.is_first_rank:
                write_common(common, saving)
        except (OSError, RuntimeError) as error:
            problem = error
        self._agree(problem)  # before any process waits for another's plan
        if self.groups.mesh.dp * self.groups.mesh.cp > 1:
            divide(sharded, replicas)
        return BackgroundWrite(saving, save_planner(sharded), self.groups, here)

    def _agree(self, error: Exception | None) -> None:
        """Raises on every process if one has an error; that process raises the error itself."""
        failed, *_ = self.groups.sum_over_world(float(error is not None))
        if error is not None:
            raise error
        if failed:
            raise CheckpointException("write", {})

    def _commit(self, saving: Path, final: Path) -> None:
        """Makes a written checkpoint the latest, on rank 0; the others wait until it is."""
        problem: Exception | None = None
        if self.groups.is_first_rank:
            try:
                self._rename(saving, final)
            except OSError as error:
                problem = error
        self._agree(problem)

    def _rename(self, saving: Path, final: Path) -> None:
        save_config(CheckpointingConfig("torch_dist", 1), str(saving))
        seal_folder(saving)
        for path in [*saving.rglob("*"), saving]:
            if path.is_dir():
                fsync_dir(path)
            else:
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())
        if final.exists():  # incomplete, or of steps that the run went back on
            shutil.rmtree(final)
        saving.rename(final)
        fsync_dir(self.folder)
        with atomic_write(self.folder / LATEST_NAME) as handle:
            handle.write(str(step_of(final)))
        for old in self._expired(final):
            shutil.rmtree(old)

    def _expired(self, newest: Path) -> Iterator[Path]:
        """Old checkpoints that are not kept. Those after ``newest``, which a run that went back to an older one left,
        are not counted and not removed."""
        every, last = self.settings.keep_every_steps, step_of(newest) or 0
        past = [path for path in complete_checkpoints(self.folder) if (step_of(path) or 0) <= last]
        for path in past[: -self.settings.keep_last]:
            if not every or (step_of(path) or 0) % every:
                yield path

    @contextlib.contextmanager
    def _cleaning_up(self, saving: Path) -> Iterator[None]:
        """Removes what a failed save wrote, and reports a full disk in one sentence."""
        try:
            yield
        except (CheckpointException, CheckpointingException, OSError, RuntimeError) as error:
            self._saving = None
            explained = self._explained(error)
            if self.groups.is_first_rank:
                shutil.rmtree(saving, ignore_errors=True)
            raise explained from error

    def _explained(self, error: BaseException) -> Exception:
        text = f"{error} {getattr(error, 'failures', '')}"
        free = shutil.disk_usage(self.folder).free
        # After a failed write of common.pt torch reports only "iostream error", and after a short one "unexpected pos";
        # by then another writer's file may have been removed.
        number = getattr(error, "errno", None)
        quota = number == errno.EDQUOT or "quota exceeded" in text
        full = number == errno.ENOSPC or "No space left" in text or "unexpected pos" in text
        if quota or full or (isinstance(error, RuntimeError) and free < SPARE_BYTES):
            return UserError(
                f"{'your quota on ' * quota}the disk of {self.folder} became full while a checkpoint was saved "
                f"({free / 2**20:.0f} MiB free); the checkpoint before it is untouched: make room and start again"
            )
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            return UserError(f"a checkpoint cannot be saved in {self.folder}: {reason}; give another run_dir")
        if isinstance(error, WriterKilled):
            return WriterLost(
                f"a process that wrote a checkpoint into {self.folder} was killed, as the system does when memory runs "
                "out; the checkpoint before it is untouched: leave more memory free"
            )
        if isinstance(error, CheckpointException):
            if not error.failures and not self.groups.is_first_rank:
                return UserError(f"a checkpoint could not be saved in {self.folder}; rank 0 says why")
            return RuntimeError(f"a checkpoint could not be saved in {self.folder}: {text}")
        assert isinstance(error, Exception)
        return error


def checkpoint_bytes(models: Models) -> int:
    """About what this process's distinct share of a checkpoint takes: weights, and fp32 master and two moments of what
    is trained."""
    total = 0
    for model in models.values():
        network = network_of(model)
        numbers: list[Any] = [parameter for chunk in network.models for parameter in chunk.parameters()]
        numbers = [parameter for parameter in numbers if parameter.requires_grad or network.base is None]
        total += sum(parameter.numel() * parameter.element_size() for parameter in numbers)
        total += sum(parameter.numel() for parameter in numbers) * (12 if isinstance(model, Engine) else 0)
    mesh = network_of(models[POLICY]).groups.mesh
    return total // (mesh.dp * mesh.cp)
