"""One process's part of a model (``Network``), and the same with gradients and an optimizer (``Engine``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.module import Float16Module

from llm_parallel.config.tree import OptimConfig, ParallelConfig
from llm_parallel.config.tree_tune import AdapterConfig
from llm_parallel.parallel.groups import Groups
from llm_parallel.parallel.mcore_optimizer import Replica, SoleReplica, build_optimizer, place_shards, update
from llm_parallel.parallel.platform import Platform
from llm_parallel.parallel.stages import Stages


@dataclass
class FrozenBase:
    """The weights under a model's adapters. ``whole``: names of those that are trained beside the adapters; ``path``
    and ``fingerprint``: where they were loaded from, and what tells others from them; None until they are loaded."""

    adapter: AdapterConfig
    whole: frozenset[str] = frozenset()
    path: str | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class Network:
    """One process's part of a model.

    chunks: what the pipeline schedule runs, the models within megatron-core's wrappers; models: the same without
    wrappers, one for each virtual stage; before_micro_batch: called before each forward; base: the frozen weights, if
    the model has adapters, else None.
    """

    chunks: Sequence[Any]
    models: Sequence[Any]
    groups: Groups
    stages: Stages
    before_micro_batch: list[Callable[[], None]] = field(default_factory=list)
    base: FrozenBase | None = None

    @classmethod
    def of(cls, models: Sequence[Any], groups: Groups, stages: Stages, base: FrozenBase | None = None) -> Network:
        """Freshly built model chunks, wrapped for their dtype."""
        chunks = [Float16Module(model.config, model) if model.config.bf16 else model for model in models]
        return cls(chunks, models, groups, stages, base=base)

    @property
    def config(self) -> Any:
        """megatron-core's TransformerConfig of the model."""
        return self.models[0].config

    def set_training(self, training: bool) -> None:
        """Switches between training and evaluation mode."""
        for chunk in self.chunks:
            chunk.train(training)


@dataclass(frozen=True)
class Engine:
    """A network and its optimizer.

    optimizer: megatron-core's (chained) optimizer; overlap: whether communication overlaps compute; before_reduction:
    called when this process has computed its gradient and is about to wait for the other replicas; after_step: called
    when the weights have been updated.
    """

    network: Network
    optimizer: Any
    overlap: bool
    before_reduction: list[Callable[[], None]] = field(default_factory=list)
    after_step: list[Callable[[], None]] = field(default_factory=list)

    @property
    def chunks(self) -> Sequence[Any]:
        """The network's wrapped chunks, with gradient buffers."""
        return self.network.chunks

    @property
    def models(self) -> Sequence[Any]:
        """The network's chunks without wrappers."""
        return self.network.models

    @property
    def groups(self) -> Groups:
        """The network's process groups."""
        return self.network.groups

    def zero_grad(self) -> None:
        """Clears all gradient buffers before a step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self, max_norm: float, total_norm: float) -> None:
        """Updates the weights by gradients scaled so that their global norm, ``total_norm``, is at most ``max_norm``
        (0: not scaled)."""
        update(self.optimizer, max_norm / (total_norm + 1e-6) if 0.0 < max_norm < total_norm else 1.0)
        for hook in list(self.after_step):
            hook()

    def parameters_up_to_date(self) -> None:
        """Waits for parameters that are still being gathered; with overlapped gathering the last step's parameters
        reach the model only at the next forward, so whoever reads weights in between calls this first."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)


POLICY = "policy"
"""Name of the model that a run trains, among its models."""

Models = Mapping[str, Network | Engine]
"""The models of a run by name: ``policy``, and ``reference``, ``critic`` or ``reward`` where a method has them."""


def network_of(model: Network | Engine) -> Network:
    """The network, with or without its optimizer."""
    return model.network if isinstance(model, Engine) else model


def overlap_enabled(parallel: ParallelConfig, platform: Platform) -> bool:
    """Whether communication overlaps compute: as configured, by default on CUDA only."""
    return platform.is_cuda if parallel.overlap is None else parallel.overlap


def build_engine(network: Network, optim: OptimConfig, parallel: ParallelConfig) -> Engine:
    """Engine of a freshly built network. Raises UserError if apex is asked for and absent."""
    groups, config = network.groups, network.config
    sharded = parallel.distributed_optimizer
    sole = groups.mesh.dp * groups.mesh.cp == 1
    overlap = overlap_enabled(parallel, groups.platform) and not sole
    replica = SoleReplica if sole else Replica
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and sharded,
        use_distributed_optimizer=sharded,
        bucket_size=parallel.bucket_size,
        check_for_nan_in_grad=False,  # train/guard.py skips such steps instead of dying
    )
    chunks = [
        replica(
            config=config,
            ddp_config=ddp_config,
            module=chunk,
            # Later chunks of an interleaved schedule have their whole gradient at once unless reduction overlaps.
            disable_bucketing=number > 0 and not overlap,
            pg_collection=groups.collection,
        )
        for number, chunk in enumerate(network.chunks)
    ]
    engine = Engine(replace(network, chunks=chunks), build_optimizer(chunks, optim, groups), overlap)
    place_shards(engine.optimizer, engine.models, groups)
    _attach_schedule_hooks(engine, config, sharded)
    return engine


def _attach_schedule_hooks(engine: Engine, model_config: Any, sharded: bool) -> None:
    def finalize(model: list[Any], num_tokens: torch.Tensor | None = None, **_: Any) -> None:
        for hook in engine.before_reduction:
            hook()
        finalize_model_grads(model, num_tokens, pg_collection=engine.groups.collection)

    chunks = engine.chunks
    model_config.finalize_model_grads_func = finalize
    if not engine.overlap:
        return
    several = len(chunks) > 1
    model_config.no_sync_func = [chunk.no_sync for chunk in chunks] if several else chunks[0].no_sync
    if several:
        model_config.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]
        if sharded:
            model_config.param_sync_func = [chunk.start_param_sync for chunk in chunks]
