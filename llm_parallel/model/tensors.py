"""Every tensor of a model: its name, what it is for, and how tensor parallelism divides it. Other files ask this table.

A canonical name is the same in every layout: ``decoder.layers.7.mlp.linear_fc1.weight`` is in layer 7, counted from 0
over the whole model. A checkpoint stacks the layers and leaves the number out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llm_parallel.config.tree import ModelConfig

LAYERS = "decoder.layers."


class Role(Enum):
    """What a tensor is for."""

    VOCABULARY = "a row for each token of the vocabulary, and rows of zeros that round their number up"
    NORM = "the scale of an RMSNorm"
    INPUT = "a matrix that reads the normalized residual stream"
    RESIDUAL = "a matrix whose output is added to the residual stream"
    BIAS = "a vector that is added to a matrix's output"
    VALUE = "the vector that gives a token its value, as a matrix of one row"
    ADAPTER = "a factor of a low-rank matrix that is trained beside a frozen one"


@dataclass(frozen=True)
class TensorKind:
    """One row of the table.

    name: within its layer if ``in_layer``, else within the model; sharded_dim: the dimension that tensor-parallel ranks
    divide, None if each rank holds the whole; interleaved: matrices that stand one after the other along that
    dimension, each of which is divided separately; hf_names: the tensors of Hugging Face's Llama that it is made of, in
    order; switch, unless: the fields of ``model`` that say whether a model has it, if not all do.
    """

    name: str
    role: Role
    sharded_dim: int | None
    hf_names: tuple[str, ...]
    interleaved: int = 1
    in_layer: bool = True
    switch: str | None = None
    unless: str | None = None

    def exists(self, model: ModelConfig) -> bool:
        """Whether a model has such tensors. A tied output projection is the embedding."""
        if self.name == "output_layer.weight" and (model.tie_embeddings or model.value_head):
            return False
        if self.unless is not None and getattr(model, self.unless):
            return False
        return self.switch is None or bool(getattr(model, self.switch))

    @property
    def piece_dim(self) -> int:
        """The dimension along which Hugging Face's tensors follow each other; the sharded one, if there is one."""
        return self.sharded_dim or 0

    def canonical_name(self, layer: int | None = None) -> str:
        """Name in the whole model."""
        return f"{LAYERS}{layer}.{self.name}" if self.in_layer else self.name

    def shard(self, size: int, tp: int, tp_rank: int) -> list[range]:
        """Which of the ``size`` rows (columns, if ``sharded_dim`` is 1) one tensor-parallel rank holds, in order."""
        if self.sharded_dim is None:
            return [range(size)]
        each = size // self.interleaved
        step = each // tp
        starts = [part * each + tp_rank * step for part in range(self.interleaved)]
        return [range(start, start + step) for start in starts]

    def shape(self, model: ModelConfig, vocabulary: int | None = None) -> tuple[int, ...]:
        """Shape of the whole tensor. ``vocabulary``: rows of the padded vocabulary, if not the model's own."""
        heads = model.num_attention_heads * model.kv_channels
        groups = model.num_query_groups * model.kv_channels
        if self.role is Role.NORM:
            if self.switch == "qk_norm_over_heads":
                return (heads if "q_layernorm" in self.name else groups,)
            return (model.kv_channels if self.switch == "qk_norm" else model.hidden_size,)
        if self.role is Role.VOCABULARY:
            rows = vocabulary or model.vocab_size
            assert rows is not None, "the vocabulary is taken from the tokenizer before the model is built"
            return (rows, model.hidden_size)
        if self.role is Role.VALUE:
            return (1, model.hidden_size)
        if self.role is Role.BIAS and self.sharded_dim is None:
            return (model.hidden_size,)
        along = {
            "self_attention.linear_qkv": heads + 2 * groups,
            "self_attention.linear_proj": heads,
            "mlp.linear_fc1": 2 * model.ffn_hidden_size,
            "mlp.linear_fc2": model.ffn_hidden_size,
        }[self.name.rpartition(".")[0]]
        if self.role is Role.BIAS:
            return (along,)
        return (model.hidden_size, along) if self.sharded_dim == 1 else (along, model.hidden_size)


