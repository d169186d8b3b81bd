"""The private parts of megatron-core's gradient buffers and optimizer; no other file names them.

A (chained) optimizer of megatron-core has parts, each around one torch optimizer. The distributed one holds, for every
parameter, the range that this data-parallel replica updates, as a slice or an fp32 copy of it, its *main* parameter.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor, nn

from llm_kernels.adamw.optimizer import FusedAdamW
from llm_kernels.dispatch import triton_installed
from llm_parallel.config.tree import OptimConfig
from llm_parallel.errors import UserError
from llm_parallel.parallel.adamw8 import AdamW8bit, in_8_bits
from llm_parallel.parallel.boxes import boxes_of
from llm_parallel.parallel.groups import Groups


@dataclass(frozen=True)
class Shard:
    """Elements ``start`` to ``stop`` of a parameter of this process. ``main`` holds them, and the torch optimizer
    ``inner`` updates it."""

    parameter: Tensor
    main: Tensor
    start: int
    stop: int
    inner: torch.optim.Optimizer


class Replica(DistributedDataParallel):
    """Gradient buffers that scale only what the optimizer reads. With the distributed optimizer that is this replica's
    part of the gradient; megatron-core scales all of it."""

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


def build_optimizer(chunks: Sequence[Any], optim: OptimConfig, groups: Groups) -> Any:
    """megatron-core's optimizer of wrapped model chunks, with the AdamW of ``optim.implementation`` inside.

    Raises UserError if apex is asked for and absent."""
    ddp, bf16 = chunks[0].ddp_config, chunks[0].config.bf16
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
            use_distributed_optimizer=ddp.use_distributed_optimizer,
            overlap_param_gather=ddp.overlap_param_gather,
        ),
        list(chunks),
        use_gloo_process_groups=groups.platform.is_cuda,
    )
    for part in optimizer.chained_optimizers:
        _detach_shards(part)
        _choose_adamw(part, optim, groups.platform.is_cuda)
    return optimizer


def _detach_shards(part: Any) -> None:
    """Detaches megatron-core's shards of fp32 parameters, which are slices that autograd records. Their graph holds the
    parameters' gradient accumulators and, through DDP's hooks on these, the model, the optimizer and the process groups
    with their threads: attached, no generation of an elastic run would ever be freed."""
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
        raise UserError("optim.implementation is apex, but NVIDIA's apex with its CUDA extension is missing; use torch")
    settings: dict[str, Any] = {
        "lr": optim.lr,
        "betas": (optim.beta1, optim.beta2),
        "eps": optim.epsilon,
        "weight_decay": optim.weight_decay,
    }
    # The parameters are views into the sharded buffer, which an optimizer's constructor would refuse.
    placeholder = [nn.Parameter(torch.zeros(1))]
    inner: torch.optim.Optimizer
    if optim.moment_bits == 8:
        inner = AdamW8bit(placeholder, **settings)
    elif optim.implementation == "triton" or (optim.implementation == "auto" and on_cuda and triton_installed()):
        inner = FusedAdamW(placeholder, backend="triton", **settings)
        inner.low = low_precision_shards(part)
    elif optim.implementation in ("apex", "auto") and has_apex:
        from apex.optimizers import FusedAdam

        inner = FusedAdam(placeholder, adam_w_mode=True, **settings)
    else:
        inner = torch.optim.AdamW(placeholder, fused=True, **settings)
    inner.defaults["moment_bits"] = optim.moment_bits  # so that a checkpoint says it
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


def inner_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside of megatron-core's."""
    return [part.optimizer for part in optimizer.chained_optimizers]


def distributed_parts(optimizer: Any) -> list[DistributedOptimizer]:
    """The parts that are distributed over data-parallel replicas; empty if none is."""
    return [part for part in optimizer.chained_optimizers if isinstance(part, DistributedOptimizer)]


def update(optimizer: Any, factor: float) -> None:
    """Updates the weights by the gradients times ``factor``. Our AdamW scales them as it reads them, others need a
    separate pass before."""
    for inner in inner_optimizers(optimizer):
        parameters = [p for group in inner.param_groups for p in group["params"] if p.grad is not None]
        if factor == 1.0 or not parameters:
            continue
        if isinstance(inner, FusedAdamW):
            inner.scale = torch.full((1,), factor, device=parameters[0].device)
        else:
            torch._foreach_mul_([p.grad for p in parameters], factor)
    with _no_second_copy(optimizer.chained_optimizers):
        optimizer.step_with_ready_grads()


