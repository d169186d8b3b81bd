"""megatron-core's description of sharded state, and torch's distributed checkpoint format.

megatron-core says which part of which whole tensor a process holds. The saving and loading around that are ours, on
``torch.distributed.checkpoint``: megatron-core 0.19 deprecates its own writer and its ``common.pt``, and stores what
is not sharded where 0.16 cannot find it (DECISIONS 50). So every supported version writes and reads one format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException, maybe_load_config
from megatron.core.dist_checkpointing.dict_utils import merge
from megatron.core.dist_checkpointing.mapping import apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity

from llm_parallel.checkpoint.index import safe_indices
from llm_parallel.files import refuse_outside

COMMON_NAME = "common.pt"
"""File of what is the same on every process: the optimizer's settings, and a description of the content."""


def split(state: dict[str, Any], content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a state to save into its sharded part and the part that is the same on every process, to which ``content``
    is added.

    Collective: checks that the processes' shards cover every tensor exactly once. Raises CheckpointingException."""
    return save_preprocess({**state, "content_metadata": content})


def write_common(common: dict[str, Any], folder: Path) -> None:
    """Writes the part that is the same on every process. One process calls this. Raises OSError or, if the disk is
    full, the RuntimeError that ``torch.save`` makes of it."""
    torch.save(common, folder / COMMON_NAME)


def read_common(folder: Path) -> dict[str, Any]:
    """Reads what ``write_common`` wrote. Nothing but tensors and plain values is unpickled. Raises UserError if it is a
    link that leads out of the folder."""
    refuse_outside(folder / COMMON_NAME, folder)
    return torch.load(folder / COMMON_NAME, map_location="cpu", weights_only=True)


def divide(sharded: dict[str, Any], replicas: Any) -> None:
    """Divides among the processes of the group ``replicas`` the writing of shards that several of them hold.
    Collective."""
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1)
    FullyParallelSaveStrategyWrapper(strategy, replicas).apply_saving_parallelization(sharded)


def save_planner(sharded: dict[str, Any]) -> MCoreSavePlanner:
    """The planner of torch's distributed checkpoint for the shards that this process writes."""
    renamed, *_ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(mcore_to_pyt_state_dict(renamed, False), is_coordinator=torch.distributed.get_rank() == 0)
    return planner


def load_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fills a described state from a checkpoint of whatever layout.

    Collective. Raises CheckpointingException or CheckpointException if tensors are missing or of other shapes, and
    whatever damaged files make torch raise."""
    if maybe_load_config(str(folder)) is None:
        raise CheckpointingException(f"{folder} has no metadata.json")
    sharded, not_saved, factories = load_preprocess(state)
    loaded = read_common(folder)
    merge(loaded, not_saved)
    sharded, _ = extract_sharded_base(sharded)
    validate_sharding_integrity(determine_global_metadata(sharded)[1])
    with safe_indices(folder):
        merge(loaded, TorchDistLoadShardedStrategy().load(sharded, folder))
    return apply_factory_merges(loaded, factories)