TENSORS = (
    TensorKind("embedding.word_embeddings.weight", Role.VOCABULARY, 0, ("model.embed_tokens.weight",), in_layer=False),
    TensorKind("input_layernorm.weight", Role.NORM, None, ("input_layernorm.weight",), unless="norm_outputs"),
    TensorKind(
        # For each key/value group its query heads, its key and its value.
        "self_attention.linear_qkv.weight",
        Role.INPUT,
        0,
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ),
    TensorKind(
        "self_attention.linear_qkv.bias",
        Role.BIAS,
        0,
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        switch="qkv_bias",
    ),
    TensorKind("self_attention.q_layernorm.weight", Role.NORM, None, ("self_attn.q_norm.weight",), switch="qk_norm"),
    TensorKind("self_attention.k_layernorm.weight", Role.NORM, None, ("self_attn.k_norm.weight",), switch="qk_norm"),
    TensorKind(
        "self_attention.q_layernorm.heads_weight",
        Role.NORM,
        0,
        ("self_attn.q_norm.weight",),
        switch="qk_norm_over_heads",
    ),
    TensorKind(
        "self_attention.k_layernorm.heads_weight",
        Role.NORM,
        0,
        ("self_attn.k_norm.weight",),
        switch="qk_norm_over_heads",
    ),
    TensorKind("self_attention.linear_proj.weight", Role.RESIDUAL, 1, ("self_attn.o_proj.weight",)),
    TensorKind(
        "self_attention.linear_proj.bias",
        Role.BIAS,
        None,
        ("self_attn.o_proj.bias",),
        switch="attention_output_bias",
    ),
    TensorKind(
        "attention_output_layernorm.weight",
        Role.NORM,
        None,
        ("post_attention_layernorm.weight",),
        switch="norm_outputs",
    ),
    TensorKind(
        "pre_mlp_layernorm.weight", Role.NORM, None, ("post_attention_layernorm.weight",), unless="norm_outputs"
    ),
    TensorKind("mlp.linear_fc1.weight", Role.INPUT, 0, ("mlp.gate_proj.weight", "mlp.up_proj.weight"), interleaved=2),
    TensorKind(
        "mlp.linear_fc1.bias",
        Role.BIAS,
        0,
        ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
        interleaved=2,
        switch="mlp_bias",
    ),
    TensorKind("mlp.linear_fc2.weight", Role.RESIDUAL, 1, ("mlp.down_proj.weight",)),
    TensorKind("mlp.linear_fc2.bias", Role.BIAS, None, ("mlp.down_proj.bias",), switch="mlp_bias"),
    TensorKind(
        "mlp_output_layernorm.weight",
        Role.NORM,
        None,
        ("post_feedforward_layernorm.weight",),
        switch="norm_outputs",
    ),
    TensorKind("decoder.final_layernorm.weight", Role.NORM, None, ("model.norm.weight",), in_layer=False),
    TensorKind("value_head.weight", Role.VALUE, None, ("score.weight",), in_layer=False, switch="value_head"),
    TensorKind("output_layer.weight", Role.VOCABULARY, 0, ("lm_head.weight",), in_layer=False),
)
EMBEDDING, VALUE, OUTPUT = TENSORS[0], TENSORS[-2], TENSORS[-1]
ADAPTER_MARK = ".adapter."
"""In the name of every tensor of an adapter, and of no other."""


def _factors(linear: str, down: int | None, up: int | None, interleaved: int = 1) -> tuple[TensorKind, ...]:
    """The tensors of one linear's adapter. ``down``, ``up``: the dimension of A and of B that ranks divide."""
    return (
        TensorKind(f"{linear}{ADAPTER_MARK}a", Role.ADAPTER, down, ()),
        TensorKind(f"{linear}{ADAPTER_MARK}b", Role.ADAPTER, up, (), interleaved=interleaved),
        TensorKind(f"{linear}{ADAPTER_MARK}m", Role.ADAPTER, up, (), interleaved=interleaved),
    )


