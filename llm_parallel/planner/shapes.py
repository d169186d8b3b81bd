"""What is planned: a model's dimensions and how it is laid out over GPUs, free of any framework."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from llm_parallel.config.tree import ModelConfig, RunConfig
from llm_parallel.errors import UserError

Recompute = Literal["none", "selective", "ops", "qkv", "full"]
"""none; selective: attention's scores; ops: all but attention and every second product (torch's selective operator
checkpointing); qkv: all but queries, keys and values (MaxText's save_qkv_proj); full: whole layers."""
Precision = Literal["fp32", "fp16", "bf16", "fp8"]


@dataclass(frozen=True)
class Shape:
    """Dimensions of a decoder. gated: SwiGLU (two matrices up) instead of GELU; dropout: GPT's masks are kept; tied:
    the output projection is the embedding; rotary: RoPE instead of learned positions."""

    layers: int
    hidden: int
    heads: int
    groups: int
    ffn: int
    vocab: int
    head_dim: int = 0
    gated: bool = True
    dropout: bool = False
    tied: bool = False
    rotary: bool = True

    @property
    def channels(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden // self.heads

    @property
    def layer_matrices(self) -> int:
        """Weights of one layer's matrices."""
        attention = self.hidden * self.channels * (2 * self.heads + 2 * self.groups)
        return attention + (3 if self.gated else 2) * self.hidden * self.ffn

    @property
    def layer_parameters(self) -> int:
        """All weights of one layer."""
        return self.layer_matrices + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """All weights."""
        ends = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + ends + self.hidden

    def flops_per_token(self, seq: int, causal: bool = False) -> float:
        """Training FLOPs of one token of a sample of ``seq``, recomputation not counted; ``causal`` counts half of
        attention (see model/flops.py for the conventions)."""
        attention = 4 * seq * self.heads * self.channels * self.layers * (0.5 if causal else 1.0)
        return 3.0 * (2 * (self.layers * self.layer_matrices + self.vocab * self.hidden) + attention)


@dataclass(frozen=True)
class Strategy:
    """How a model is trained on ``gpus``. zero: 0 (DDP), 1 (sharded optimizer) or 3 (FSDP); flash: attention never
    writes its scores; te: with Transformer Engine's kernels; fused: elementwise operators are, by hand or by a
    compiler; logit_bytes: what a logit takes at the loss, with its gradient and copies; copied_grad_bytes: of a
    parameter, gradients beside those that are summed (a backward's own, buckets); dp_collectives: calls
    that reduce a sharded optimizer's gradients, 0 for Megatron-Core's buckets; early_stop:
    recomputing ends before a layer's last product; keeps_gate: the activated gate of a
    SwiGLU is kept beside the product; the overlaps say whether that communication runs beside compute; stage_layers:
    layers of each chunk where they are not even, in the order of virtual stages; cp_gathers: context parallelism keeps
    the whole sample's keys and values, as ours does, not a ring's; prefetches: FSDP gathers a layer's weights beside
    the backward of the layer before it, else after that."""

    gpus: int
    global_batch: int
    micro_batch: int
    seq: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    vpp: int = 1
    recompute: Recompute = "none"
    sequence_parallel: bool = True
    zero: int = 1
    precision: Precision = "bf16"
    flash: bool = True
    te: bool = False
    cp_gathers: bool = True
    fused: bool = True
    overlap_tp: bool = False
    overlap_dp: bool = True
    overlap_pp: bool = True
    prefetches: bool = True
    grad_bytes: int = 4
    logit_bytes: int = 2
    copied_grad_bytes: int = 0
    dp_collectives: int = 0
    early_stop: bool = False
    keeps_gate: bool = False
    stage_layers: tuple[int, ...] | None = None

    @property
    def dp(self) -> int:
        """Replicas."""
        return self.gpus // (self.tp * self.pp * self.cp)

    @property
    def micro_batches(self) -> int:
        """Micro batches of one replica in a step; the fullest one's where they are not even."""
        return -(-self.global_batch // (self.micro_batch * self.dp))

    @property
    def tokens(self) -> int:
        """Tokens of a micro batch that one context-parallel rank holds."""
        return self.micro_batch * self.seq // self.cp

    def describe(self) -> str:
        """One line for tables."""
        parts = [f"tp={self.tp}", f"pp={self.pp}", f"dp={self.dp}"]
        parts += [f"cp={self.cp}"] if self.cp > 1 else []
        parts += [f"vpp={self.vpp}"] if self.vpp > 1 else []
        return ",".join([*parts, f"mbs={self.micro_batch}", f"recompute={self.recompute}"])


SOFTWARE: Mapping[str, Mapping[str, Any]] = {
    "ours": {"te": False, "overlap_tp": False, "cp_gathers": True, "logit_bytes": 2},
    "nvidia": {"te": True, "overlap_tp": True, "cp_gathers": False, "logit_bytes": 8},
}
"""What is predicted: our trainer, whose products and attention take what open PyTorch code was measured to take, or
Megatron-Core with Transformer Engine, as NVIDIA's recipes run it: cuDNN's attention, tensor parallelism's communication
beside its products, and logits, as published rows of NeMo and Megatron-LM are counted, in 8 bytes."""
SOFTWARE_NAMES = {"ours": "our trainer", "nvidia": "NVIDIA's stack (Megatron-Core with Transformer Engine)"}


def with_software(strategy: Strategy, name: str) -> Strategy:
    """The same layout under ``ours`` or ``nvidia``. Raises UserError for another name."""
    if name not in SOFTWARE:
        raise UserError(f"--software {name} is not one of {', '.join(SOFTWARE)}")
    return replace(strategy, **SOFTWARE[name])


def shape_of(model: ModelConfig) -> Shape:
    """Dimensions of one of our models, with a vocabulary."""
    assert model.vocab_size is not None
    return Shape(
        layers=model.num_layers,
        hidden=model.hidden_size,
        heads=model.num_attention_heads,
        groups=model.num_query_groups,
        ffn=model.ffn_hidden_size,
        vocab=model.vocab_size,
        head_dim=model.kv_channels,
        tied=model.tie_embeddings,
    )


def strategy_of(config: RunConfig, gpus: int) -> Strategy:
    """How a run file lays its model out over ``gpus``, and what our trainer makes of it."""
    parallel, train = config.parallel, config.train
    sequence = parallel.tp > 1 if parallel.sequence_parallel is None else parallel.sequence_parallel
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
        sequence_parallel=sequence and parallel.tp > 1,
        zero=1 if parallel.distributed_optimizer else 0,
        precision=train.precision,
        overlap_dp=parallel.overlap is not False,
        overlap_pp=parallel.vpp > 1,
        stage_layers=parallel.stage_layers,
    )
