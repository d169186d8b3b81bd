"""What the ranks of checkpoint tests do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.job import base_config, changed, open_engine, train_steps

History = list[tuple[float, float]]


def open_store(engine: Any, config: Any, folder: str) -> Any:
    """A store in ``folder`` for a test's engine."""
    from llm_parallel.checkpoint.store import CheckpointStore

    return CheckpointStore(Path(folder), config.checkpoint, config, engine.groups)


def save_job(
    rank: int, world_size: int, changes: dict[str, Any], folder: str, before: int = 4, after: int = 5
) -> History:
    """Trains ``before`` steps, saves, and trains on; returns what the undisturbed run finds after the save."""
    from llm_parallel.checkpoint.state import TrainState

    config = changed(base_config(), changes)
    engine = open_engine(config, rank, world_size)
    store = open_store(engine, config, folder)
    train_steps(engine, config, 0, before)
    store.save({"policy": engine}, TrainState(step=before, consumed_samples=before * 8, guard={"losses": [1.0]}))
    history = []
    for step in range(before, before + after):
        history += train_steps(engine, config, step, 1)
        store.poll()
    store.wait()
    return history


def load_job(rank: int, world_size: int, changes: dict[str, Any], folder: str, after: int = 5) -> History:
    """Loads into freshly built and then scrambled weights, and trains on."""
    from llm_parallel.checkpoint.load import load_checkpoint

    config = changed(base_config(), changes)
    engine = open_engine(config, rank, world_size)
    for model in engine.models:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.37)
    engine.optimizer.reload_model_params()
    state = load_checkpoint(folder, {"policy": engine})
    assert state.guard == {"losses": [1.0]}
    return train_steps(engine, config, state.step, after)
