"""Parameters and floating-point operations of a model, in closed form.

Published MFU figures follow several conventions that differ by up to 12 % for a Llama 8B; a figure without its
convention's name says little. Two are offered here, both counting what the model needs, never what recomputation adds
(that would be HFU), and both over the vocabulary without padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm_parallel.config.tree import ModelConfig
from llm_parallel.config.tree_tune import AdapterConfig
from llm_parallel.errors import UserError

Convention = Literal["model", "megatron"]

CONVENTIONS: dict[str, str] = {
    "model": "matrix multiplies and causal (half) attention, recomputation not counted",
    "megatron": "matrix multiplies and full (square) attention, recomputation not counted",
}


@dataclass(frozen=True)
class ParameterCount:
    """Trainable parameters of a model, by part. ``output`` is 0 where it shares the embedding's matrix."""

    num_layers: int
    embedding: int
    attention_per_layer: int
    mlp_per_layer: int
    norms_per_layer: int
    biases_per_layer: int
    final_norm: int
    output: int

    @property
    def per_layer(self) -> int:
        """Parameters of one transformer layer, norms and biases included."""
        return self.attention_per_layer + self.mlp_per_layer + self.norms_per_layer + self.biases_per_layer

    @property
    def norms(self) -> int:
        """Norm weights of the whole model."""
        return self.num_layers * self.norms_per_layer + self.final_norm

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.num_layers * self.per_layer + self.final_norm + self.output


def parameter_count(model: ModelConfig) -> ParameterCount:
    """Parameters of ``model``, vocabulary without padding. Raises UserError if the vocabulary size is not known."""
    hidden, head = model.hidden_size, model.kv_channels
    vocabulary = _vocabulary(model)
    query_and_output = 2 * hidden * model.num_attention_heads * head
    key_and_value = 2 * hidden * model.num_query_groups * head
    return ParameterCount(
        num_layers=model.num_layers,
        embedding=vocabulary * hidden,
        attention_per_layer=query_and_output + key_and_value,
        mlp_per_layer=3 * hidden * model.ffn_hidden_size,
        norms_per_layer=2 * hidden
        + 2 * head * model.qk_norm
        + (model.num_attention_heads + model.num_query_groups) * head * model.qk_norm_over_heads,
        biases_per_layer=(model.num_attention_heads + 2 * model.num_query_groups) * head * model.qkv_bias
        + hidden * model.attention_output_bias
        + (2 * model.ffn_hidden_size + hidden) * model.mlp_bias,
        final_norm=hidden,
        output=0 if model.tie_embeddings else vocabulary * hidden,
    )


def forward_flops_per_token(model: ModelConfig, seq_length: int, convention: Convention = "model") -> int:
    """FLOPs of one token's forward pass in a sample of ``seq_length`` tokens; a multiply and an add are two.

    Counted are the weights' matrix multiplies (two FLOPs per weight; the output projection also when tied, the
    embedding look-up never) and the two products of core attention, with as many heads as there are queries: grouped
    keys save memory, not FLOPs. Norms, RoPE, SwiGLU's product, softmax and loss are not counted.

    ``model``: a token attends to half of the sample, as causal attention needs (PaLM's MFU, arXiv 2204.02311 appendix
    B, with the mask taken into account; Megatron-LM since 2025 and Megatron-Bridge). ``megatron``: to all of it, as in
    Korthikanti et al. 2022 (arXiv 2205.05198, appendix A) and the H100 table of Megatron-LM's README. Neither knows
    about document boundaries: packed samples count like whole ones. A window (``model.window_tokens``) counts under
    ``model`` alone.
    """
    count = parameter_count(model)
    weights = model.num_layers * (count.attention_per_layer + count.mlp_per_layer)
    output = _vocabulary(model) * model.hidden_size
    # Scores and their product with V: 2 x 2 FLOPs for each attended token and channel.
    square = 4 * seq_length * model.num_attention_heads * model.kv_channels * model.num_layers
    seen = min(model.window_tokens or seq_length, seq_length)
    # Of a sample of s tokens, a window of w sees w - w^2 / 2s on average: half of the sample if it is the whole.
    causal = square // 2 if seen == seq_length else square * (2 * seq_length - seen) * seen // (2 * seq_length**2)
    attention = {"model": causal, "megatron": square}[convention]
    return 2 * (weights + output) + attention


def flops_per_token(
    model: ModelConfig, seq_length: int, convention: Convention = "model", adapter: AdapterConfig | None = None
) -> int:
    """FLOPs of training on one token: forward once, and backward twice that (gradients of inputs and of weights). With
    adapters the frozen weights need no gradient of their own, and the adapters are counted.

    See ``forward_flops_per_token`` for what a convention counts. Raises UserError if the vocabulary size is not known.
    """
    whole = 3 * forward_flops_per_token(model, seq_length, convention)
    if adapter is None:
        return whole
    count = parameter_count(model)
    frozen = (
        model.num_layers * (count.attention_per_layer + count.mlp_per_layer) + _vocabulary(model) * model.hidden_size
    )
    beside = whole_parameters(model, adapter)
    if "lm_head" in adapter.modules_to_save:
        frozen -= _vocabulary(model) * model.hidden_size
    return whole - 2 * frozen + 6 * (adapter_parameters(model, adapter) - beside)


def whole_parameters(model: ModelConfig, adapter: AdapterConfig) -> int:
    """Parameters of the model's own that are trained beside its adapters."""
    tables = len(set(adapter.modules_to_save))
    matrices = min(tables, 1) if model.tie_embeddings else tables
    return (matrices * _vocabulary(model) if matrices else 0) * model.hidden_size + model.value_head * model.hidden_size


def adapter_parameters(model: ModelConfig, adapter: AdapterConfig) -> int:
    """Parameters that a run of adapters trains: those of all adapters, and of what is trained beside them."""
    heads, groups = (count * model.kv_channels for count in (model.num_attention_heads, model.num_query_groups))
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    sides = {
        "q": hidden + heads,
        "k": hidden + groups,
        "v": hidden + groups,
        "o": heads + hidden,
        "gate": hidden + ffn,
        "up": hidden + ffn,
        "down": ffn + hidden,
    }
    rows = {"q": heads, "k": groups, "v": groups, "o": hidden, "gate": ffn, "up": ffn, "down": hidden}
    magnitudes = sum(rows[target] for target in set(adapter.targets) & set(rows)) if adapter.dora else 0
    in_layers = set(adapter.targets) & set(sides)
    layers = model.num_layers * (adapter.rank * sum(sides[target] for target in in_layers) + magnitudes)
    on_vocabulary = len(set(adapter.targets) - in_layers)
    of_vocabulary = on_vocabulary and on_vocabulary * adapter.rank * (_vocabulary(model) + hidden)
    return layers + of_vocabulary + whole_parameters(model, adapter)


def _vocabulary(model: ModelConfig) -> int:
    if model.vocab_size is None:
        raise UserError("model.vocab_size is not set and no tokenizer gave it; set it or data.tokenizer")
    return model.vocab_size
