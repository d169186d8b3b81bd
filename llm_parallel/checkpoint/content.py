"""What a checkpoint holds: sharded weights and optimizer state, and the configuration beside them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

from llm_parallel.checkpoint.sharded import write_common
from llm_parallel.config.load import dump_config, load_config
from llm_parallel.config.tree import RunConfig
from llm_parallel.data.tokenizer import DECLARING_NAMES, JSON_NAME, MODEL_NAME
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write
from llm_parallel.model.tensors import ADAPTER_MARK
from llm_parallel.parallel.engine import POLICY, Engine, Models, Network, network_of
from llm_parallel.parallel.mcore_optimizer import distributed_parts, padded_buckets

CONFIG_NAME = "config.yaml"
TOKENIZER_NAME = "tokenizer"
SHARDING = "distrib_optim_sharding_type"
END = "...\n"
"""YAML's end-of-document mark, the last line of the file: without it, a file that was cut short would often be read as
valid YAML, with defaults for the lost fields."""
WEIGHT_FILES = (
    "*.safetensors*",
    "*.bin*",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx*",
    ".git",
    "*.distcp",
)
DISTRIBUTED = "distributed_optimizers"
"""In the metadata: the models whose optimizer is distributed, by name."""
BASE = "base"
"""Key of the metadata of a checkpoint that holds adapters alone: path and fingerprint of the weights under them."""
MODELS = "models"
"""Key of the metadata for the models that a checkpoint holds besides the policy, by name."""
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
    the adapters alone if it has any. The extra state of Transformer Engine's modules is left out, since ours have
    none."""
    described, models = metadata(network), network.models
    mark = "" if network.base is None else ADAPTER_MARK
    return {
        "model" if len(models) == 1 else f"model{number}": {
            key: value
            for key, value in model.sharded_state_dict(metadata=described).items()
            if not isinstance(value, ShardedObject) and mark in key
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
        with padded_buckets(model.optimizer):
            state["optimizer"] = model.optimizer.sharded_state_dict(
                dict(state), is_loading=loading, metadata=metadata(model)
            )
    return state


def described_models(models: Models) -> dict[str, Any]:
    """What a checkpoint says about the models that it holds besides the policy, whose description is its run file."""
    return {
        name: network_of(model).models[0].model_config.model_dump() for name, model in models.items() if name != POLICY
    }


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


def write_config(folder: Path, config: RunConfig) -> None:
    """Writes configuration and tokenizer, so that the checkpoint alone suffices to generate and convert."""
    if config.data.tokenizer is not None and Path(config.data.tokenizer).exists():
        _copy_tokenizer(Path(config.data.tokenizer), folder / TOKENIZER_NAME)
    with atomic_write(folder / CONFIG_NAME) as handle:
        handle.write(dump_config(config) + END)


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Copies a tokenizer under the file names by which ``load_tokenizer`` finds it in a folder; weights beside it are
    not copied."""
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*WEIGHT_FILES))
        return
    target.mkdir(exist_ok=True)
    if source.suffix == ".json":
        shutil.copy2(source, target / JSON_NAME)
        for name in DECLARING_NAMES:
            if (source.parent / name).is_file():
                shutil.copy2(source.parent / name, target / name)
    else:
        shutil.copy2(source, target / MODEL_NAME)


def read_config(folder: Path) -> RunConfig:
    """Configuration of a checkpoint folder (``iter_…``), with the tokenizer that lies beside it.

    Raises UserError if there is none or it is cut short."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"{folder} has no {CONFIG_NAME}, so it is not a checkpoint; give an iter_… folder of a run")
    if not path.read_text(errors="replace").endswith(END):
        raise UserError(f"{path} is cut short (it does not end with '...'); give another checkpoint")
    config = load_config(path, notice=lambda _: None)
    tokenizer = folder / TOKENIZER_NAME
    if (tokenizer / "tokenizer.json").is_file() or any(tokenizer.glob("*.model")):
        config = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": str(tokenizer)})})
    return config
