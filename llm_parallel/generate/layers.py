"""A model chunk's forward for generation: plain operators on the weights where they are.

The modules of training cost more than the matrix products where a pass has few tokens: each of megatron-core's calls
goes through several Python functions, and on a CPU each of torch's through the mode that ``parallel/platform.py``
installs. The weights are those of the modules themselves, looked up once, so a training step changes them here too.
Tokens are never divided over tensor-parallel ranks, whatever ``sequence_parallel`` says of training.

Shapes: T tokens of a pass, H hidden, N query heads and G key/value groups of this process, M = N/G, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llm_kernels.rms_norm.op import rms_norm
from llm_kernels.swiglu.op import swiglu
from llm_parallel.generate import deterministic
from llm_parallel.generate.adapters import AdapterBank
from llm_parallel.generate.extension import MOST_ROWS, few_rows
from llm_parallel.generate.native import NativeAttention, NativeChunk, can_read
from llm_parallel.generate.paged import AttentionOptions, LayerCache, Pass, attend
from llm_parallel.generate.paging import Paging
from llm_parallel.generate.seen import PageArrays
from llm_parallel.generate.sizes import in_few_sizes
from llm_parallel.model.deterministic import gated
from llm_parallel.model.gpt import LlamaModel
from llm_parallel.model.modules import HeadsNorm, OutputNormLayer, RMSNorm
from llm_parallel.model.vocabulary_adapters import vocabulary_adapters

Function = Callable[[Tensor], Tensor]


def _onednn() -> Any:
    """torch's linear operator over oneDNN, or None where it has none."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def product(weight: Tensor) -> Function:
    """x [T, in] → x Wᵀ [T, out]. fp32 on a CPU goes through oneDNN: on an AMD EPYC all products of SmolLM2-135M take 27
    ms instead of 34 for one token, 36 instead of 62 for two and 52 instead of 85 for 16, against the library that
    ``F.linear`` calls there (one thread, weights read from memory)."""
    packed: Function | None = getattr(weight, "packed", None)  # in few bits, for generation alone
    if packed is not None:
        return packed
    stored = getattr(weight, "stored", None)  # in few bits, under adapters
    if stored is not None:
        return in_few_sizes(lambda x: F.linear(x, stored.values(x.dtype)))
    onednn = _onednn() if weight.device.type == "cpu" and weight.dtype == torch.float32 else None
    if onednn is None:
        return few_rows(weight, in_few_sizes(lambda x: F.linear(x, weight)))
    return few_rows(weight, in_few_sizes(lambda x: onednn(x, weight, None, "none", [], "")))


def norm(module: Any) -> Function:
    """The RMSNorm of a module over the last dim."""
    weight, eps, backend = module.weight, module.eps, module.backend
    if weight.is_cuda or backend == "triton" or module.deterministic:
        return lambda x: rms_norm(x, weight, eps, backend=backend)
    shape = tuple(weight.shape)
    return lambda x: F.rms_norm(x, shape, weight, eps)


def heads_norm(module: Any) -> Function | None:
    """The norm of queries or keys [T, heads, D], or None where there is none."""
    if isinstance(module, RMSNorm):
        return norm(module)
    if not isinstance(module, HeadsNorm):
        return None
    if module.deterministic:
        return deterministic.over_heads(module)
    weight, eps, channels, group = module.heads_weight, module.eps, module.channels, module.group

    def over_heads(x_TND: Tensor) -> Tensor:
        x = x_TND.flatten(1).float()
        squares = x.square().sum(-1, keepdim=True)
        if x.shape[-1] != channels:
            dist.all_reduce(squares, group=group)
        normed = x * torch.rsqrt(squares / channels + eps) * weight.float()
        return normed.to(x_TND.dtype).view(x_TND.shape)

    return over_heads


def column(module: Any, bank: AdapterBank | None = None, shared: Tensor | None = None) -> Function:
    """A linear whose rows ranks divide: x [T, H] → this rank's columns of the output. ``shared``: the weight, if it is
    not the module's own."""
    added = None if bank is None else bank.added(module)
    weight = module.weight if shared is None else shared
    if module.config.kernels.deterministic:
        return deterministic.column(module, added, weight)
    multiply, bias, adapter = product(weight), module.bias, module.adapter
    wide_b = None if adapter is None else adapter.wide_b()
    low_rank = in_few_sizes(lambda x: F.linear(F.linear(x, adapter.a), wide_b))
    gain = None if adapter is None or adapter.m is None else adapter.gain(module.weight)

    def forward(x: Tensor) -> Tensor:
        y = multiply(x)
        if wide_b is not None and adapter.on:
            y.add_(low_rank(x), alpha=adapter.scale)
            y = y if gain is None else y * gain.to(y.dtype)
        if bias is not None:
            y += bias
        return y if added is None else added(y, x)

    return forward


