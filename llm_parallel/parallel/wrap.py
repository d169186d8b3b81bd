"""Gradient reduction, optimizer and schedule hooks around model chunks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.transformer.module import Float16Module
from torch import nn

from llm_kernels.adamw.optimizer import FusedAdamW
from llm_kernels.dispatch import triton_installed
from llm_parallel.config.tree import OptimConfig, RunConfig
from llm_parallel.errors import UserError
from llm_parallel.parallel.groups import Groups


@dataclass(frozen=True)
class Engine:
    """One process's part of a model in training.

    chunks: the wrapped model chunks that the schedule runs; models: the same without wrappers; optimizer:
    megatron-core's (chained) optimizer; overlap: whether communication overlaps compute; before_micro_batch: called
    before each forward; before_reduction: called when this process has computed its gradient and is about to wait for
    the other replicas.
    """

    chunks: list[Any]
    models: list[Any]
    optimizer: Any
    groups: Groups
    overlap: bool
    before_micro_batch: list[Callable[[], None]] = field(default_factory=list)
    before_reduction: list[Callable[[], None]] = field(default_factory=list)

    @property
    def config(self) -> Any:
        """megatron-core's TransformerConfig of the model."""
        return self.models[0].config

    def zero_grad(self) -> None:
        """Clears all gradient buffers before a step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self, max_norm: float, total_norm: float) -> None:
        """Updates the weights by gradients scaled so that their global norm, ``total_norm``, is at most ``max_norm``
        (0: not scaled). Our AdamW scales as it reads them, others need a pass before."""
        factor = max_norm / (total_norm + 1e-6) if 0.0 < max_norm < total_norm else 1.0
        for part in self.optimizer.chained_optimizers:
            parameters = [p for group in part.param_groups for p in group["params"] if p.grad is not None]
            if factor == 1.0 or not parameters:
                continue
            if isinstance(part.optimizer, FusedAdamW):
                part.optimizer.scale = torch.full((1,), factor, device=parameters[0].device)
            else:
                torch._foreach_mul_([p.grad for p in parameters], factor)
        with _no_second_copy(self.optimizer.chained_optimizers):
            self.optimizer.step_with_ready_grads()

    def parameters_up_to_date(self) -> None:
        """Waits for parameters that are still being gathered; with overlapped gathering the last step's parameters
        reach the model only at the next forward, so whoever reads weights in between calls this first."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def set_training(self, training: bool) -> None:
        """Switches between training and evaluation mode."""
        for chunk in self.chunks:
            chunk.train(training)


class Replica(DistributedDataParallel):
    """Scales only what the optimizer reads: with the distributed optimizer that is this replica's part of the gradient,
    and megatron-core passes over all of it."""

    def scale_gradients(self, scaling_factor: float) -> None:
        """Multiplies this replica's gradient by a factor."""
        if not self.ddp_config.use_distributed_optimizer:
            super().scale_gradients(scaling_factor)
            return
        group = self.intra_dp_cp_group
        for buffer in self.buffers:
            for bucket in buffer.buckets:
                bucket.grad_data.view(group.size(), -1)[group.rank()].mul_(scaling_factor)


class SoleReplica(Replica):
    """Gradient buffers of the only data-parallel replica: nothing to reduce and nothing to gather.

    megatron-core reduces and gathers with itself too, three copies of the model's size at every step (a tenth of the
    step of a 17 M parameter model on two CPU cores).
    """

    def start_grad_sync(self, *_: Any) -> None:
        """Nothing: the gradient is whole."""

    def finish_grad_sync(self, *_: Any, **__: Any) -> None:
        """Nothing: the gradient is whole."""

    def start_param_sync(self, *_: Any, **__: Any) -> None:
        """Nothing: the parameters are whole."""


def wrap(models: Sequence[nn.Module], config: RunConfig, groups: Groups, overlap: bool) -> Engine:
    """Engine of freshly built model chunks. Raises UserError if apex is asked for and absent."""
    bf16 = config.train.precision == "bf16"
    sharded = config.parallel.distributed_optimizer
    sole = groups.layout.dp * groups.layout.cp == 1
    overlap = overlap and not sole
    replica = SoleReplica if sole else Replica
    model_config: Any = models[0].config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and sharded,
        use_distributed_optimizer=sharded,
        bucket_size=config.parallel.bucket_size,
        check_for_nan_in_grad=False,  # train/guard.py skips such steps instead of dying
    )
    chunks = [
        replica(
            config=model_config,
            ddp_config=ddp_config,
            module=Float16Module(model_config, model) if bf16 else model,
            # Later chunks of an interleaved schedule have their whole gradient at once unless reduction overlaps.
            disable_bucketing=number > 0 and not overlap,
            pg_collection=groups.collection,
        )
        for number, model in enumerate(models)
    ]
    optimizer = _build_optimizer(chunks, config.optim, bf16, overlap and sharded, groups)
    engine = Engine(chunks, list(models), optimizer, groups, overlap)
    _attach_schedule_hooks(engine, model_config, sharded)
    return engine


