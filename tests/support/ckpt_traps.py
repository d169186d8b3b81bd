"""What the ranks of tests/distributed/test_checkpoint_traps.py do: each fault with and without its remedy."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch

from tests.support.ckpt_jobs import History, open_store
from tests.support.job import base_config, changed, open_engine, train_steps


def _steps(engine: Any) -> list[torch.Tensor]:
    return [values["step"] for part in engine.optimizer.chained_optimizers for values in part.optimizer.state.values()]


def shared_step_job(rank: int, world_size: int, folder: str, remedy: bool) -> tuple[int, int, set[float], str]:
    """Loads distributed optimizer state with the remedy or straight through megatron-core: parameters, distinct
    ``step`` tensors, their values after one more training step, and what was raised on the way."""
    from llm_parallel.checkpoint import load

    config = base_config()
    engine = open_engine(config, rank, world_size)
    raised: list[str] = []

    def straight(optimizer: Any, state: dict[str, Any]) -> None:
        for part in optimizer.chained_optimizers:
            tensors, kind = state.pop("param_state"), state.pop("param_state_sharding_type")
            part.load_state_dict(state)
            try:
                getattr(part, f"load_parameter_state_from_{kind}")(tensors)
            except KeyError as error:
                raised.append(f"KeyError: {error}")

    if not remedy:
        load.load_optimizer_state = straight
    step = load.load_checkpoint(folder, {"policy": engine}).step
    tensors = len({id(step) for step in _steps(engine)})
    train_steps(engine, config, step, 1)
    return len(_steps(engine)), tensors, {step.item() for step in _steps(engine)}, "".join(raised)


def fresh_state_job(rank: int, world_size: int, remedy: bool) -> str:
    """Describes the state of an optimizer that has made no step; "" or the name of the error."""
    from llm_parallel.checkpoint.content import training_state
    from llm_parallel.checkpoint.optimizer import allocate_moments

    engine = open_engine(base_config(), rank, world_size)
    if remedy:
        allocate_moments(engine)
    try:
        training_state({"policy": engine}, loading=False)
    except AssertionError as error:
        return type(error).__name__
    return ""


def without_remedies_job(rank: int, world_size: int, folder: str) -> History:
    """Trains four steps with small buckets and overlapped gathering, saves without each remedy and then with both,
    and trains on: ``stale``, ``padding`` and ``good`` in ``folder``."""
    from llm_parallel.checkpoint import content
    from llm_parallel.checkpoint.state import TrainState
    from llm_parallel.parallel.engine import Engine

    config = changed(base_config(), {"parallel.dp": world_size, "parallel.overlap": True, "parallel.bucket_size": 3000})
    engine = open_engine(config, rank, world_size)
    train_steps(engine, config, 0, 4)
    state = TrainState(step=4, guard={"losses": [1.0]})

    def save(name: str) -> None:
        open_store(engine, config, f"{folder}/{name}").save({"policy": engine}, state, blocking=True)

    up_to_date, padded_buckets = Engine.parameters_up_to_date, content.padded_buckets
    Engine.parameters_up_to_date = lambda self: None  # type: ignore[method-assign]
    save("stale")
    Engine.parameters_up_to_date = up_to_date  # type: ignore[method-assign]
    content.padded_buckets = lambda engine: contextlib.nullcontext()  # type: ignore[assignment]
    save("padding")
    content.padded_buckets = padded_buckets
    save("good")
    return train_steps(engine, config, 4, 5)


def weights_job(rank: int, world_size: int, folders: list[str]) -> list[float]:
    """Loads weights alone from each folder: the greatest differences from the first folder's."""
    from llm_parallel.checkpoint.load import load_checkpoint

    engine = open_engine(base_config(), rank, world_size)
    loaded = []
    for folder in folders:
        load_checkpoint(folder, {"policy": engine}, load_optimizer=False)
        loaded.append([parameter.detach().clone() for model in engine.models for parameter in model.parameters()])
    return [max((a - b).abs().max().item() for a, b in zip(loaded[0], other)) for other in loaded]


def _children() -> set[int]:
    """Living processes that this one started."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            number, _, rest = path.read_text().partition(" (")
            state, parent = rest.rpartition(") ")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z":
                found.add(int(number))
    return found


def left_processes_job(rank: int, world_size: int, folder: str) -> int:
    """How many processes the first save leaves behind."""
    from llm_parallel.checkpoint.state import TrainState

    engine = open_engine(base_config(), rank, world_size)
    before = _children()
    open_store(engine, base_config(), folder).save({"policy": engine}, TrainState(step=1), blocking=True)
    left = _children() - before
    for child in multiprocessing.active_children():
        child.kill()
    return len(left)
