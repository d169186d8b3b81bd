"""Adapters on the embedding and on the projection on the vocabulary, and the weights that are trained whole beside
adapters.

The embedding's adapter (as PEFT's) adds scale · B a_t to the embedding of token t, where a_t is a row of a table that
begins at zero and B is drawn. Tensor-parallel ranks divide the table as they divide the embedding. That of the
projection is like any other beside a linear whose rows ranks divide. In a model with tied embeddings each of the two
has factors of its own, and the matrix that they share stays as it is.

Shapes: S tokens and B samples of this rank, V rows of the vocabulary on this rank, H the hidden size, R the rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from llm_parallel.config.tree import ModelConfig
from llm_parallel.config.tree_tune import AdapterConfig
from llm_parallel.model.adapters import Adapted, AnyAdapter, ColumnAdapter, add_product, scale_of
from llm_parallel.model.init import normal_rows
from llm_parallel.model.tensors import ADAPTER_MARK, EMBEDDING, OUTPUT, VALUE, kind_of
from llm_parallel.parallel.groups import Groups

EMBED_TOKENS, LM_HEAD = "embed_tokens", "lm_head"
"""Hugging Face's names of the two, which targets have."""
PREFIXES = {EMBED_TOKENS: f"embedding{ADAPTER_MARK}", LM_HEAD: f"output_layer{ADAPTER_MARK}"}
"""What the names of the adapters' tensors begin with."""
WEIGHTS = {EMBED_TOKENS: EMBEDDING.name, LM_HEAD: OUTPUT.name}
"""The weights that they change."""


class EmbeddingAdapter(AnyAdapter):
    """Beside the embedding. a: the table [V, R]; b: [H, R]. ``first``: the first token whose row this rank has."""

    def __init__(
        self, adapter: AdapterConfig, a: Tensor, b: Tensor, group: Any, sequence_parallel: bool, deterministic: bool
    ) -> None:
        super().__init__()
        self.scale, self.group = scale_of(adapter), group
        self.sequence_parallel, self.deterministic = sequence_parallel, deterministic
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.first = group.rank() * a.shape[0]
        set_tensor_model_parallel_attributes(self.a, True, 0, 1)
        self.b.sequence_parallel = sequence_parallel

    def rows(self, tokens: Tensor) -> Tensor:
        """int64 [...] → this rank's rows of the table [..., R], zeros for tokens of other ranks."""
        places = tokens - self.first
        outside = (places < 0) | (places >= self.a.shape[0])
        return F.embedding(places.masked_fill(outside, 0), self.a).masked_fill(outside.unsqueeze(-1), 0.0)

    def forward(self, tokens: Tensor, embedded_SBH: Tensor) -> Tensor:
        """tokens [B, S] and their embeddings (this rank's part of them under sequence parallelism) → the embeddings
        with the adapter's added."""
        low_SBR = self.rows(tokens).transpose(0, 1).contiguous()
        if self.sequence_parallel:
            low_SBR = reduce_scatter_to_sequence_parallel_region(low_SBR, group=self.group)
        else:
            low_SBR = reduce_from_tensor_model_parallel_region(low_SBR, group=self.group)
        return add_product(embedded_SBH, low_SBR, self.b, self.scale, self.deterministic)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """For megatron-core's checkpoints: the table is divided, and has as many rows as the vocabulary is rounded up
        to."""
        groups = {"tp_group": self.group, "dp_cp_group": metadata["dp_cp_group"]}
        named = {"prepend_offsets": sharded_offsets, **groups}
        return {
            f"{prefix}a": make_tp_sharded_tensor_for_checkpoint(
                self.a, f"{prefix}a", allow_shape_mismatch=True, **named
            ),
            f"{prefix}b": make_sharded_tensor_for_checkpoint(self.b, f"{prefix}b", **named),
        }


