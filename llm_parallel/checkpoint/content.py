"""What a checkpoint holds: sharded weights and optimizer state, and the configuration beside them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject

from llm_parallel.checkpoint.optimizer import distributed_parts, padded_buckets
from llm_parallel.checkpoint.sharded import write_common
from llm_parallel.config.load import dump_config, load_config
from llm_parallel.config.tree import RunConfig
from llm_parallel.data.tokenizer import DECLARING_NAMES, JSON_NAME, MODEL_NAME
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write
from llm_parallel.parallel.groups import Groups
from llm_parallel.parallel.wrap import Engine

CONFIG_NAME = "config.yaml"
TOKENIZER_NAME = "tokenizer"
SHARDING = "distrib_optim_sharding_type"
END = "...\n"
"""YAML's mark of a document's end: a file cut short is often valid YAML too, with defaults for what is lost."""
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
WEIGHTS_ONLY = "weights_only"
"""In the metadata of a checkpoint without optimizer state, as ``convert`` makes."""


def metadata(engine: Engine | None, groups: Groups) -> dict[str, Any]:
    """How state is sharded. ``fully_reshardable`` is the one kind that loads under any other layout."""
    values: dict[str, Any] = {
        "dp_cp_group": groups.collection.dp_cp,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }
    if engine is not None and distributed_parts(engine):
        values[SHARDING] = "fully_reshardable"
    return values


def model_state(models: Sequence[Any], groups: Groups) -> dict[str, Any]:
    """Sharded weights of this process's model chunks, under the keys that megatron-core's optimizer looks for; without
    the extra state of Transformer Engine's modules, which ours do not have."""
    described = metadata(None, groups)
    return {
        "model" if len(models) == 1 else f"model{number}": {
            key: value
            for key, value in model.sharded_state_dict(metadata=described).items()
            if not isinstance(value, ShardedObject)
        }
        for number, model in enumerate(models)
    }


def training_state(engine: Engine, loading: bool) -> dict[str, Any]:
    """Sharded weights and optimizer state of this process."""
    state = model_state(engine.models, engine.groups)
    with padded_buckets(engine):
        state["optimizer"] = engine.optimizer.sharded_state_dict(
            dict(state), is_loading=loading, metadata=metadata(engine, engine.groups)
        )
    return state


def load_models(models: Sequence[Any], state: dict[str, Any]) -> None:
    """Puts loaded weights into the model chunks."""
    for number, model in enumerate(models):
        model.load_state_dict(state["model" if len(models) == 1 else f"model{number}"])


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
    """Copies a tokenizer under the names by which a folder's is found; not the weights that may lie beside it."""
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
        raise UserError(
            f"{folder} has no {CONFIG_NAME}, so it is no checkpoint of ours; give an iter_… folder of a run"
        )
    if not path.read_text(errors="replace").endswith(END):
        raise UserError(f"{path} is cut short (it does not end with '...'); give another checkpoint")
    config = load_config(path, notice=lambda _: None)
    tokenizer = folder / TOKENIZER_NAME
    if (tokenizer / "tokenizer.json").is_file() or any(tokenizer.glob("*.model")):
        config = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": str(tokenizer)})})
    return config
