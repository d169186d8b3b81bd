"""What a checkpoint holds: sharded weights and optimizer state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

from llm_parallel.checkpoint.optimizer import moments_in_fp32
from llm_parallel.checkpoint.sharded import write_common
from llm_parallel.model.vocabulary_adapters import is_trained
from llm_parallel.parallel.engine import POLICY, Engine, Models, Network, network_of
from llm_parallel.parallel.mcore_optimizer import distributed_parts, padded_buckets

SHARDING = "distrib_optim_sharding_type"
DISTRIBUTED = "distributed_optimizers"
"""In the metadata: the models whose optimizer is distributed, by name."""
BASE = "base"
"""Key of the metadata of a checkpoint that holds adapters alone: path and fingerprint of the weights under them."""
MODELS = "models"
"""Key of the metadata for the models that a checkpoint holds besides the policy, by name."""
ADAPTED = "adapted"
"""In the metadata: names of the models besides the policy of which adapters alone are held."""
WEIGHTS_ONLY = "weights_only"
"""Key of the metadata that marks a checkpoint without optimizer state, as ``convert`` writes it."""


def metadata(model: Network | Engine) -> dict[str, Any]:
    """How a model's state is sharded. ``fully_reshardable`` is the one kind that loads under any other layout."""
    values: dict[str, Any] = {
        "dp_cp_group": network_of(model).groups.collection.dp_cp,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }
    if isinstance(model, Engine) and distributed_parts(model.optimizer):
        values[SHARDING] = "fully_reshardable"
    return values


def weights_state(network: Network) -> dict[str, Any]:
    """Sharded weights of this process's chunks of one model, under the keys that megatron-core's optimizer looks for;
    of a model with adapters those alone, and what is trained beside them. The extra state of Transformer Engine's
    modules is left out, since ours have none."""
    described, models, base = metadata(network), network.models, network.base
    return {
        "model" if len(models) == 1 else f"model{number}": {
            key: value
            for key, value in model.sharded_state_dict(metadata=described).items()
            if not isinstance(value, ShardedObject) and (base is None or is_trained(key, base.whole))
        }
        for number, model in enumerate(models)
    }


def training_state(models: Models, loading: bool) -> dict[str, Any]:
    """Sharded weights of all models, and the state of the optimizers that they have.

    The policy's state has the same keys as in a checkpoint that holds only the policy. That of another model is a
    dictionary under the model's name, and the keys of its tensors begin with that name."""
    state: dict[str, Any] = {}
    for name, model in models.items():
        part = _state_of(model, loading)
        if name == POLICY:
            state |= part
        else:
            add_prefix_for_sharding(part, f"{name}.")
            state[name] = part
    return state


def _state_of(model: Network | Engine, loading: bool) -> dict[str, Any]:
    state = weights_state(network_of(model))
    if isinstance(model, Engine):
        with moments_in_fp32({POLICY: model}, take=False), padded_buckets(model.optimizer):
            state["optimizer"] = model.optimizer.sharded_state_dict(
                dict(state), is_loading=loading, metadata=metadata(model)
            )
    return state


def described_models(models: Models) -> dict[str, Any]:
    """What a checkpoint says about the models that it holds besides the policy, whose description is its run file."""
    return {
        name: network_of(model).models[0].model_config.model_dump() for name, model in models.items() if name != POLICY
    }


def adapted_models(models: Models) -> list[str]:
    """The models besides the policy that have adapters."""
    return [name for name, model in models.items() if name != POLICY and network_of(model).base is not None]


def load_weights_into(network: Network, state: dict[str, Any]) -> None:
    """Puts loaded weights into a model's chunks, or loaded adapters beside them."""
    for number, model in enumerate(network.models):
        loaded = state["model" if len(network.models) == 1 else f"model{number}"]
        unknown = model.load_state_dict(loaded, strict=network.base is None).unexpected_keys
        assert not unknown, unknown


def write_weights_only_parts(folder: Path) -> None:
    """Writes the small files that megatron-core expects beside tensors: the format, and that there is no optimizer."""
    write_common({"content_metadata": {WEIGHTS_ONLY: True}}, folder)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
