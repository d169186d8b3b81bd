"""What is known of each publication whose measurements are predicted, beyond what its rows say."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

CONVENTIONS = ("full", "causal", "hardware", "six_n")


@dataclass(frozen=True)
class Source:
    """What a publication's software does, as its own text or code says, and what its printed figures count."""

    software: str = "not stated"
    """Its name."""
    gpt: bool = False
    """Whether the models are GPTs: GELU, dropout, learned positions and biases."""
    flash: bool = True
    """As in ``Strategy``."""
    zero: int = 1
    """As in ``Strategy``."""
    sequence_parallel: bool = True
    """As in ``Strategy``."""
    overlap_tp: bool = False
    """As in ``Strategy``."""
    overlap_dp: bool = True
    """As in ``Strategy``."""
    overlap_dp_from_tp: int = 1
    """Least tensor-parallel size from which ``overlap_dp`` holds."""
    prefetches: bool = True
    """As in ``Strategy``."""
    overlap_pp: bool = True
    """As in ``Strategy``."""
    interleaves: bool = False
    """Whether pipeline stages have several model chunks, though the rows do not say how many."""
    grad_bytes: int = 4
    """As in ``Strategy``."""
    te: bool = False
    """As in ``Strategy``."""
    recompute: str = "none"
    """What is recomputed where a row does not say."""
    early_stop: bool = False
    """As in ``Strategy``."""
    logit_bytes: int = 8
    """As in ``Strategy``."""
    copied_grad_bytes: int = 0
    """As in ``Strategy``."""
    keeps_gate: bool = False
    """As in ``Strategy``."""
    tensors_of_layer: int = 0
    """Tensors of a layer whose gradients are reduced one by one; 0: they are reduced in buckets."""
    memory_of: str = "not stated"
    """What its printed peak counts: ``allocated``, the tensors, or ``reserved``, what the allocator took."""
    memory_of_first: bool = False
    """Whether the printed peak is the first stage's rather than the fullest one's."""
    convention: str = "full"
    """FLOPs of printed TFLOP/s and MFU: full (square attention), causal, hardware (recompute counted), six_n."""


_MEGATRON_2021 = Source(
    software="Megatron-LM", gpt=True, flash=False, zero=0, sequence_parallel=False, overlap_dp=False, overlap_pp=False,
    grad_bytes=2, recompute="full", convention="hardware",
)  # fmt: skip
_SOURCES: tuple[tuple[str, Source], ...] = (
    (r"Megatron SC21|MT-NLG|stas00", _MEGATRON_2021),
    # Its text: torch's DistributedDataParallel, whose all-reduces overlap with backward, is better for large models,
    # but slower for 2.5 billion parameters with TP 2 and for 1.2 billion with TP 1.
    (r"Megatron-LM README \(Sep 2020\)", replace(_MEGATRON_2021, overlap_dp=True, overlap_dp_from_tp=4)),
    (r"vTrain", replace(_MEGATRON_2021, convention="full")),
    (r"Korthikanti", replace(_MEGATRON_2021, overlap_pp=True, convention="full")),
    (r"MegaScale", Source(software="Megatron-LM", gpt=True, flash=False, recompute="selective")),
    # Its text: pipeline communication is overlapped by default; Megatron-Core does so only in the interleaved schedule.
    (
        r"Megatron-LM README\.md",
        Source(software="Megatron-Core, TE", gpt=True, overlap_tp=True, te=True, interleaves=True),
    ),
    (r"Megatron-Bridge", Source(software="Megatron-Core, TE", overlap_tp=True, te=True, convention="causal")),
    # configure.sh: remat_policy save_qkv_proj; XLA removes what backward does not read.
    (r"maxtext", Source(software="MaxText", zero=3, te=True, recompute="qkv", early_stop=True)),
    (r"dgxc-benchmarking", Source(software="NeMo, TE", overlap_tp=True, te=True)),
    # Composer's default is BACKWARD_POST: a layer's weights are gathered after the backward before it.
    (
        r"mosaicml",
        Source(software="llm-foundry", gpt=True, zero=3, grad_bytes=2, early_stop=True, prefetches=False),
    ),
    # torchtitan/metrics.py: reserved_bytes.all.peak. Its loss in 2024 was not compiled: fp32 logits, log-softmax and
    # gradient; in the run of 2025 it was: bf16 logits and their gradient.
    (
        r"torchtitan.*202412",
        Source(software="torchtitan", zero=3, logit_bytes=12, memory_of="reserved", early_stop=True),
    ),
    (
        r"torchtitan",
        Source(
            software="torchtitan", zero=3, logit_bytes=4, memory_of="reserved", recompute="selective", early_stop=True
        ),
    ),
    # nanotron at 2411b022a: DDP copies bf16 gradients into buckets before fp32 ones; silu's output is kept; logits in
    # bf16, in fp32, less their maximum, and the bf16 gradient. Rank 0 writes the peak (helpers.py).
    # Its sharded optimizer reduces and gathers tensor by tensor (gradient_accumulator.py, zero.py).
    (
        r"nanotron",
        Source(
            software="nanotron",
            overlap_dp=False,
            copied_grad_bytes=4,
            keeps_gate=True,
            logit_bytes=12,
            memory_of_first=True,
            tensors_of_layer=6,
        ),
    ),
)


def source_named(text: str) -> Source:
    """The source that a row's first column names; the defaults for one that is not known."""
    return next((found for pattern, found in _SOURCES if re.search(pattern, text)), Source())
