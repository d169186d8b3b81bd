"""Passes of few tokens on a CPU by the C++ extension ``llm_parallel._decode``, on the same weights and the same cache.

With few tokens a pass is a stream of the weights out of memory, and torch's operators leave half of that speed: a call
costs 1 to 5 microseconds, and a layer takes some 15; attention over pages is a call for each sequence. Here a whole
model chunk is one call, and the numbers of a token depend on neither the other tokens of the pass nor the number of
threads. Without the extension, which needs a C++ compiler, and for what it does not know (several tensor-parallel
ranks, adapters, kernels of Triton, ``kernels.deterministic``), ``layers.py`` computes the same by torch's operators.

Shapes: T tokens of a pass, H hidden, N query heads and G key/value groups of this process, M = N/G, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llm_parallel.generate.extension import KINDS, is_built, matrix_of
from llm_parallel.generate.extension import _decode as extension
from llm_parallel.generate.paged import AttentionOptions, LayerCache, Pass, attend
from llm_parallel.model.gpt import LlamaModel
from llm_parallel.model.modules import HeadsNorm, OutputNormLayer, RMSNorm


def can_read(cache: LayerCache) -> bool:
    """Whether the extension is there and can read a cache."""
    return is_built() and cache.k.is_cpu and cache.k.dtype in KINDS


class NativeAttention:
    """Attention of a layer: single tokens by the extension, chunks of prompts by torch."""

    def __init__(self, shape: Any, cache: LayerCache, options: AttentionOptions) -> None:
        self._shape = shape
        self._layer = extension.Layer(_about_keys(cache, options))

    @staticmethod
    def of(cache: LayerCache, members: int, options: AttentionOptions) -> NativeAttention | None:
        """None where the extension cannot read the cache."""
        if not can_read(cache):
            return None
        groups, head_dim = cache.k.shape[1:]
        return NativeAttention(extension.Shape(0, 0, groups, members, head_dim), cache, options)

    def __call__(self, q_TGMD: Tensor, cache: LayerCache, info: Pass, options: AttentionOptions) -> Tensor:
        """As ``paged.attend``."""
        if info.seen is None:
            return attend(q_TGMD, cache, info, options)
        count = len(q_TGMD) if info.is_small else info.num_singles
        out = q_TGMD.new_empty(q_TGMD.shape[0], q_TGMD[0].numel())
        q = q_TGMD[:count].contiguous()
        bfloat, threads = q.dtype == torch.bfloat16, torch.get_num_threads()
        extension.attend(
            self._shape,
            self._layer,
            q.data_ptr(),
            count,
            info.seen.addresses(info.slots, info.cos, info.sin),
            out.data_ptr(),
            bfloat,
            threads,
        )
        if count < len(q_TGMD):
            out[count:] = attend(q_TGMD, cache, info, options, after=count)
        return out


class NativeChunk:
    """A whole model chunk, and the logits of the last one."""

    def __init__(self, model: LlamaModel, caches: Sequence[LayerCache], layers: Sequence[Any], output: Any) -> None:
        config = model.model_config
        groups = config.num_query_groups
        members = config.num_attention_heads // groups
        wide = model.decoder.layers[0].mlp.linear_fc2.weight
        wide = getattr(wide, "packed", wide).shape[1]
        shape = extension.Shape(config.hidden_size, wide, groups, members, config.kv_channels)
        self._chunk = extension.Chunk(shape, [extension.Layer(layer) for layer in layers])
        self._caches, self._model = caches, model  # which hold the memory
        self._output = output
        if output is not None:
            norm = model.decoder.final_layernorm
            self._norm, self._eps = norm.weight.detach().float().numpy(), norm.eps

    @staticmethod
    def of(model: LlamaModel, caches: Sequence[LayerCache], output: Tensor | None) -> NativeChunk | None:
        """None for what the extension does not know. ``output``: the last chunk's matrix."""
        kernels = model.config.kernels
        triton = "triton" in (kernels.rms_norm, kernels.swiglu, kernels.attention)
        if not is_built() or triton or kernels.deterministic or model.groups.mesh.tp > 1 or not len(caches):
            return None
        layers = [_layer(module, cache) for module, cache in zip(model.decoder.layers, caches)]
        last = None if output is None else matrix_of(output)
        if any(layer is None for layer in layers) or (last is None and output is not None):
            return None
        return NativeChunk(model, caches, layers, None if last is None else (last, output))

    def forward(self, x_TH: Tensor, info: Pass) -> Tensor:
        """The stream of the chunk before → the stream after this one, for passes that have ``seen``."""
        assert info.seen is not None
        x = x_TH.to(torch.float32, copy=True)
        self._chunk.forward(
            x.data_ptr(), len(x), info.seen.addresses(info.slots, info.cos, info.sin), torch.get_num_threads()
        )
        return x.to(x_TH.dtype)

    def logits(self, x_RH: Tensor) -> Tensor:
        """Rows of the last chunk's stream → fp32 [R, rows of the output matrix]."""
        x, (matrix, weight) = x_RH.contiguous(), self._output
        y = torch.empty(len(x), getattr(weight, "packed", weight).shape[0])
        bfloat, threads = x.dtype == torch.bfloat16, torch.get_num_threads()
        extension.logits(matrix, self._norm, self._eps, x.data_ptr(), len(x), bfloat, y.data_ptr(), threads)
        return y