def row(module: Any, group: Any, bank: AdapterBank | None = None) -> Function:
    """A linear whose columns ranks divide: this rank's columns of the input → the whole output [T, H]."""
    added = None if bank is None else bank.added(module, group)
    if module.config.kernels.deterministic:
        return deterministic.row(module, group, added)
    multiply, bias, adapter = product(module.weight), module.bias, module.adapter
    several = group.size() > 1
    low_rank = in_few_sizes(lambda x: F.linear(F.linear(x, adapter.a), adapter.b))
    gain = None if adapter is None or adapter.m is None else adapter.gain(module.weight)

    def forward(x: Tensor) -> Tensor:
        y = multiply(x)
        if adapter is not None and adapter.on:
            # B is whole on every rank, so the ranks' parts of B A x add up to it as those of W x do.
            y.add_(low_rank(x), alpha=adapter.scale)
        if several:
            dist.all_reduce(y, group=group)
        if gain is not None and adapter.on:
            y = y * gain.to(y.dtype)
        if bias is not None:
            y += bias
        return y if added is None else added(y, x)

    return forward


def rotate(x: Tensor, info: Pass) -> Tensor:
    """Rotates [T, …, …, D] in fp32."""
    wide = x.float()
    half = x.shape[-1] // 2
    out = wide * info.cos
    return out.addcmul_(wide.roll(half, -1), info.sin).to(x.dtype)


class AttentionLayer:
    """Projection, norms of queries and keys, rotation, cache, attention, output projection: [T, H] → [T, H]."""

    def __init__(self, module: Any, cache: LayerCache, bank: AdapterBank | None = None) -> None:
        core, config = module.core_attention, module.config
        self.cache = cache
        self.group = module.pg_collection.tp
        self.tp, self.tp_rank = self.group.size(), self.group.rank()
        self.head_dim = core.head_dim
        # With more ranks than groups, each group's heads are divided over several ranks, all of which hold its keys.
        self.sharing = max(self.tp // config.num_query_groups, 1)
        self.groups = max(config.num_query_groups // self.tp, 1)
        self.project = column(module.linear_qkv, bank)
        self.output = row(module.linear_proj, self.group, bank)
        self.norm_q, self.norm_k = heads_norm(module.q_layernorm), heads_norm(module.k_layernorm)
        self.rotates = core.rotates
        self.options = AttentionOptions(core.scale, core.window[0], core.softcap, core.kernels.attention)
        members = config.num_attention_heads // self.tp // self.groups
        native = NativeAttention.of(cache, members, self.options)
        self.attend = deterministic.attend if config.kernels.deterministic else native or attend

    def __call__(self, x_TH: Tensor, info: Pass) -> Tensor:
        qkv = self._whole_groups(self.project(x_TH))
        per_group = qkv.shape[2] - 2
        if self.norm_q is None and self.norm_k is None and self.sharing == 1:
            qk = qkv[:, :, : per_group + 1]
            qk = rotate(qk, info) if self.rotates else qk
            q, k = qk[:, :, :per_group], qk[:, :, per_group]
        else:
            q, k = self._apart(qkv, info)
        self.cache.k.index_copy_(0, info.slots, k)
        self.cache.v.index_copy_(0, info.slots, qkv[:, :, per_group + 1])
        return self.output(self.attend(q, self.cache, info, self.options))

    def _whole_groups(self, qkv_TW: Tensor) -> Tensor:
        """[T, G, M + 2, D] of this rank's groups: for each its query heads, its key and its value. Where ranks share a
        group, all of its query heads."""
        if self.sharing > 1:
            parts = [torch.empty_like(qkv_TW) for _ in range(self.tp)]
            dist.all_gather(parts, qkv_TW, group=self.group)
            first = self.tp_rank // self.sharing * self.sharing
            qkv_TW = torch.cat(parts[first : first + self.sharing], dim=-1)
        return qkv_TW.view(qkv_TW.shape[0], self.groups, -1, self.head_dim)

    def _apart(self, qkv: Tensor, info: Pass) -> tuple[Tensor, Tensor]:
        """Queries [T, G, M, D] and keys [T, G, D], normalized and rotated."""
        q, k = qkv[:, :, :-2], qkv[:, :, -2]
        if self.sharing > 1:
            q = q.unflatten(2, (self.sharing, -1))[:, :, self.tp_rank % self.sharing]
        shape = q.shape
        if self.norm_q is not None:
            q = self.norm_q(q.reshape(shape[0], -1, self.head_dim).contiguous()).view(shape)
        if self.norm_k is not None:
            k = self.norm_k(k.contiguous())
        if self.rotates:
            q, k = rotate(q, info), rotate(k.unsqueeze(2), info).squeeze(2)
        return q, k


class Layer:
    """One layer on the residual stream [T, H]."""

    def __init__(self, module: Any, cache: LayerCache, bank: AdapterBank | None = None) -> None:
        self.attention = AttentionLayer(module.self_attention, cache, bank)
        group = module.self_attention.pg_collection.tp
        up, down = module.mlp.linear_fc1, module.mlp.linear_fc2
        self.up, self.down = column(up, bank), row(down, group, bank)
        self.norms_outputs = isinstance(module, OutputNormLayer)
        if self.norms_outputs:
            norms = module.attention_output_layernorm, module.mlp_output_layernorm
        else:
            norms = module.input_layernorm, module.pre_mlp_layernorm
        self.norm_attention, self.norm_mlp = map(norm, norms)
        self.kernels = module.config.kernels

    def __call__(self, x_TH: Tensor, info: Pass) -> Tensor:
        if self.norms_outputs:
            x_TH = x_TH + self.norm_attention(self.attention(x_TH, info))
            return x_TH + self.norm_mlp(self._mlp(x_TH))
        x_TH = x_TH + self.attention(self.norm_attention(x_TH), info)
        return x_TH + self._mlp(self.norm_mlp(x_TH))

    def _mlp(self, x_TH: Tensor) -> Tensor:
        wide = self.up(x_TH)
        if self.kernels.deterministic:
            return self.down(gated(wide))
        if wide.is_cuda or self.kernels.swiglu == "triton":
            return self.down(swiglu(wide, backend=self.kernels.swiglu))
        gate, up = wide.chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up))


