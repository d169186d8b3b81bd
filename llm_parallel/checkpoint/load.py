"""Loading under any layout."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from llm_parallel.checkpoint.content import (
    ADAPTED,
    BASE,
    DISTRIBUTED,
    MODELS,
    SHARDING,
    WEIGHTS_ONLY,
    adapted_models,
    load_weights_into,
    training_state,
    weights_state,
)
from llm_parallel.checkpoint.folders import find_checkpoint
from llm_parallel.checkpoint.integrity import damage
from llm_parallel.checkpoint.optimizer import (
    MOMENTS_ROUNDED,
    allocate_moments,
    apply_configured_settings,
    engines_of,
    moments_in_fp32,
    rounding_said,
    settings_changed,
    settings_in_use,
)
from llm_parallel.checkpoint.run_file import CONFIG_NAME, read_config
from llm_parallel.checkpoint.sharded import COMMON_NAME, load_sharded, read_common
from llm_parallel.checkpoint.state import TrainState
from llm_parallel.config.tree import ModelConfig
from llm_parallel.errors import UserError
from llm_parallel.model.architecture import check_same_architecture
from llm_parallel.parallel.engine import POLICY, Engine, Models, Network, network_of
from llm_parallel.parallel.groups import Groups
from llm_parallel.parallel.mcore_optimizer import distributed_parts, load_optimizer_state

# CheckpointException, by which every process learns of another's failure, is a BaseException and no Exception.
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
    models: Models,
    *,
    load_optimizer: bool = True,
    changed: Callable[[list[str]], None] = lambda _: None,
) -> TrainState:
    """Loads weights, and optimizer state and counters unless told not to, whatever layout saved them.

    path: a run's folder, its ``checkpoints`` folder (the latest is taken) or one ``iter_…`` folder; changed: called
    with the optimizer's settings that differ from the checkpoint's, as ``field old → new``. Without optimizer state, as
    after ``convert``, the policy alone is loaded. Every process of the job calls this. Raises UserError if there is no
    checkpoint, it holds other models, or it is damaged.
    """
    folder = find_checkpoint(path)
    policy = models[POLICY]
    content = content_of(folder)
    if not load_optimizer or content.get(WEIGHTS_ONLY):
        load_weights(folder, network_of(policy))
        if isinstance(policy, Engine):
            policy.optimizer.reload_model_params()
        return TrainState()
    unused = _check_models(folder, content, models)
    engines = engines_of(models)
    for engine in engines.values():
        allocate_moments(engine)
    settings: list[str] = []
    with moments_in_fp32(models, take=True):
        loaded = _load(folder, training_state(models, loading=True))
        for name, model in models.items():
            load_weights_into(network_of(model), loaded if name == POLICY else loaded[name])
        for name, engine in engines.items():
            load_optimizer_state(engine.optimizer, (loaded if name == POLICY else loaded[name])["optimizer"])
            saved = settings_in_use(engine)
            apply_configured_settings(engine)
            if name == POLICY:
                settings = settings_changed(saved, settings_in_use(engine))
    if MOMENTS_ROUNDED in settings:
        settings.append(rounding_said(engines[POLICY]))
    changed([*settings, *unused])
    return TrainState.read(folder)


def load_weights(path: str | Path, network: Network) -> None:
    """Loads the policy's weights alone into this process's model chunks. Raises UserError as ``load_checkpoint``."""
    folder = find_checkpoint(path)
    check_same_architecture(folder, read_config(folder).model, network.models[0].model_config)
    _check_adapters(folder, content_of(folder), network)
    load_weights_into(network, _load(folder, weights_state(network)))


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
            f"{folder} cannot be read ({reason[:300]}); it is damaged: remove it to load the one before"
        ) from error


def content_of(folder: Path) -> dict[str, Any]:
    """Metadata that says what a checkpoint holds. Raises UserError if it is damaged."""
    try:
        common = read_common(folder)
    except DAMAGE as error:
        raise UserError(
            f"{folder / COMMON_NAME} is damaged; remove {folder} to load the checkpoint before it"
        ) from error
    return common.get("content_metadata") or {}


def _check_adapters(folder: Path, content: dict[str, Any], network: Network) -> None:
    """Raises UserError if a checkpoint holds whole weights and the network adapters or the other way round, or adapters
    of another kind or of another model."""
    saved, here = content.get(BASE), network.base
    if saved is None and here is None:
        return
    if saved is None:
        raise UserError(
            f"{folder} holds whole weights, and this run trains adapters; give another run_dir, and the model to adapt "
            "as checkpoint.load"
        )
    theirs = read_config(folder).adapter
    if here is None or theirs is None:
        raise UserError(
            f"{folder} holds adapters alone, and this run has none; give the adapter section of {folder / CONFIG_NAME}"
        )
    for name in ("rank", "targets", "dora", "modules_to_save"):
        old, new = getattr(theirs, name), getattr(here.adapter, name)
        if set(old) != set(new) if isinstance(old, tuple) else old != new:
            old, new = (list(x) if isinstance(x, tuple) else x for x in (old, new))
            raise UserError(f"adapter.{name} is {new}, and {folder} holds adapters with {old}; make them the same")
    known = (saved["fingerprint"], here.fingerprint)
    if None not in known and known[0] != known[1]:
        raise UserError(
            f"checkpoint.load = {here.path} is another model than {saved['path']}, on which the adapters in {folder} "
            f"were trained (fingerprint {here.fingerprint} instead of {saved['fingerprint']}); give that model"
        )


def _check_models(folder: Path, content: dict[str, Any], models: Models) -> list[str]:
    """Raises UserError if a checkpoint lacks one of the models, or holds one of another architecture or another kind of
    optimizer. Returns which of its models are not used."""
    others = content.get(MODELS) or {}
    missing = [name for name in models if name != POLICY and name not in others]
    if missing:
        raise UserError(
            f"{folder} does not hold the {missing[0]} that this run trains; take a checkpoint of such a run, or "
            "checkpoint.load_optimizer=false to begin from the policy's weights"
        )
    for name, model in models.items():
        theirs = read_config(folder).model if name == POLICY else ModelConfig.model_validate(others[name])
        check_same_architecture(folder, theirs, network_of(model).models[0].model_config)
    _check_adapters(folder, content, network_of(models[POLICY]))
    for name in set(adapted_models(models)) ^ (set(content.get(ADAPTED, ())) & set(models)):
        kinds = ("adapters", "a whole model")
        held, wanted = kinds if name in content.get(ADAPTED, ()) else kinds[::-1]
        raise UserError(
            f"{folder} holds {held} of the {name}, and this run trains {wanted}; set method.critic.adapters as it was, "
            "or give another run_dir"
        )
    # A checkpoint from before this list existed holds the policy alone.
    distributed = content.get(DISTRIBUTED, [POLICY] if content.get(SHARDING) else [])
    for name, engine in engines_of(models).items():
        saved, here = name in distributed, bool(distributed_parts(engine.optimizer))
        if saved != here:
            of_model = "" if name == POLICY else f" of the {name}"
            raise UserError(
                f"parallel.distributed_optimizer{of_model} was {str(saved).lower()} when {folder} was saved and is "
                f"{str(here).lower()} now; set it to {str(saved).lower()}, or begin anew from its weights "
                f"with another run_dir, checkpoint.load={folder} and checkpoint.load_optimizer=false"
            )
    return [f"model {name} saved → not used" for name in others if name not in models]
