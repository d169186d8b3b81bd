"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685) beside the linears of a layer: y = W x + scale · B A x.

A linear of ours holds several projections, whose rows lie in the order of its weight: queries, keys and values of each
group, or gate and up. One adapter serves them all. A stacks one factor [rank, in] for each projection that has an
adapter, and B [out, rank] has a row for each row of the weight, divided over tensor-parallel ranks as the weight is. A
row of B meets the part of A of its own projection; rows of a projection without an adapter meet none, so that their
gradient is zero and they stay zero.

Only activations of the rank's width are communicated. A factor that all ranks hold is marked ``sequence_parallel``
where each of them saw its own tokens alone, so that megatron-core sums its gradient over them.

Shapes: S tokens, B samples, I and O inputs and outputs of the linear on this rank, R rank, K projections with adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from llm_parallel.config.tree import ModelConfig
from llm_parallel.config.tree_tune import AdapterConfig
from llm_parallel.model import dora
from llm_parallel.model.deterministic import ColumnProduct, RowProduct
from llm_parallel.model.init import normal_rows
from llm_parallel.model.mcore_config import LlamaTransformerConfig
from llm_parallel.model.quant import FrozenProduct, QuantizedMatrix
from llm_parallel.model.tensors import ADAPTER_MARK, LAYERS, kind_of
from llm_parallel.parallel.engine import Network
from llm_parallel.parallel.groups import Groups

PROJECTIONS: dict[str, tuple[str, ...]] = {
    "self_attention.linear_qkv": ("q", "k", "v"),
    "self_attention.linear_proj": ("o",),
    "mlp.linear_fc1": ("gate", "up"),
    "mlp.linear_fc2": ("down",),
}
"""The linears of a layer, and the projections that each holds, in the order of ``hf_names`` in ``model/tensors.py``."""


def scale_of(adapter: AdapterConfig) -> float:
    """The factor of B A."""
    return adapter.alpha / (math.sqrt(adapter.rank) if adapter.rank_stabilized else adapter.rank)


class AnyAdapter(nn.Module):
    """What all adapters share. ``on``: whether it takes part in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.on = True


class Adapter(AnyAdapter):
    """What the adapters of all linears share."""

    def __init__(self, adapter: AdapterConfig, a: Tensor, b: Tensor, group: Any, sequence_parallel: bool) -> None:
        super().__init__()
        self.scale, self.dropout = scale_of(adapter), adapter.dropout
        self.group, self.sequence_parallel = group, sequence_parallel
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.m = nn.Parameter(b.new_zeros(b.shape[0])) if adapter.dora else None
        """Of DoRA: the trained magnitude of each row of the weight, less the norm of that row."""
        self._squares: Tensor | None = None
        self.row_parts = 0
        """With ``kernels.deterministic``, parts of the sum of a row-parallel product; 0 without it."""

    def wide_b(self) -> Tensor:
        """B as a matrix [O, K·R], which meets all of A."""
        return self.b

    def rows_met(self) -> Tensor | None:
        """bool [O]: rows of the weight that have an adapter; None if all have."""
        return None

    def _divided_columns(self) -> Any:
        """The ranks that divide the weight's columns, or None."""
        return None

    def squares(self, weight: Any) -> Tensor:
        """fp32 [O]: squared norms of the rows of the frozen weight, which must be loaded. The first call is collective
        where ranks divide the columns."""
        if self._squares is None:
            self._squares = dora.squares_of(weight, self._divided_columns())
        return self._squares

    def gain(self, weight: Any) -> Tensor:
        """Of DoRA, fp32 [O]: what the rows of the adapted product are multiplied by. Collective where ranks divide the
        columns."""
        assert self.m is not None
        of_base = self.squares(weight)
        of_sum = dora.squares_of_sum(weight, of_base, self.a, self.wide_b(), self.scale, self._divided_columns())
        return dora.gain(self.m, of_base, of_sum, self.rows_met())


