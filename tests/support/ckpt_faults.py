"""What the ranks of the tests of checkpoint safety do: being killed, filling the disk, loading what is wrong."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.support.ckpt_jobs import open_store
from tests.support.job import base_config, changed, open_engine, train_steps

EXACT = {
    "step": 2,
    "consumed_samples": 2**53 + 1,
    "consumed_tokens": 2**60 + 1,
    "num_skipped": 3,
    "consecutive_skips": 1,
    "guard": {"losses": [0.1 + 0.2, 1e-300, float("inf")], "grad_norms": []},
    "elapsed_s": 1.0 / 3.0,
}


def exact_state(**changes: Any) -> Any:
    """Counters that any rounding on the way to disk and back would change."""
    from llm_parallel.checkpoint.state import TrainState

    return TrainState(**(EXACT | changes))


def weights_sum(engine: Any) -> float:
    """A number that tells one set of weights from another."""
    return sum(
        parameter.detach().double().abs().sum().item() for model in engine.models for parameter in model.parameters()
    )


def first_save_job(rank: int, world_size: int, changes: dict[str, Any], folder: str) -> float:
    """Trains two steps and saves; returns the sum of the weights."""
    config = changed(base_config(), changes)
    engine = open_engine(config, rank, world_size)
    train_steps(engine, config, 0, 2)
    open_store(engine, config, folder).save({"policy": engine}, exact_state(), blocking=True)
    return weights_sum(engine)


def names_in(folder: str) -> list[str]:
    """Names in a folder, sorted, without what the tests put there."""
    return sorted(path.name for path in Path(folder).iterdir() if path.name != "filler")


def _die(*_: Any, **__: Any) -> None:
    os.killpg(0, signal.SIGKILL)  # this rank and its writer


def _before(owner: Any, name: str, action: Callable[..., None]) -> None:
    """Calls ``action`` before ``owner.name``."""
    real = getattr(owner, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        action(*args, **kwargs)
        return real(*args, **kwargs)

    setattr(owner, name, both)


def _moments() -> dict[str, tuple[Any, str]]:
    """What happens next in a save, by name: the function that is about to be called."""
    from torch.distributed.checkpoint import filesystem

    from llm_parallel.checkpoint import store
    from llm_parallel.checkpoint.state import TrainState

    return {
        "folder made": (TrainState, "write"),
        "before common.pt": (store, "training_state"),
        "common.pt written": (store, "save_planner"),
        "writing": (filesystem, "_write_item"),
        "all written": (store.CheckpointStore, "_collect"),
        ".metadata written": (store, "save_config"),
        "before rename": (Path, "rename"),
        "before latest": (store, "atomic_write"),
        "before old are removed": (store.CheckpointStore, "_expired"),
    }


MOMENTS = (
    "folder made",
    "common.pt written",
    "writing",
    "all written",
    ".metadata written",
    "before rename",
    "before latest",
    "before old are removed",
)


def killed_job(rank: int, world_size: int, folder: str, moment: str, asynchronous: bool) -> None:
    """Goes on from the checkpoint in ``folder`` and is killed at ``moment`` of the next save."""
    from llm_parallel.checkpoint.load import load_checkpoint

    os.setpgrp()
    config = changed(base_config(), {"parallel.dp": world_size, "checkpoint.asynchronous": asynchronous})
    engine = open_engine(config, rank, world_size)
    state = load_checkpoint(folder, {"policy": engine})
    train_steps(engine, config, state.step, 1)
    state.step += 1
    store = open_store(engine, config, folder)
    _before(*_moments()[moment], _die)
    store.save({"policy": engine}, state)
    for step in range(3, 5):
        train_steps(engine, config, step, 1)
        store.poll()
    store.wait()


def after_kill_job(rank: int, world_size: int, folder: str) -> tuple[Any, float, list[str], list[str]]:
    """Loads what a kill left and saves again: state and sum of the weights loaded, names before and after."""
    from llm_parallel.checkpoint.load import load_checkpoint

    engine = open_engine(base_config(), rank, world_size)
    state = load_checkpoint(folder, {"policy": engine})
    before, found = names_in(folder), weights_sum(engine)
    open_store(engine, base_config(), folder).save({"policy": engine}, exact_state(step=9), blocking=True)
    return state, found, before, names_in(folder)


def loads_job(rank: int, world_size: int, attempts: list[tuple[str, dict[str, Any], bool]]) -> list[str]:
    """What loading says for each (folder, changes of the configuration, with optimizer)."""
    from llm_parallel.checkpoint.load import load_checkpoint
    from llm_parallel.errors import UserError
    from llm_parallel.parallel.groups import close_groups

    answers, engine, current = [], None, None
    for folder, changes, with_optimizer in attempts:
        config = changed(base_config(), changes)
        if engine is None or changes != current:
            if engine is not None:
                close_groups(world=False)
            engine, current = open_engine(config, rank, world_size), changes
        try:
            state = load_checkpoint(folder, {"policy": engine}, load_optimizer=with_optimizer)
            answers.append(f"loaded step {state.step}, weights {weights_sum(engine)!r}")
        except UserError as error:
            answers.append(str(error))
    return answers


def weights_only_job(rank: int, world_size: int, folder: str) -> tuple[bool, bool, float]:
    """After a load without optimizer: whether the state and the moments are fresh, and the sum of the weights after a
    step of learning rate zero, which puts the optimizer's own copy of the weights into the model."""
    from llm_parallel.checkpoint.load import load_checkpoint
    from llm_parallel.checkpoint.state import TrainState

    config = changed(base_config(), {"optim.lr": 1e-30, "optim.min_lr": 1e-30, "optim.weight_decay": 0.0})
    engine = open_engine(config, rank, world_size)
    state = load_checkpoint(folder, {"policy": engine}, load_optimizer=False)
    moments = [part.optimizer.state for part in engine.optimizer.chained_optimizers]
    fresh = all(not values for part in moments for values in part.values())
    train_steps(engine, config, 0, 1)
    return state == TrainState(), fresh, weights_sum(engine)