def _build_optimizer(chunks: list[Any], optim: OptimConfig, bf16: bool, overlap_gather: bool, groups: Groups) -> Any:
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.epsilon,
            clip_grad=optim.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=chunks[0].ddp_config.use_distributed_optimizer,
            overlap_param_gather=overlap_gather,
        ),
        chunks,
        use_gloo_process_groups=groups.platform.is_cuda,
    )
    for part in optimizer.chained_optimizers:
        _detach_shards(part)
        _choose_adamw(part, optim, groups.platform.is_cuda)
    return optimizer


def _detach_shards(part: Any) -> None:
    """Takes the graph from megatron-core's shards of fp32 parameters, which are slices that autograd records. It holds
    the parameters' gradient accumulators, and through the hooks of DDP on these the model, the optimizer and the
    process groups with their threads: no generation of an elastic run would ever be freed."""
    if not isinstance(part, DistributedOptimizer):
        return
    leaves: dict[int, torch.Tensor] = {}
    for shards in part.shard_fp32_groups:
        for number, shard in enumerate(shards):
            leaf = leaves[id(shard)] = shard.detach()
            leaf.__dict__.update(shard.__dict__)
            shards[number] = leaf
    for group in part.optimizer.param_groups:
        # In place: megatron-core holds the same lists a second time.
        group["params"][:] = [leaves.get(id(shard), shard) for shard in group["params"]]


def _choose_adamw(part: Any, optim: OptimConfig, on_cuda: bool) -> None:
    """Puts our fused AdamW, torch's or that of NVIDIA's apex under one of megatron-core's optimizers, which by itself
    takes whatever fused Adam it finds installed."""
    has_apex = on_cuda and importlib.util.find_spec("amp_C") is not None
    if optim.implementation == "apex" and not has_apex:
        # PyPI's apex is an unrelated package: the CUDA extension tells them apart.
        raise UserError("optim.implementation is apex but NVIDIA's apex with its CUDA extension is not here; use torch")
    settings: dict[str, Any] = {
        "lr": optim.lr,
        "betas": (optim.beta1, optim.beta2),
        "eps": optim.epsilon,
        "weight_decay": optim.weight_decay,
    }
    # The parameters are views into the sharded buffer, which an optimizer's constructor would refuse.
    placeholder = [nn.Parameter(torch.zeros(1))]
    inner: torch.optim.Optimizer
    if optim.implementation == "triton" or (optim.implementation == "auto" and on_cuda and triton_installed()):
        inner = FusedAdamW(placeholder, backend="triton", **settings)
        inner.low = low_precision_shards(part)
    elif optim.implementation in ("apex", "auto") and has_apex:
        from apex.optimizers import FusedAdam

        inner = FusedAdam(placeholder, adam_w_mode=True, **settings)
    else:
        inner = torch.optim.AdamW(placeholder, fused=True, **settings)
    groups = part.optimizer.param_groups
    for group in groups:
        group.update(inner.defaults)
        group["weight_decay"] = optim.weight_decay * group.get("wd_mult", 1.0)
    inner.param_groups = groups
    part.optimizer = inner


def low_precision_shards(part: Any) -> dict[torch.Tensor, torch.Tensor]:
    """Where one of megatron-core's optimizers keeps the bf16 copy of each fp32 main parameter; empty in fp32."""
    if isinstance(part, DistributedOptimizer):
        found = {}
        for mains, models in zip(part.shard_fp32_from_float16_groups, part.model_float16_groups):
            for main, model in zip(mains, models):
                where = part._get_model_param_range_map(model)["gbuf_world_in_bucket"]
                buffer, _, bucket = part.model_param_gbuf_map[model]
                flat = part.buffers[buffer].buckets[bucket].param_data.view(-1)
                found[main] = flat[where.start : where.end]
        return found
    if isinstance(part, Float16OptimizerWithFloat16Params):
        groups = zip(part.fp32_from_float16_groups, part.float16_groups)
        return {main: model.data for mains, models in groups for main, model in zip(mains, models)}
    return {}


@contextmanager
def _no_second_copy(parts: Sequence[Any]) -> Iterator[None]:
    """While inside, megatron-core does not copy main parameters that our AdamW has written in both precisions."""
    ours = [part for part in parts if isinstance(part.optimizer, FusedAdamW) and part.optimizer.low]
    for part in ours:
        part._copy_main_params_to_model_params = lambda: None
    try:
        yield
    finally:
        for part in ours:
            del part._copy_main_params_to_model_params  # the class's own is back


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