ADAPTER_TENSORS = (
    *_factors("self_attention.linear_qkv", None, 0),
    *_factors("self_attention.linear_proj", 1, None),
    *_factors("mlp.linear_fc1", None, 0, interleaved=2),
    *_factors("mlp.linear_fc2", 1, None),
    # A row of A for each token: what is added to its embedding is B times that row.
    TensorKind(f"embedding{ADAPTER_MARK}a", Role.ADAPTER, 0, (), in_layer=False),
    TensorKind(f"embedding{ADAPTER_MARK}b", Role.ADAPTER, None, (), in_layer=False),
    TensorKind(f"output_layer{ADAPTER_MARK}a", Role.ADAPTER, None, (), in_layer=False),
    TensorKind(f"output_layer{ADAPTER_MARK}b", Role.ADAPTER, 0, (), in_layer=False),
)
"""A [rank of all kinds, in], B [out, rank] and, of DoRA, magnitudes [out] of the adapters (``model/adapters.py``,
``model/vocabulary_adapters.py``).
A model has them where a run trains them. Their sizes are those of the run's ``adapter`` section, so ``shape`` does not
know them."""
_BY_NAME = {kind.name: kind for kind in (*TENSORS, *ADAPTER_TENSORS)}


def split_name(name: str) -> tuple[TensorKind, int | None]:
    """The row of the table and the layer's number (None outside of the layers, and for a checkpoint's stacked layers)
    of a canonical name or a checkpoint's key. Raises KeyError for another name."""
    if not name.startswith(LAYERS):
        return _BY_NAME[name], None
    first, _, rest = name.removeprefix(LAYERS).partition(".")
    return (_BY_NAME[rest], int(first)) if first.isdigit() else (_BY_NAME[f"{first}.{rest}"], None)


def kind_of(name: str) -> TensorKind:
    """The row of the table for a canonical name or a checkpoint's key. Raises KeyError for another name."""
    return split_name(name)[0]


def is_matrix_of_layer(name: str) -> bool:
    """Whether a name, canonical or of a module's parameter, is that of a matrix inside the layers."""
    return name.startswith(LAYERS) and kind_of(name).role in (Role.INPUT, Role.RESIDUAL)


def all_names(model: ModelConfig) -> Iterator[str]:
    """Canonical names of all tensors, layer by layer."""
    present = [kind for kind in TENSORS if kind.exists(model)]
    inside = [kind for kind in present if kind.in_layer]
    yield EMBEDDING.name
    for layer in range(model.num_layers):
        yield from (kind.canonical_name(layer) for kind in inside)
    yield from (kind.name for kind in present[1:] if not kind.in_layer)


def canonical_parameters(chunk: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of a model chunk, adapters included, with their canonical names; a tied output projection has the
    embedding's."""
    for name, parameter in chunk.named_parameters():
        if name.startswith(LAYERS):
            kind, place = split_name(name)
            name = kind.canonical_name(chunk.decoder.layers[place].layer_number - 1)
        elif name == OUTPUT.name and chunk.share_embeddings_and_output_weights:
            name = EMBEDDING.name
        yield name, parameter


class Weight(Protocol):
    """A tensor of a model as it is held: a parameter, or a matrix whose values are stored with fewer bits."""

    @property
    def shape(self) -> torch.Size:
        """Shape of this process's part."""

    def copy_(self, values: Tensor) -> Any:
        """Takes values of that shape, of whatever dtype."""


def weights_of(chunk: nn.Module) -> Iterator[tuple[str, Weight]]:
    """The model's own tensors in a chunk, without adapters, with their canonical names."""
    for name, parameter in canonical_parameters(chunk):
        if ADAPTER_MARK not in name:
            yield name, getattr(parameter, "stored", parameter)