FULL = {
    "from the start": ("folder made", 2 << 20),
    "before common.pt": ("before common.pt", 0),
    "in the writers": ("common.pt written", 300 << 10),
    "before .metadata": ("all written", 0),
    "before metadata.json": (".metadata written", 0),
    "before latest": ("before latest", 0),
    "never": ("before latest", 2 << 20),
}
"""Case: the moment at which the disk becomes full, and the bytes that are left."""


def _fill_late(folder: Path, leave_bytes: int, *_: Any, **__: Any) -> None:
    _fill(folder, leave_bytes)


def _fill(folder: Path, leave_bytes: int) -> None:
    """Writes a file that leaves so much of the disk free."""
    with (folder / "filler").open("ab", buffering=0) as handle:
        while (free := shutil.disk_usage(folder).free - leave_bytes) > 0:
            try:
                handle.write(bytes(min(free, 1 << 16)))
            except OSError:
                break


def full_disk_job(rank: int, world_size: int, folder: str, asynchronous: bool) -> dict[str, tuple[str, list[str], int]]:
    """Saves on a disk that becomes full at each of several moments, and at last with room; for each what was raised,
    the names that were left, and the step that is then loaded."""
    import torch.distributed as dist

    from llm_parallel.checkpoint.load import load_checkpoint

    config = changed(base_config(), {"parallel.dp": world_size, "checkpoint.asynchronous": asynchronous})
    engine = open_engine(config, rank, world_size)
    store = open_store(engine, config, folder)
    store.save({"policy": engine}, exact_state(), blocking=True)
    found = {}
    cases = {case: FULL[case] for case in (FULL if asynchronous else ("in the writers", "before latest", "never"))}
    for case, (moment, leave_bytes) in cases.items():
        if rank == 0 and case == "from the start":
            _fill(Path(folder), leave_bytes)
        owner, name = _moments()[moment]
        real = getattr(owner, name)
        if rank == 0:
            _before(owner, name, partial(_fill_late, Path(folder), leave_bytes))
        said = "saved"
        try:
            store.save({"policy": engine}, exact_state(step=3 + list(FULL).index(case)))
            train_steps(engine, config, 0, 1)
            store.poll()
            store.wait()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        setattr(owner, name, real)
        dist.barrier()
        found[case] = (said, names_in(folder), load_checkpoint(folder, {"policy": engine}).step)
        dist.barrier()
        if rank == 0:
            (Path(folder) / "filler").unlink(missing_ok=True)
        dist.barrier()
    return found


def kept_job(rank: int, world_size: int, folder: str) -> list[tuple[list[str], int, int]]:
    """Saves steps 1 to 7, goes back to step 3 by hand, saves 4 and then 6 anew; after each phase the checkpoints, the
    latest's step, and its ``num_skipped``, which is 1 for what was saved after going back."""
    from llm_parallel.checkpoint.folders import LATEST_NAME
    from llm_parallel.checkpoint.state import TrainState

    config = changed(
        base_config(),
        {
            "checkpoint.keep_last": 2,
            "checkpoint.keep_every_steps": 3,
            "checkpoint.interval_steps": 1,
            "model.num_layers": 1,
        },
    )
    engine = open_engine(config, rank, world_size)
    store, found = open_store(engine, config, folder), []

    def note() -> None:
        latest, passed_over = store.latest()
        assert not passed_over
        assert latest is not None
        state = TrainState.read(latest)
        found.append((sorted(path.name for path in Path(folder).glob("iter_*")), state.step, state.num_skipped))

    for step in range(1, 8):
        store.save({"policy": engine}, TrainState(step=step))
    store.wait()
    note()
    (Path(folder) / LATEST_NAME).write_text("3")
    for step in (4, 6):
        store.save({"policy": engine}, TrainState(step=step, num_skipped=1), blocking=True)
        note()
    return found


def writer_killed_job(rank: int, world_size: int, folder: str) -> tuple[str, list[str], list[str]]:
    """The kernel kills every writer of the last rank, as it does when memory runs out; then the run ends."""
    from torch.distributed.checkpoint import filesystem

    config = changed(base_config(), {"parallel.dp": world_size})
    engine = open_engine(config, rank, world_size)
    store = open_store(engine, config, folder)
    trains = os.getpid()
    if rank == world_size - 1:
        _before(
            filesystem,
            "_write_item",
            lambda *_: os.kill(os.getpid(), signal.SIGKILL) if os.getpid() != trains else None,
        )
    store.save({"policy": engine}, exact_state())
    try:
        store.wait()
        said = "saved"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    torch.distributed.barrier()
    before = names_in(folder)
    store.save({"policy": engine}, exact_state(step=7), blocking=True)
    return said, before, names_in(folder)
