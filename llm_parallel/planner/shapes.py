"""What is planned: the dimensions of a model and how it is trained on GPUs. Imports no framework."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from llm_parallel.config.tree import ModelConfig, RunConfig
from llm_parallel.config.tree_tune import AdapterConfig
from llm_parallel.errors import UserError

Recompute = Literal["none", "selective", "ops", "qkv", "full"]
"""What backward computes again. ``none``; ``selective``: attention scores; ``ops``: everything except attention and
every second matrix product (torch's selective activation checkpointing); ``qkv``: everything except queries, keys and
values (MaxText's save_qkv_proj); ``full``: whole layers."""
Precision = Literal["fp32", "fp16", "bf16", "fp8"]


@dataclass(frozen=True)
class Experts:
    """The feed-forward part of a layer as a mixture of experts (Shazeer et al. 2017, arXiv 1701.06538; Lepikhin et al.
    2020, GShard, arXiv 2006.16668), without a capacity (Gale et al. 2022, MegaBlocks, arXiv 2211.15841)."""

    count: int
    """Experts of a layer."""
    active: int
    """Experts that a token goes through."""
    ffn: int
    """Width of one expert."""


@dataclass(frozen=True)
class Shape:
    """Dimensions of a decoder. Where it has experts, ``ffn`` is the width of what all tokens go through beside them,
    which may be 0."""

    layers: int
    """Transformer layers."""
    hidden: int
    """Width of the residual stream."""
    heads: int
    """Attention heads of the queries."""
    groups: int
    """Heads of keys and values."""
    ffn: int
    """Width of the feed-forward part, of one matrix where it is gated."""
    vocab: int
    """Tokens of the vocabulary."""
    head_dim: int = 0
    """Width of a head; 0: ``hidden / heads``."""
    gated: bool = True
    """Whether the feed-forward part is SwiGLU, with two matrices up, rather than GELU with one."""
    dropout: bool = False
    """Whether there is dropout as in GPT, whose masks backward needs."""
    tied: bool = False
    """Whether the output projection is the embedding."""
    rotary: bool = True
    """Whether positions are rotary (RoPE) rather than a learned table."""

    window: int = 0
    """Tokens that a query attends to; 0: all before it."""
    divided_vectors: int = 0
    """Weights of a layer's biases and norms, besides the two norms of the residual stream, that tensor parallelism
    divides."""
    whole_vectors: int = 0
    """The same, that every tensor-parallel rank holds."""
    qk_norm: Literal["none", "each", "wide"] = "none"
    """Norms of queries and keys: of each head, or of all heads together."""
    experts: Experts | None = None
    """Experts of every layer; None: it is dense. Our trainer has none."""

    @property
    def channels(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden // self.heads

    @property
    def layer_matrices(self) -> int:
        """Number of weights in one layer's matrices."""
        attention = self.hidden * self.channels * (2 * self.heads + 2 * self.groups)
        return attention + (3 if self.gated else 2) * self.hidden * self.ffn

    @property
    def layer_parameters(self) -> int:
        """Number of all weights of one layer."""
        return self.layer_matrices + 2 * self.hidden + self.divided_vectors + self.whole_vectors

    @property
    def expert_matrices(self) -> int:
        """Number of weights of one layer's experts."""
        return self.experts.count * self.one_expert if self.experts else 0

    @property
    def one_expert(self) -> int:
        """Number of weights of one expert."""
        return (3 if self.gated else 2) * self.hidden * self.experts.ffn if self.experts else 0

    @property
    def router(self) -> int:
        """Number of weights of one layer's router."""
        return self.experts.count * self.hidden if self.experts else 0

    @property
    def parameters(self) -> int:
        """Number of all weights."""
        ends = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * (self.layer_parameters + self.expert_matrices + self.router) + ends + self.hidden

    def seen(self, seq: int) -> float:
        """Share of a sample of ``seq`` tokens that a token attends to, on average."""
        window = min(self.window or seq, seq)
        return (2 * seq - window) * window / (2 * seq**2)

    def flops_per_token(self, seq: int, causal: bool = False) -> float:
        """Training FLOPs of one token of a sample of ``seq``, recomputation not counted; ``causal`` counts half of
        attention, or what a window sees (see model/flops.py for the conventions)."""
        attention = 4 * seq * self.heads * self.channels * self.layers * (self.seen(seq) if causal else 1.0)
        active = self.router + self.one_expert * (self.experts.active if self.experts else 0)
        matrices = self.layers * (self.layer_matrices + active) + self.vocab * self.hidden
        return 3.0 * (2 * matrices + attention)


@dataclass(frozen=True)
class Strategy:
    """How a model is trained: its layout over GPUs, and what the software does."""

    gpus: int
    """GPUs in all."""
    global_batch: int
    """Samples of a step."""
    micro_batch: int
    """Samples of one forward pass."""
    seq: int
    """Tokens of a sample."""
    tp: int = 1
    """Tensor-parallel size."""
    pp: int = 1
    """Pipeline stages."""
    cp: int = 1
    """Context-parallel size."""
    vpp: int = 1
    """Model chunks of a pipeline stage; over 1 the schedule is interleaved."""
    ep: int = 1
    """Expert-parallel size: ranks among data- and context-parallel ones that divide the experts."""
    recompute: Recompute = "none"
    """Activations that backward computes again."""
    sequence_parallel: bool = True
    """Whether norms and residuals are divided along the sequence within a tensor-parallel group."""
    zero: int = 1
    """What replicas divide among them (Rajbhandari et al. 2020, arXiv 1910.02054): 0: nothing (DDP); 1: optimizer
    state; 2: accumulated gradients too; 3: weights too (FSDP)."""
    precision: Precision = "bf16"
    """Number format of the matrix products."""
    flash: bool = True
    """Whether attention is fused, so that its scores are never written to memory."""
    te: bool = False
    """Whether the kernels are Transformer Engine's."""
    flash_rate: float = 1.0
    """Rate of fused attention, relative to FlashAttention 2's (Transformer Engine's where ``te``)."""
    keeps_gathered: bool = False
    """Whether backward keeps the inputs that sequence parallelism gathered, rather than gathering them again."""
    cp_gathers: bool = True
    """Whether context parallelism gathers the whole sample's keys and values, as ours does, rather than sending them
    around a ring."""
    fused: bool = True
    """Whether elementwise operators are fused, by hand or by a compiler."""
    overlap_tp: bool = False
    """Whether tensor parallelism communicates beside compute."""
    overlap_dp: bool = True
    """Whether gradients are reduced, and weights gathered, beside compute."""
    overlap_pp: bool = True
    """Whether pipeline stages send beside compute."""
    prefetches: bool = True
    """Whether FSDP gathers a layer's weights beside the backward of the layer before it, rather than after it."""
    grad_bytes: int = 4
    """Bytes of a parameter's accumulated gradient."""
    logit_bytes: int = 2
    """Bytes that a logit takes at the loss, with its gradient and copies."""
    adds_gradients: bool = False
    """Whether an operator of its own adds each micro batch's gradients to the accumulated ones, rather than the product
    that makes them."""
    copied_grad_bytes: int = 0
    """Bytes of a parameter's gradients beside the accumulated one: backward's own, and buckets."""
    dp_collectives: int = 0
    """Collectives that reduce a sharded optimizer's gradients in a step; 0: as many as megatron-core has buckets."""
    early_stop: bool = False
    """Whether recomputation leaves out a layer's last product, whose result backward does not read."""
    keeps_gate: bool = False
    """Whether backward keeps a SwiGLU's activated gate beside its product with the other half."""
    stage_layers: tuple[int, ...] | None = None
    """Layers of each model chunk in the order of the layers, where they are not even."""
    adapter: AdapterConfig | None = None
    """Adapters that are trained in place of the weights."""
    document: int = 0
    """Tokens of a document, where several share a sample and do not see each other; 0: a token sees its sample."""
    plain: bool = False
    """Whether norms, rotation and attention are torch's operators, as on a CPU, which keep more than our kernels. Only
    memory knows of it."""
    moment_bits: int = 32
    """Bits of AdamW's moments; 8: with a scale for each block. Only memory knows of them."""

    @property
    def dp(self) -> int:
        """Replicas."""
        return self.gpus // (self.tp * self.pp * self.cp)

    @property
    def micro_batches(self) -> int:
        """Micro batches of one replica in a step; where replicas have different numbers, the largest."""
        return -(-self.global_batch // (self.micro_batch * self.dp))

    @property
    def tokens(self) -> int:
        """Tokens of a micro batch that one context-parallel rank holds."""
        return self.micro_batch * self.seq // self.cp

    def describe(self) -> str:
        """One line for tables."""
        parts = [f"tp={self.tp}", f"pp={self.pp}", f"dp={self.dp}"]
        parts += [f"cp={self.cp}"] if self.cp > 1 else []
        parts += [f"ep={self.ep}"] if self.ep > 1 else []
        parts += [f"vpp={self.vpp}"] if self.vpp > 1 else []
        return ",".join([*parts, f"mbs={self.micro_batch}", f"recompute={self.recompute}"])


SOFTWARE: Mapping[str, Mapping[str, Any]] = {
    "ours": {"te": False, "overlap_tp": False, "cp_gathers": True, "logit_bytes": 2, "adds_gradients": True},
    "nvidia": {"te": True, "overlap_tp": True, "cp_gathers": False, "logit_bytes": 8, "adds_gradients": False},
    "zero-2": {"cp_gathers": False, "logit_bytes": 8, "zero": 2, "moment_bits": 32, "adds_gradients": False},
    "fsdp": {
        "cp_gathers": False,
        "logit_bytes": 4,
        "zero": 3,
        "early_stop": True,
        "moment_bits": 32,
        "adds_gradients": False,
    },
}
"""Fields of ``Strategy`` for each software that can be planned. ``ours``: our trainer, whose matrix products and
attention are taken to be as fast as published open PyTorch code, and whose gradients are added by an operator of their
own (``gradient_accumulation_fusion`` needs apex). ``nvidia``: Megatron-Core with Transformer Engine as
NVIDIA's recipes run it, with cuDNN's attention, tensor-parallel communication overlapped with matrix products, and 8
bytes per logit, as in published rows of NeMo and Megatron-LM. ``zero-2``: DeepSpeed's stage 2, whose replicas divide
gradients and optimizer state. ``fsdp``: PyTorch's FSDP2 as torchtitan compiles it, whose replicas divide the weights
too. Our trainer has neither of these two."""
SOFTWARE_NAMES = {
    "ours": "our trainer",
    "nvidia": "NVIDIA's stack (Megatron-Core with Transformer Engine)",
    "zero-2": "DeepSpeed's ZeRO-2, which is other software than our trainer",
    "fsdp": "PyTorch's FSDP2 (ZeRO-3), which is other software than our trainer",
}
RECOMPUTES: Mapping[str, tuple[Recompute, ...]] = {
    "ours": ("none", "full"),
    "nvidia": ("none", "selective", "full"),
    "zero-2": ("none", "full"),
    "fsdp": ("none", "ops", "full"),
}
"""What is looked for with each software. ``selective`` is Korthikanti et al.'s (2022, arXiv 2205.05198), which spares
nothing where attention is fused, as ours always is; ``ops`` is PyTorch's selective activation checkpointing."""


def with_software(strategy: Strategy, name: str) -> Strategy:
    """The same layout under ``ours`` or ``nvidia``. Raises UserError for another name."""
    if name not in SOFTWARE:
        raise UserError(f"--software {name} is not one of {', '.join(SOFTWARE)}")
    return replace(strategy, **SOFTWARE[name])


def shape_of(model: ModelConfig) -> Shape:
    """Dimensions of a model from its configuration, whose vocabulary size must be set."""
    assert model.vocab_size is not None
    queries, keys = (count * model.kv_channels for count in (model.num_attention_heads, model.num_query_groups))
    return Shape(
        layers=model.num_layers,
        hidden=model.hidden_size,
        heads=model.num_attention_heads,
        groups=model.num_query_groups,
        ffn=model.ffn_hidden_size,
        vocab=model.vocab_size,
        head_dim=model.kv_channels,
        tied=model.tie_embeddings,
        window=model.window_tokens or 0,
        divided_vectors=(queries + 2 * keys) * model.qkv_bias
        + 2 * model.ffn_hidden_size * model.mlp_bias
        + (queries + keys) * model.qk_norm_over_heads,
        whole_vectors=model.hidden_size * (model.attention_output_bias + model.mlp_bias)
        + 2 * model.kv_channels * model.qk_norm,
        qk_norm="wide" if model.qk_norm_over_heads else "each" if model.qk_norm else "none",
    )


def strategy_of(config: RunConfig, gpus: int, device: str = "cuda") -> Strategy:
    """How our trainer runs a configuration on ``gpus`` devices of a kind."""
    parallel, train = config.parallel, config.train
    return Strategy(
        gpus=gpus,
        global_batch=train.global_batch_size,
        micro_batch=train.micro_batch_size,
        seq=config.data.seq_length_tokens,
        tp=parallel.tp,
        pp=parallel.pp,
        cp=parallel.cp,
        vpp=parallel.vpp,
        recompute=parallel.recompute,
        adds_gradients=True,
        sequence_parallel=parallel.divides_sequence and parallel.tp > 1,
        zero=1 if parallel.distributed_optimizer else 0,
        precision=train.precision,
        overlap_dp=parallel.overlap is not False,
        overlap_pp=parallel.vpp > 1,
        stage_layers=parallel.stage_layers,
        adapter=config.adapter,
        plain=config.kernels.attention == "torch" or (config.kernels.attention == "auto" and device == "cpu"),
        moment_bits=config.optim.moment_bits,
    )
