"""How a model is computed, as opposed to what it computes: dtype, kernels, recomputation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from llm_parallel.config.tree import KernelsConfig, RunConfig


def dtype_of(precision: str) -> torch.dtype:
    """Dtype of weights and activations in forward and backward under ``train.precision``."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


@dataclass(frozen=True)
class Recompute:
    """Which activations backward recomputes (see ``parallel.recompute`` and its neighbours in config/tree.py)."""

    granularity: Literal["none", "selective", "full"] = "none"
    modules: tuple[str, ...] = ("core_attn",)
    method: Literal["uniform", "block"] = "uniform"
    num_layers: int = 1


@dataclass(frozen=True)
class Numerics:
    """dtype: of weights and activations; kernels: which implementation of each operator; deterministic: whether
    operators must give the same bits every time; recompute: which activations are not kept; embedding_noise: NEFTune's
    alpha, the size of noise on the embeddings in training; base: how the layers' matrices are held under adapters."""

    dtype: torch.dtype = torch.float32
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    deterministic: bool = False
    recompute: Recompute = Recompute()
    embedding_noise: float = 0.0
    base: Literal["full", "int8", "nf4"] = "full"

    @classmethod
    def from_config(cls, config: RunConfig) -> Numerics:
        """The numerics of a run's model."""
        parallel = config.parallel
        recompute = Recompute(
            parallel.recompute, parallel.recompute_modules, parallel.recompute_method, parallel.recompute_num_layers
        )
        noise = config.chat.neftune_alpha if config.trains == "sft" else 0.0
        base = config.adapter.base if config.adapter is not None else "full"
        return cls(dtype_of(config.train.precision), config.kernels, config.train.deterministic, recompute, noise, base)