class ColumnAdapter(Adapter):
    """Beside a linear whose rows ranks divide. ``parts``: for each row of this rank's weight, which part of A it meets,
    -1 for none."""

    def __init__(
        self, adapter: AdapterConfig, a: Tensor, b: Tensor, group: Any, sequence_parallel: bool, parts: Tensor
    ) -> None:
        super().__init__(adapter, a, b, group, sequence_parallel)
        set_tensor_model_parallel_attributes(self.b, True, 0, 1)
        if self.m is not None:
            set_tensor_model_parallel_attributes(self.m, True, 0, 1)
        self.a.sequence_parallel = sequence_parallel
        count = a.shape[0] // adapter.rank
        which = parts[:, None] == torch.arange(count)
        self.all_rows_meet_all = count == 1 and bool(which.all())
        self.register_buffer("meets", which.to(a.device), persistent=False)

    def wide_b(self) -> Tensor:
        """B as a matrix [O, K·R] that is zero where a row does not meet a part of A: one product instead of one for
        each projection, whose results would have to be put into the weight's order."""
        return self.b if self.all_rows_meet_all else _wide(self.b, self.meets)

    def rows_met(self) -> Tensor | None:
        """bool [O]: rows of the projections that have adapters."""
        return self.meets.any(1)

    def forward(self, x_SBI: Tensor, y_SBO: Tensor) -> Tensor:
        """The linear's input (this rank's tokens under sequence parallelism) and its output → the output with the
        adapter's added."""
        # The default generator gives ranks that see the same tokens the same mask, and under sequence parallelism
        # megatron-core has replaced it by one that differs between ranks.
        x_SBI = F.dropout(x_SBI, self.dropout, self.training)
        low_SBR: Any = ColumnProduct.apply(x_SBI, self.a) if self.row_parts else F.linear(x_SBI, self.a)
        if self.sequence_parallel:
            low_SBR = gather_from_sequence_parallel_region(low_SBR, group=self.group)
        else:
            low_SBR = copy_to_tensor_model_parallel_region(low_SBR, group=self.group)
        return add_product(y_SBO, low_SBR, self.wide_b(), self.scale, bool(self.row_parts))


def _wide(b: Tensor, meets: Tensor) -> Tensor:
    """[O, R] and bool [O, K] → [O, K·R]."""
    return (b[:, None] * meets[:, :, None]).flatten(1)


class RowAdapter(Adapter):
    """Beside a linear whose columns ranks divide."""

    def __init__(self, adapter: AdapterConfig, a: Tensor, b: Tensor, group: Any, sequence_parallel: bool) -> None:
        super().__init__(adapter, a, b, group, sequence_parallel)
        set_tensor_model_parallel_attributes(self.a, True, 1, 1)
        self.b.sequence_parallel = sequence_parallel
        if self.m is not None:
            self.m.sequence_parallel = sequence_parallel

    def _divided_columns(self) -> Any:
        return self.group

    def forward(self, x_SBI: Tensor, y_SBO: Tensor) -> Tensor:
        """The linear's input and its output (this rank's tokens under sequence parallelism) → the output with the
        adapter's added."""
        x_SBI = self._dropped(x_SBI)
        if self.row_parts:
            low_SBR: Any = RowProduct.apply(x_SBI, self.a, self.row_parts, self.group, self.sequence_parallel)
            return add_product(y_SBO, low_SBR, self.b, self.scale, True)
        low_SBR = F.linear(x_SBI, self.a)
        if self.sequence_parallel:
            low_SBR = reduce_scatter_to_sequence_parallel_region(low_SBR, group=self.group)
        else:
            low_SBR = reduce_from_tensor_model_parallel_region(low_SBR, group=self.group)
        return add_product(y_SBO, low_SBR, self.b, self.scale, False)

    def _dropped(self, x_SBI: Tensor) -> Tensor:
        """Dropout with a mask of each rank's own, as every rank has other columns."""
        if not self.dropout or not self.training:
            return x_SBI
        if self.sequence_parallel or self.group.size() == 1:
            return F.dropout(x_SBI, self.dropout)
        with get_cuda_rng_tracker().fork():
            return F.dropout(x_SBI, self.dropout)