@contextmanager
def padded_buckets(optimizer: Any) -> Iterator[None]:
    """While inside, gathered optimizer state has each bucket's end padding again.

    megatron-core strips the padding and then slices with padded offsets, which scrambles what is saved when there are
    several buckets (mended upstream in #5077, in no release yet).
    """
    parts = distributed_parts(optimizer)
    for part in parts:
        part.get_parameter_state_dp_zero = _padded(part, part.get_parameter_state_dp_zero)
    try:
        yield
    finally:
        for part in parts:
            del part.get_parameter_state_dp_zero  # the class's own is back


def _padded(part: Any, gather: Callable[..., Any]) -> Callable[..., Any]:
    def gather_padded(*args: Any, **kwargs: Any) -> Any:
        state = gather(*args, **kwargs)
        if state is None:
            return None
        for number, buffer in enumerate(part.buffers):
            for tensors in state[number].values():
                for name in tensors.keys() - {"numel_unpadded"}:
                    tensors[name] = _with_padding(buffer, tensors[name])
        return state

    return gather_padded


def _with_padding(buffer: Any, stripped: torch.Tensor) -> torch.Tensor:
    whole, taken = stripped.new_zeros(buffer.numel), 0
    for bucket in buffer.buckets:
        size = bucket.numel_unpadded
        whole[bucket.offset : bucket.offset + size] = stripped[taken : taken + size]
        taken += size
    return whole


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Loads what ``optimizer.sharded_state_dict`` described, every parameter with a ``step`` of its own.

    megatron-core hands one ``step`` tensor to all parameters; AdamW adds 1 to it once per parameter, so training would
    go on with wrong bias corrections and no error. It also looks for ``step`` among the tensors to restore and fails.
    """
    for part in optimizer.chained_optimizers:
        tensors, kind = state.pop("param_state", None), state.pop("param_state_sharding_type", None)
        part.load_state_dict(state)
        inner = part.optimizer
        steps = {
            parameter: values.pop("step").clone().to(parameter.device)
            for parameter, values in inner.state.items()
            if "step" in values
        }
        if tensors is not None:
            with torch.no_grad():
                getattr(part, f"load_parameter_state_from_{kind}")(tensors)
        for parameter, step in steps.items():
            inner.state[parameter]["step"] = step


def shards_of(optimizer: Any) -> Iterator[Shard]:
    """All parts of parameters that this process updates."""
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        if isinstance(part, DistributedOptimizer):
            pairs = zip(
                [*part.model_fp32_groups, *part.model_float16_groups],
                [*part.shard_fp32_groups, *part.shard_fp32_from_float16_groups],
            )
            for models, mains in pairs:
                for model, main in zip(models, mains):
                    where = part._get_model_param_range_map(model)["param"]
                    yield Shard(model, main, where.start, where.end, inner)
        elif isinstance(part, Float16OptimizerWithFloat16Params):
            pairs = zip(
                [*part.float16_groups, *part.fp32_from_fp32_groups],
                [*part.fp32_from_float16_groups, *part.fp32_from_fp32_groups],
            )
            for models, mains in pairs:
                for model, main in zip(models, mains):
                    yield Shard(model, main, 0, model.numel(), inner)
        else:
            for group in inner.param_groups:
                for parameter in group["params"]:
                    yield Shard(parameter, parameter, 0, parameter.numel(), inner)


def place_shards(optimizer: Any, models: Sequence[Any], groups: Groups) -> None:
    """Tells the optimizers whose moments are in 8 bits where their shards lie in the tensors of the whole model.
    Collective over the processes of a stage."""
    if not any(isinstance(inner, AdamW8bit) for inner in inner_optimizers(optimizer)):
        return
    boxes = boxes_of(models)
    trained = {id(parameter) for model in models for parameter in model.parameters() if parameter.requires_grad}
    tensors = [found[0] for number, found in boxes.items() if number in trained and in_8_bits(found[0])]
    for inner in inner_optimizers(optimizer):
        assert isinstance(inner, AdamW8bit)
        own = [shard for shard in shards_of(optimizer) if shard.inner is inner]
        shards = [(shard.main, boxes[id(shard.parameter)], shard.start, shard.stop) for shard in own]
        inner.place(shards, tensors, groups.collection.tp_dp_cp)


def moments_of(shard: Shard, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Flat fp32 moments of numbers ``low`` to ``high`` of a shard: views of them, or what those in 8 bits stand for."""
    state = shard.inner.state[shard.main]
    if "exp_avg" not in state:
        assert isinstance(shard.inner, AdamW8bit)
        return shard.inner.moments[shard.main].between(low, high)
    first, second = (state[name].detach().view(-1)[low:high] for name in ("exp_avg", "exp_avg_sq"))
    return first, second


def main_to_model_parameters(optimizer: Any) -> None:
    """Rounds the fp32 main parameters into the model's, where they are not the same."""
    for part in optimizer.chained_optimizers:
        if hasattr(part, "_copy_main_params_to_model_params"):
            part._copy_main_params_to_model_params()