def _about_keys(cache: LayerCache, options: AttentionOptions) -> dict[str, Any]:
    groups, head_dim = cache.k.shape[1:]
    bfloat = cache.k.dtype == torch.bfloat16
    return {
        "cache": (cache.k.data_ptr(), cache.v.data_ptr(), bfloat, groups, head_dim, cache.page_tokens),
        "scale": options.scale,
        "softcap": options.softcap,
        "left": options.left,
    }


def _layer(module: Any, cache: LayerCache) -> dict[str, Any] | None:
    """A layer's parts for the extension; None if there is one that it does not know."""
    attention, mlp = module.self_attention, module.mlp
    linears = {
        "qkv": attention.linear_qkv,
        "output": attention.linear_proj,
        "up": mlp.linear_fc1,
        "down": mlp.linear_fc2,
    }
    if any(linear.adapter is not None for linear in linears.values()) or not can_read(cache):
        return None
    matrices = {name: matrix_of(linear.weight) for name, linear in linears.items()}
    if any(matrix is None for matrix in matrices.values()):
        return None
    core = attention.core_attention
    query, key = attention.q_layernorm, attention.k_layernorm
    kinds = {type(norm) for norm in (query, key) if isinstance(norm, (RMSNorm, HeadsNorm))}
    if len({issubclass(kind, HeadsNorm) for kind in kinds}) > 1:
        return None
    norms_outputs = isinstance(module, OutputNormLayer)
    if norms_outputs:
        before, after = module.attention_output_layernorm, module.mlp_output_layernorm
    else:
        before, after = module.input_layernorm, module.pre_mlp_layernorm
    eps = {norm.eps for norm in (before, after, query, key) if isinstance(norm, (RMSNorm, HeadsNorm))}
    if len(eps) > 1:
        return None
    options = AttentionOptions(core.scale, core.window[0], core.softcap, core.kernels.attention)
    return {
        **_about_keys(cache, options),
        **matrices,
        **{f"{name}_bias": _numbers(linear.bias) for name, linear in linears.items()},
        "attention_norm": _numbers(before.weight),
        "mlp_norm": _numbers(after.weight),
        "query_norm": _norm_weight(query),
        "key_norm": _norm_weight(key),
        "norms_all_heads": any(issubclass(kind, HeadsNorm) for kind in kinds),
        "eps": eps.pop(),
        "rotates": core.rotates,
        "norms_outputs": norms_outputs,
    }


def _norm_weight(module: Any) -> Any:
    if isinstance(module, HeadsNorm):
        return _numbers(module.heads_weight)
    return _numbers(module.weight) if isinstance(module, RMSNorm) else None


def _numbers(values: Tensor | None) -> Any:
    return None if values is None else values.detach().float().numpy()
