"""A Llama decoder in plain torch, on interchangeable operators: what a training step of our kernels is
measured on where megatron-core is not installed. Weights come from transformers' LlamaForCausalLM, so that both are one
model. One GPU, no parallelism.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_kernels.attention.op import attention_qkv
from llm_kernels.cross_entropy.op import cross_entropy
from llm_kernels.rms_norm.op import add_rms_norm, rms_norm
from llm_kernels.rope.op import rope_qkv_
from llm_kernels.rope.ref import inverse_frequencies
from llm_kernels.rope.table import RopeTable
from llm_kernels.swiglu.op import swiglu


@dataclass(frozen=True)
class Shape:
    """Dimensions of a model."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocab: int

    @property
    def dim(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads

    def flops_per_token(self, tokens: int) -> float:
        """FLOPs of forward and backward per token: matrix products only, causal attention counted by half."""
        projections = self.hidden * self.dim * (2 * self.heads + 2 * self.groups) + 3 * self.hidden * self.ffn
        attention = tokens * self.heads * self.dim
        return 6.0 * (self.layers * (projections + attention) + self.hidden * self.vocab)


SHAPES = {
    "1b": Shape(16, 2048, 8192, 32, 8, 128256),
    "llama3-8b, 4 layers": Shape(4, 4096, 14336, 32, 8, 128256),
    "debug": Shape(2, 64, 176, 4, 2, 256),
}


@dataclass(frozen=True)
class Operators:
    """One implementation of all operators that are not matrix products. ``attend`` takes packed qkv [s, b, w]."""

    norm: Callable[[Tensor, Tensor], Tensor]
    add_norm: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    attend: Callable[[Tensor, RopeTable, Shape], Tensor]
    activate: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]


EPS = 1e-5


def ours(backend: str = "auto") -> Operators:
    """Our operators."""

    def attend(qkv: Tensor, table: RopeTable, shape: Shape) -> Tensor:
        rope_qkv_(qkv, table, num_groups=shape.groups, head_dim=shape.dim, backend=backend)
        packed = qkv.unflatten(2, (shape.groups, -1, shape.dim))
        return attention_qkv(packed, backend=backend).flatten(2)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        losses: Any = cross_entropy(logits, labels, inplace_backward=True, backend=backend)
        return losses.mean()

    return Operators(
        norm=lambda x, w: rms_norm(x, w, EPS, backend=backend),
        add_norm=lambda x, r, w: add_rms_norm(x, r, w, EPS, backend=backend),
        attend=attend,
        activate=lambda x: swiglu(x, inplace_backward=True, backend=backend),
        loss=loss,
    )


def plain() -> Operators:
    """torch's operators: fused norm and scaled dot product attention; the rest runs eagerly, or torch.compile fuses
    it."""

    def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, weight.shape, weight, EPS), total

    def attend(qkv: Tensor, table: RopeTable, shape: Shape) -> Tensor:
        packed = qkv.unflatten(2, (shape.groups, -1, shape.dim))
        q, k, v = packed[:, :, :, :-2].flatten(2, 3), packed[:, :, :, -2], packed[:, :, :, -1]
        cos, sin = (x.to(q.dtype) for x in table.full(q.shape[0]))

        def rotate(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return x * cos + torch.cat((-second, first), dim=-1) * sin

        heads = (x.permute(1, 2, 0, 3) for x in (rotate(q), rotate(k), v))
        out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=shape.heads != shape.groups)
        return out.permute(2, 0, 1, 3).flatten(2)

    def activate(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    return Operators(
        norm=lambda x, w: F.rms_norm(x, w.shape, w, EPS),
        add_norm=add_norm,
        attend=attend,
        activate=activate,
        loss=lambda logits, labels: F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()),
    )


class LlamaStack(nn.Module):
    """The decoder: tokens [s, b], with the sequence first as in megatron-core, → mean loss."""

    def __init__(self, shape: Shape, operators: Operators, tokens: int, device: torch.device | str) -> None:
        super().__init__()
        self.shape, self.operators = shape, operators
        width = (shape.heads + 2 * shape.groups) * shape.dim

        def matrix(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(rows, columns, device=device))

        self.embedding, self.output = (matrix(shape.vocab, shape.hidden) for _ in range(2))
        self.final_norm = nn.Parameter(torch.ones(shape.hidden, device=device))
        self.layers = nn.ModuleList()
        for _ in range(shape.layers):
            layer = nn.ParameterDict({
                "norm1": nn.Parameter(torch.ones(shape.hidden, device=device)), "qkv": matrix(width, shape.hidden),
                "proj": matrix(shape.hidden, shape.heads * shape.dim),
                "norm2": nn.Parameter(torch.ones(shape.hidden, device=device)),
                "fc1": matrix(2 * shape.ffn, shape.hidden), "fc2": matrix(shape.hidden, shape.ffn),
            })  # fmt: skip
            self.layers.append(layer)
        self.table = RopeTable.make(inverse_frequencies(shape.dim, 10000.0, device=torch.device(device)), tokens)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """tokens, labels: int64 [s, b]."""
        ops = self.operators
        stream = F.embedding(tokens, self.embedding)
        for layer in self.layers:
            attended = ops.attend(F.linear(ops.norm(stream, layer["norm1"]), layer["qkv"]), self.table, self.shape)
            normed, stream = ops.add_norm(F.linear(attended, layer["proj"]), stream, layer["norm2"])
            stream = stream + F.linear(ops.activate(F.linear(normed, layer["fc1"])), layer["fc2"])
        return ops.loss(F.linear(ops.norm(stream, self.final_norm), self.output), labels)

    @torch.no_grad()
    def load_transformers(self, model: Any) -> None:
        """Takes the weights of a transformers LlamaForCausalLM of the same shape."""
        shape = self.shape
        self.embedding.copy_(model.model.embed_tokens.weight)
        self.output.copy_(model.lm_head.weight)
        self.final_norm.copy_(model.model.norm.weight)
        for ours_, theirs in zip(self.layers, model.model.layers):
            attention, mlp = theirs.self_attn, theirs.mlp
            by_group = [
                getattr(attention, f"{name}_proj").weight.unflatten(0, (shape.groups, -1)) for name in ("q", "k", "v")
            ]
            ours_["qkv"].copy_(torch.cat(by_group, dim=1).flatten(0, 1))
            ours_["proj"].copy_(attention.o_proj.weight)
            ours_["fc1"].copy_(torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)))
            ours_["fc2"].copy_(mlp.down_proj.weight)
            ours_["norm1"].copy_(theirs.input_layernorm.weight)
            ours_["norm2"].copy_(theirs.post_attention_layernorm.weight)


def transformers_model(shape: Shape, device: torch.device | str) -> Any:
    """LlamaForCausalLM with scaled dot product attention and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.ffn, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.groups, vocab_size=shape.vocab,
        rms_norm_eps=EPS, rope_theta=10000.0, attn_implementation="sdpa", tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config)
