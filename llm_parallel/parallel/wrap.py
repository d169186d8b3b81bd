"""Gradient reduction, optimizer and schedule hooks around model chunks."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from torch import nn

from llm_parallel.config.tree import OptimConfig, RunConfig
from llm_parallel.errors import UserError
from llm_parallel.parallel.groups import Groups


@dataclass(frozen=True)
class Engine:
    """One process's part of a model in training.

    chunks: the wrapped model chunks that the schedule runs; models: the same without wrappers; optimizer:
    megatron-core's (chained) optimizer; overlap: whether communication overlaps compute.
    """

    chunks: list[Any]
    models: list[Any]
    optimizer: Any
    groups: Groups
    overlap: bool

    @property
    def config(self) -> Any:
        """megatron-core's TransformerConfig of the model."""
        return self.models[0].config

    def zero_grad(self) -> None:
        """Clears all gradient buffers before a step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def clip(self, max_norm: float, total_norm: float) -> None:
        """Scales main gradients so that their global norm, ``total_norm``, becomes at most ``max_norm``."""
        if max_norm <= 0.0 or total_norm <= max_norm:
            return
        main_grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if main_grads:
            torch._foreach_mul_(main_grads, max_norm / (total_norm + 1e-6))

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


class SoleReplica(DistributedDataParallel):
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
    replica = SoleReplica if sole else DistributedDataParallel
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
    _attach_schedule_hooks(model_config, chunks, overlap, sharded, groups)
    return Engine(chunks, list(models), optimizer, groups, overlap)


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
        _choose_adamw(part, optim, groups.platform.is_cuda)
    return optimizer


def _choose_adamw(part: Any, optim: OptimConfig, on_cuda: bool) -> None:
    """Puts fused AdamW of torch, or of NVIDIA's apex, under one of megatron-core's optimizers, which by itself takes
    whatever fused Adam it finds installed."""
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
    if optim.implementation != "torch" and has_apex:
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


def _attach_schedule_hooks(model_config: Any, chunks: list[Any], overlap: bool, sharded: bool, groups: Groups) -> None:
    def finalize(model: list[Any], num_tokens: torch.Tensor | None = None, **_: Any) -> None:
        finalize_model_grads(model, num_tokens, pg_collection=groups.collection)

    model_config.finalize_model_grads_func = finalize
    if not overlap:
        return
    several = len(chunks) > 1
    model_config.no_sync_func = [chunk.no_sync for chunk in chunks] if several else chunks[0].no_sync
    if several:
        model_config.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]
        if sharded:
            model_config.param_sync_func = [chunk.start_param_sync for chunk in chunks]
