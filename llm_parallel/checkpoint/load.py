"""Loading under any layout."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from llm_parallel.checkpoint.content import (
    SHARDING,
    WEIGHTS_ONLY,
    load_models,
    model_state,
    read_config,
    training_state,
)
from llm_parallel.checkpoint.folders import find_checkpoint
from llm_parallel.checkpoint.integrity import damage
from llm_parallel.checkpoint.optimizer import allocate_moments, distributed_parts, load_optimizer_state
from llm_parallel.checkpoint.sharded import COMMON_NAME, load_sharded, read_common
from llm_parallel.checkpoint.state import TrainState
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError
from llm_parallel.model.architecture import check_same_architecture
from llm_parallel.parallel.groups import Groups
from llm_parallel.parallel.wrap import Engine

# CheckpointException, in which every process learns of another's failure, is no Exception.
DAMAGE = (
    CheckpointException,
    CheckpointingException,
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    EOFError,
    IndexError,
    pickle.PickleError,
)


def load_checkpoint(
    path: str | Path,
    engine: Engine,
    config: RunConfig,
    *,
    load_optimizer: bool = True,
    changed: Callable[[list[str]], None] = lambda _: None,
) -> TrainState:
    """Loads weights, and optimizer state and counters unless told not to, whatever layout saved them.

    path: a run's folder, its ``checkpoints`` folder (the latest is taken) or one ``iter_…`` folder; changed: is told
    which of the optimizer's settings, as ``field old → new``, are no longer those of the checkpoint. Every process of
    the job calls this. Raises UserError if there is no checkpoint, it is of another model, or it is damaged.
    """
    folder = find_checkpoint(path)
    check_same_architecture(folder, read_config(folder).model, config.model)
    if not load_optimizer or _content(folder).get(WEIGHTS_ONLY):
        load_weights(folder, engine.models)
        engine.optimizer.reload_model_params()
        return TrainState()
    _check_optimizer_kind(folder, engine)
    allocate_moments(engine)
    loaded = _load(folder, training_state(engine, loading=True))
    load_models(engine.models, loaded)
    changed(load_optimizer_state(engine, loaded["optimizer"]))
    return TrainState.read(folder)


def load_weights(path: str | Path, models: Sequence[Any]) -> None:
    """Loads weights alone into this process's model chunks. Raises UserError as ``load_checkpoint``."""
    folder = find_checkpoint(path)
    check_same_architecture(folder, read_config(folder).model, models[0].run_config.model)
    load_models(models, _load(folder, model_state(models, models[0].groups)))


def refuse_damaged(path: str | Path, groups: Groups) -> None:
    """Raises UserError, in every process of the job, if files of a checkpoint are not as they were written."""
    folder = find_checkpoint(path)
    wrong = damage(folder, groups)
    if wrong is not None:
        raise UserError(f"{folder} is damaged ({wrong}); give another checkpoint")


def _load(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    try:
        return load_sharded(state, folder)
    except DAMAGE as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{folder} cannot be read ({reason[:300]}); it is damaged: remove it and the checkpoint before it is taken"
        ) from error


def _content(folder: Path) -> dict[str, Any]:
    """Metadata that says what a checkpoint holds."""
    try:
        common = read_common(folder)
    except DAMAGE as error:
        raise UserError(
            f"{folder / COMMON_NAME} is damaged; remove {folder} and the checkpoint before it is taken"
        ) from error
    return common.get("content_metadata") or {}


def _check_optimizer_kind(folder: Path, engine: Engine) -> None:
    saved, here = bool(_content(folder).get(SHARDING)), bool(distributed_parts(engine))
    if saved != here:
        raise UserError(
            f"parallel.distributed_optimizer was {str(saved).lower()} when {folder} was saved and is "
            f"{str(here).lower()} now; set it to {str(saved).lower()}, or checkpoint.load_optimizer=false"
        )