class PlainChunk:
    """One model chunk. Adapters are looked up once too: make it anew when they have changed. Call it within
    ``torch.inference_mode``."""

    def __init__(self, model: LlamaModel, caches: Sequence[LayerCache], bank: AdapterBank | None = None) -> None:
        self.model = model
        self.group = model.groups.collection.tp
        self.layers = [Layer(layer, cache, bank) for layer, cache in zip(model.decoder.layers, caches)]
        self.is_first, self.is_last = model.pre_process, model.post_process
        self.paging: Paging | PageArrays | None = Paging.of(model)
        if self.paging is None and not model.config.kernels.deterministic and all(map(can_read, caches)):
            self.paging = PageArrays()
        output = None
        if self.is_first:
            self.embedding = model.embedding.word_embeddings.weight
            self.embedding_adapter = getattr(model.embedding, "adapter", None)
        if self.is_last:
            tied = model.share_embeddings_and_output_weights
            output = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
            self.norm = norm(model.decoder.final_layernorm)
            self.output = column(model.output_layer, shared=output)
        plain = bank is None and not any(vocabulary_adapters([model]))
        self.native = NativeChunk.of(model, caches, output) if plain else None

    def __call__(self, x_TH: Tensor | None, info: Pass) -> Tensor:
        """The stream of the chunk before (None for the first) → the stream after this one."""
        if self.is_first:
            x_TH = self._embed(info.tokens)
        assert x_TH is not None
        if self.native is not None and info.is_small:
            return self.native.forward(x_TH, info)
        for layer in self.layers:
            x_TH = layer(x_TH, info)
        return x_TH

    def _embed(self, tokens: Tensor) -> Tensor:
        found, adapter = self._embedded(tokens), self.embedding_adapter
        if adapter is None or not adapter.on:
            return found
        low = adapter.rows(tokens)
        if self.group.size() > 1:
            dist.all_reduce(low, group=self.group)
        if adapter.deterministic:
            return found + adapter.scale * deterministic.linear(adapter.b)(low)
        return torch.addmm(found, low, adapter.b.t(), alpha=adapter.scale)

    def _embedded(self, tokens: Tensor) -> Tensor:
        if self.group.size() == 1:
            return self.embedding.index_select(0, tokens)
        held = self.embedding.shape[0]
        places = tokens - self.group.rank() * held
        outside = (places < 0) | (places >= held)
        found = self.embedding.index_select(0, places.clamp(0, held - 1)).masked_fill_(outside.unsqueeze(1), 0.0)
        dist.all_reduce(found, group=self.group)
        return found

    def logits(self, x_RH: Tensor) -> Tensor:
        """Rows of the last chunk's stream → logits of the whole vocabulary, fp32 [R, v], on every rank."""
        model = self.model.model_config
        if self.native is not None and x_RH.shape[0] <= MOST_ROWS:
            logits = self.native.logits(x_RH)
        else:
            logits = self.output(self.norm(x_RH)).float()
        if self.group.size() > 1:
            parts = [torch.empty_like(logits) for _ in range(self.group.size())]
            dist.all_gather(parts, logits, group=self.group)
            logits = torch.cat(parts, dim=-1)
        if model.output_softcap:
            logits = model.output_softcap * torch.tanh(logits / model.output_softcap)
        return logits[:, : model.vocab_size]
