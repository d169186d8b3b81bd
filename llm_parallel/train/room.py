"""Whether checkpoints and copies in memory will have room, before a run starts."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

from llm_parallel.checkpoint.folders import complete_checkpoints
from llm_parallel.config.rules import num_processes
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError
from llm_parallel.model.flops import adapter_parameters, parameter_count
from llm_parallel.train.beside import critic_adapter, critic_model

VOCABULARY_ROWS = 128
"""``model.mcore_config.padded_vocab_size`` rounds up to a multiple of it."""
TENSOR_BYTES = 2100
"""Bytes beside the numbers, in the file and in the index, of each tensor that a process writes: 1,760 to 2,170 in
checkpoints of the debug preset in fp32 and bf16, TP 1 and 2, DP 1 and 2."""
TENSORS_PER_LAYER, TENSORS_OUTSIDE = 6, 3
FACTORS = 8
"""Tensors of a layer's adapters: A and B of each of its four linears."""
COPY_STATE_BYTES = 1 << 20
"""Room for counters in each slot of a process's copy in memory (``llm_launch.copy_files.STATE_BYTES``)."""
MIB = 2.0**20


def checkpoint_bytes(config: RunConfig) -> int:
    """Size of one checkpoint: weights, two AdamW moments and, unless fp32 weights are updated in place, the optimizer's
    fp32 weights; of the adapters alone if there are any; and all of a critic. ``model.vocab_size`` is known."""
    others = sum(checkpoint_bytes(other) for other in also_trained(config))
    model, tp, adapter = config.model, config.parallel.tp, config.adapter
    weight = 4 if config.train.precision == "fp32" else 2
    masters = config.parallel.distributed_optimizer or config.train.precision == "bf16"
    sets, bytes_each = 3 + masters, weight + 8 + 4 * masters
    if adapter is not None:
        held = adapter_parameters(model, adapter) * bytes_each
        return held + TENSOR_BYTES * FACTORS * model.num_layers * sets * tp + others
    tensors = TENSORS_PER_LAYER * model.num_layers + TENSORS_OUTSIDE
    return num_parameters(config) * bytes_each + TENSOR_BYTES * tensors * sets * tp + others


def also_trained(config: RunConfig) -> list[RunConfig]:
    """For each model that the run trains beside its policy, a configuration of a run that trains it alone."""
    if config.trains != "ppo":
        return []
    critic = critic_model(config).model_copy(update={"tie_embeddings": True})  # it has no output projection
    method = config.method.model_copy(update={"kind": "reward"})
    return [config.model_copy(update={"model": critic, "method": method, "adapter": critic_adapter(config)})]


def num_parameters(config: RunConfig) -> int:
    """Parameters with the rows that pad the vocabulary."""
    multiple = math.lcm(VOCABULARY_ROWS, config.parallel.tp)
    rows = -(-(config.model.vocab_size or 0) // multiple) * multiple
    return parameter_count(config.model.model_copy(update={"vocab_size": rows})).total


def checkpoints_at_once(config: RunConfig) -> int:
    """Most checkpoints that the run folder holds at a time: those that are kept, and one that is written."""
    steps, settings = config.train.steps, config.checkpoint
    saves = -(-steps // settings.interval_steps) if settings.interval_steps else 1
    forever = steps // settings.keep_every_steps if settings.keep_every_steps else 0
    return min(saves, settings.keep_last + 1 + forever)


def check_room(config: RunConfig, notice: Callable[[str], None], runs: int = 1) -> None:
    """Raises UserError if the run folder cannot be written or has no room for a checkpoint (of each of ``runs`` such
    runs); ``notice`` is called if it has no room for as many as ``checkpoint`` asks for. Those that it holds count."""
    run_dir, settings = Path(config.run_dir), config.checkpoint
    here = existing_part(run_dir)
    if not here.is_dir() or not os.access(here, os.W_OK | os.X_OK):
        problem = "is read-only" if here.is_dir() else "is no folder"
        raise UserError(f"run_dir = {run_dir} cannot be written, since {here} {problem}; give a folder that can be")
    size, free = runs * checkpoint_bytes(config), free_bytes(here)
    of = "a checkpoint of this run takes" if runs == 1 else f"one checkpoint of each of the {runs} runs takes"
    if free < size:
        raise UserError(
            f"run_dir = {run_dir} has {shown(free)} of free disk, and {of} {shown(size)}; make room, or give a run_dir "
            "on a larger disk"
        )
    wanted = checkpoints_at_once(config) - len(complete_checkpoints(run_dir / "checkpoints"))
    if free < wanted * size:
        every = settings.keep_every_steps
        kept = f"checkpoint.keep_last={settings.keep_last}" + (
            f" and checkpoint.keep_every_steps={every}" if every else ""
        )
        notice(
            f"run_dir = {run_dir} has {shown(free)} of free disk, and {of} {shown(size)}, of which {kept} want "
            f"{wanted} more at a time: there is room for {free // size}; make room, or keep fewer"
        )


def copies_bytes(config: RunConfig, nodes: int) -> int:
    """What the copies in memory take on each of ``nodes`` nodes: two slots of fp32 weights and both moments of the
    node's share of the parameters and, if there are several nodes, as much for a partner."""
    shares = 2 if nodes > 1 else 1
    numbers = sum(num_parameters(one) for one in (config, *also_trained(config)))
    whole = 2 * (12 * numbers + COPY_STATE_BYTES * num_processes(config))
    return -(-whole * shares // nodes)


def check_copies(
    config: RunConfig, nodes: int, together: int, own: Path, notice: Callable[[str], None] = lambda _: None
) -> None:
    """Raises UserError if ``elastic.replica_dir`` of this node has no room for the copies of ``together`` of the run's
    ``nodes`` nodes (all of them, where they are agents on one machine). ``own``: the folder of this run's copies; what
    earlier ones take there is used again. ``notice`` is called if there is no room for two generations' copies, which
    a recovery needs for some steps."""
    if not config.elastic.replicate_every_steps or config.adapter is not None:
        return
    folder = Path(config.elastic.replica_dir)
    needed, free = copies_bytes(config, nodes) * together, free_bytes(existing_part(folder))
    free += sum(path.stat().st_blocks * 512 for path in own.rglob("*") if path.is_file())
    if free < needed:
        raise UserError(
            f"elastic.replica_dir = {folder} has room for {shown(free)}, and the copies of the training state on this "
            f"node take {shown(needed)}; name a larger memory file system or a local disk, or set "
            "elastic.replicate_every_steps=0"
        )
    if free < 2 * needed:
        notice(
            f"elastic.replica_dir = {folder} has room for {shown(free)}, and for a few steps a recovery needs "
            f"{shown(2 * needed)} (the copies that it starts from, and as much for new ones): after a fault this run "
            "writes a checkpoint before it can make memory copies again"
        )


def existing_part(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write to the file system of ``path``."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def shown(size: float) -> str:
    """A number of bytes for a sentence."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / MIB:,.1f} MiB"