def add_product(y_SBO: Tensor, low_SBR: Tensor, b: Tensor, scale: float, deterministic: bool) -> Tensor:
    """y + scale · low bᵀ, in one product."""
    if deterministic:
        # Multiplied and added apart: whether one operation rounds once or twice depends on the place in memory.
        added: Any = ColumnProduct.apply(low_SBR, b)
        return y_SBO + scale * added
    return torch.addmm(y_SBO.flatten(0, 1), low_SBR.flatten(0, 1), b.t(), alpha=scale).view_as(y_SBO)


def _seen_by_all(x: Any, named: dict[str, Any]) -> Any:
    """The input of a product whose rows ranks divide: all tokens, with the gradient summed over the ranks."""
    if named["sequence_parallel"]:
        return gather_from_sequence_parallel_region(x, group=named["tp_group"])
    return copy_to_tensor_model_parallel_region(x, group=named["tp_group"]) if named["allreduce_dgrad"] else x


def _without_weight(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leaves the empty parameter of a weight in few bits out of a state, for megatron-core would divide by its size."""
    del state[f"{prefix}weight"]


class Adapted(nn.Module):
    """What our linears have besides megatron-core's: a place for an adapter, None where it has none, and for a frozen
    weight in few bits, whose parameter then is empty."""

    adapter: Any
    tp_group: Any
    weight: Any
    bias: Any
    skip_bias_add: bool

    def _prepare(self, config: Any, columns: range, width: int, group: Any) -> None:
        """Called when the linear is built, before it has values. ``columns`` of ``width``: those on this rank."""
        self.adapter = None
        if config.base != "full":
            held = self.weight
            matrix = QuantizedMatrix(config.base, held.shape[0], columns, width, held.device, group)
            self.weight = nn.Parameter(torch.empty(0, dtype=held.dtype, device=held.device), requires_grad=False)
            self.weight.stored = matrix
            self._register_state_dict_hook(_without_weight)

    def _forward_impl(self, input: Any, weight: Any, *arguments: Any, **named: Any) -> Any:
        """megatron-core's product, and what it does with a frozen weight for one in few bits."""
        stored, deterministic = getattr(weight, "stored", None), self.config.kernels.deterministic
        if stored is None and not deterministic:
            return super()._forward_impl(input, weight, *arguments, **named)
        input, bias = _seen_by_all(input, named), named["bias"]
        product: Any = ColumnProduct.apply(input, weight) if deterministic else FrozenProduct.apply(input, stored)
        return product if bias is None else product + bias

    def _with_adapter(self, x: Tensor, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        y, bias = output
        if self.adapter is None or not self.adapter.on:
            return y, bias
        y = self.adapter(x, y)
        if self.adapter.m is None:
            return y, bias
        gain = self.adapter.gain(self.weight).to(y.dtype)
        added = None if self.skip_bias_add else self.bias  # what the product has already
        return (y * gain if added is None else (y - added) * gain + added), bias

    def _describe_adapter(
        self, found: dict[str, Any], divided: dict[str, int], prefix: str, offsets: tuple, metadata: Any
    ) -> dict[str, Any]:
        """megatron-core takes tensors that it does not know for replicated ones, and would save the first rank's part
        of a divided factor as the whole."""
        if self.adapter is not None:
            factors = {f"{ADAPTER_MARK[1:]}{name}": factor for name, factor in self.adapter.named_parameters()}
            groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
            found |= make_sharded_tensors_for_checkpoint(factors, prefix, divided, offsets, **groups)
        return found


class ColumnLinear(Adapted, ColumnParallelLinear):
    """megatron-core's linear whose rows ranks divide, with room for an adapter. ``interleaved``: matrices that stand
    one after the other in it, each of which is divided."""

    interleaved = 1

    def __init__(self, *arguments: Any, config: LlamaTransformerConfig, **named: Any) -> None:
        super().__init__(*arguments, config=config, **named)
        self._prepare(config, range(self.input_size), self.input_size, None)

    def forward(self, input_: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        """As megatron-core's, with the adapter's output added."""
        return self._with_adapter(input_, super().forward(input_, *arguments, **named))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """As megatron-core's, with the adapter's factors as they are divided."""
        found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        divided = [f"{ADAPTER_MARK[1:]}{name}" for name in ("b", "m")]
        found = self._describe_adapter(found, dict.fromkeys(divided, 0), prefix, sharded_offsets, metadata)
        if self.adapter is not None and self.interleaved > 1:
            for name in divided[: 1 if self.adapter.m is None else 2]:
                found[prefix + name] = apply_swiglu_sharded_factory(found[prefix + name], sharded_offsets)
        return found


class RowLinear(Adapted, RowParallelLinear):
    """megatron-core's linear whose columns ranks divide, with room for an adapter."""

    def __init__(self, *arguments: Any, config: LlamaTransformerConfig, **named: Any) -> None:
        super().__init__(*arguments, config=config, **named)
        each, group = self.input_size_per_partition, self.tp_group if self.tp_group.size() > 1 else None
        start = self.tp_group.rank() * each
        self._prepare(config, range(start, start + each), self.input_size, group)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """As megatron-core's, with the adapter's output added."""
        if self.config.kernels.deterministic:
            how = self.config.row_parts, self.tp_group, self.sequence_parallel
            output: Any = RowProduct.apply(input_, self.weight, *how)
            added, bias = self._with_adapter(input_, (output, self.bias))
            return (added, bias) if self.skip_bias_add or bias is None else (added + bias, None)
        return self._with_adapter(input_, super().forward(input_))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """As megatron-core's, with the adapter's factors as they are divided."""
        found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return self._describe_adapter(found, {f"{ADAPTER_MARK[1:]}a": 1}, prefix, sharded_offsets, metadata)


def targets_of(linear: str, adapter: AdapterConfig) -> list[str]:
    """The projections of a linear that have adapters."""
    return [projection for projection in PROJECTIONS[linear] if projection in adapter.targets]


def linears_of(chunk: Any) -> Iterator[tuple[int, str, Any]]:
    """The linears in the layers of a model chunk: the layer's number over the whole model, from 0, the linear's name in
    its layer, and the module."""
    for layer in chunk.decoder.layers:
        for linear in PROJECTIONS:
            yield layer.layer_number - 1, linear, layer.get_submodule(linear)


def adapters_of(models: Sequence[Any]) -> Iterator[tuple[int, str, Any]]:
    """The same for the adapters of all linears that have one."""
    for chunk in models:
        for layer, linear, module in linears_of(chunk):
            if module.adapter is not None:
                yield layer, linear, module.adapter


def every_adapter(models: Sequence[Any]) -> list[AnyAdapter]:
    """All adapters that a process holds, on the vocabulary too."""
    return [module for chunk in models for module in chunk.modules() if isinstance(module, AnyAdapter)]


@torch.no_grad()
def add_adapters(chunk: Any, adapter: AdapterConfig, groups: Groups, seed: int) -> None:
    """Freezes a model chunk and gives its linears adapters: A is drawn, B is zero.

    A has the deviation of PEFT's, 1 / sqrt(3 in), and is drawn for the whole matrix and then divided, so that every
    layout starts from the same adapters."""
    for parameter in chunk.parameters():
        parameter.requires_grad_(False)
    for layer, linear, module in linears_of(chunk):
        if targets := targets_of(linear, adapter):
            module.adapter = _new_adapter(chunk, layer, linear, module, targets, adapter, groups, seed)
            if chunk.config.kernels.deterministic:
                module.adapter.row_parts = chunk.config.row_parts


def _new_adapter(
    chunk: Any,
    layer: int,
    linear: str,
    module: Any,
    targets: list[str],
    adapter: AdapterConfig,
    groups: Groups,
    seed: int,
) -> Adapter:
    where = f"{LAYERS}{layer}.{linear}{ADAPTER_MARK}a"
    width, device = module.input_size, groups.platform.device
    a = torch.cat([normal_rows(seed, f"{where}/{target}", range(adapter.rank), width) for target in targets])
    a = (a / math.sqrt(3 * width)).to(device, module.config.params_dtype)
    shared = (groups.collection.tp, module.config.sequence_parallel)
    mesh, at = groups.mesh, groups.at
    if isinstance(module, ColumnParallelLinear):
        rows = module.output_size_per_partition
        b = torch.zeros(rows, adapter.rank, dtype=a.dtype, device=device)
        held = kind_of(f"{LAYERS}{linear}{ADAPTER_MARK}b").shard(rows * mesh.tp, mesh.tp, at.tp)
        parts = _parts_of_rows(chunk.model_config, linear, targets)
        return ColumnAdapter(adapter, a, b, *shared, torch.cat([parts[rows.start : rows.stop] for rows in held]))
    a = a.chunk(mesh.tp, dim=1)[at.tp].contiguous()
    return RowAdapter(adapter, a, torch.zeros(module.output_size, adapter.rank, dtype=a.dtype, device=device), *shared)


def rows_by_projection(model: ModelConfig, linear: str) -> list[tuple[str, int]]:
    """Whose rows follow each other in a column-parallel linear's weight, and how many: (projection, rows)."""
    projections = PROJECTIONS[linear]
    if linear != "self_attention.linear_qkv":
        return [(projection, model.ffn_hidden_size) for projection in projections]
    head, groups = model.kv_channels, model.num_query_groups
    each = (head * model.num_attention_heads // groups, head, head)
    return [*zip(projections, each)] * groups


def _parts_of_rows(model: ModelConfig, linear: str, targets: Sequence[str]) -> Tensor:
    """For each row of the whole weight, which of ``targets`` it belongs to, -1 for none."""
    numbers = {projection: number for number, projection in enumerate(targets)}
    rows = rows_by_projection(model, linear)
    return torch.cat([torch.full((count,), numbers.get(projection, -1)) for projection, count in rows])


def whole_rows_met(model: ModelConfig, adapter: AdapterConfig, linear: str) -> Tensor:
    """bool [out]: rows of a linear's whole weight whose projections have adapters."""
    targets = targets_of(linear, adapter)
    if len(PROJECTIONS[linear]) > 1:
        return _parts_of_rows(model, linear, targets) >= 0
    return torch.full((kind_of(f"{LAYERS}{linear}.weight").shape(model)[0],), bool(targets))


def whole_delta(model: ModelConfig, adapter: AdapterConfig, linear: str, a: Tensor, b: Tensor) -> Tensor:
    """What whole factors of a linear's adapter add to its whole weight, in fp32."""
    a, b, targets = a.float(), b.float(), targets_of(linear, adapter)
    if len(PROJECTIONS[linear]) > 1:
        b = _wide(b, _parts_of_rows(model, linear, targets)[:, None] == torch.arange(len(targets)))
    return scale_of(adapter) * (b @ a)


@contextmanager
def adapters_off(network: Network) -> Iterator[None]:
    """While inside, a model computes what it computes without its adapters: the reference of a preference loss."""
    found = every_adapter(network.models)
    for adapter in found:
        adapter.on = False
    try:
        yield
    finally:
        for adapter in found:
            adapter.on = True