class OutputLayer(Adapted, ColumnParallelLinear):
    """The projection on the vocabulary, whose rows ranks divide, with room for an adapter."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.adapter = None

    def forward(self, input_: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        """As megatron-core's, with the adapter's output added."""
        return self._with_adapter(input_, super().forward(input_, *arguments, **named))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """As megatron-core's, with the adapter's factors as they are divided."""
        found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        name = f"{ADAPTER_MARK[1:]}b"
        found = self._describe_adapter(found, {name: 0}, prefix, sharded_offsets, metadata)
        if self.adapter is not None:
            found[prefix + name].allow_shape_mismatch = True
        return found


def trained_whole(model: ModelConfig, adapter: AdapterConfig) -> frozenset[str]:
    """Names of the model's own weights that are trained beside its adapters: those that the run names, and a value
    head, which no other model has."""
    named = {WEIGHTS[name] for name in adapter.modules_to_save}
    return frozenset(named | ({VALUE.name} if model.value_head else set()))


def is_trained(name: str, whole: frozenset[str]) -> bool:
    """Whether a tensor of a model with adapters is trained, by its name; ``whole``: see ``trained_whole``."""
    return ADAPTER_MARK in name or name in whole


@torch.no_grad()
def add_vocabulary_adapters(chunk: Any, adapter: AdapterConfig, groups: Groups, seed: int) -> None:
    """Gives a frozen model chunk the adapters on its embedding and its output projection that are wanted, and lets the
    weights be trained that are trained whole."""
    whole = trained_whole(chunk.model_config, adapter)
    for name, parameter in chunk.named_parameters():
        if name in whole:
            parameter.requires_grad_(True)
    hidden, device, dtype = chunk.model_config.hidden_size, groups.platform.device, chunk.config.params_dtype
    rows = chunk.vocab_size // groups.mesh.tp
    sequence_parallel, deterministic = chunk.config.sequence_parallel, chunk.config.kernels.deterministic
    group = groups.collection.tp

    def zeros() -> Tensor:
        return torch.zeros(rows, adapter.rank, dtype=dtype, device=device)

    if chunk.pre_process and EMBED_TOKENS in adapter.targets:
        b = normal_rows(seed, f"{PREFIXES[EMBED_TOKENS]}b", range(hidden), adapter.rank).to(device, dtype)
        chunk.embedding.adapter = EmbeddingAdapter(adapter, zeros(), b, group, sequence_parallel, deterministic)
    if chunk.post_process and LM_HEAD in adapter.targets:
        drawn = normal_rows(seed, f"{PREFIXES[LM_HEAD]}a/{LM_HEAD}", range(adapter.rank), hidden)
        a = (drawn / math.sqrt(3 * hidden)).to(device, dtype)
        parts = torch.zeros(rows, dtype=torch.int64)
        chunk.output_layer.adapter = ColumnAdapter(adapter, a, zeros(), group, sequence_parallel, parts)
        chunk.output_layer.adapter.row_parts = chunk.config.row_parts if deterministic else 0


def vocabulary_adapters(models: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """The adapters on the embedding and the output projection that a process holds, by Hugging Face's names."""
    for chunk in models:
        for name, module in ((EMBED_TOKENS, "embedding"), (LM_HEAD, "output_layer")):
            adapter = getattr(getattr(chunk, module, None), "adapter", None)
            if adapter is not None:
                yield name, adapter


def vocabulary_delta(adapter: AdapterConfig, name: str, a: Tensor, b: Tensor) -> Tensor:
    """What whole factors of the adapter ``name`` add to the rows of its weight, in fp32 [V, H]."""
    a, b = a.float(), b.float()
    return scale_of(adapter) * (a @ b.t() if name == EMBED_TOKENS else b @ a)


def own_rows(name: str, whole: Tensor, held: Tensor, groups: Groups) -> Tensor:
    """This rank's part of a whole tensor, by its canonical name, for what it holds; zeros beyond the vocabulary."""
    kind, mesh = kind_of(name), groups.mesh
    if kind.sharded_dim is None:
        return whole
    [rows] = kind.shard(held.shape[0] * mesh.tp, mesh.tp, groups.at.tp)
    found = whole.new_zeros(held.shape)
    part = whole[rows.start : rows.stop]
    found[: len(part)] = part
    return found
