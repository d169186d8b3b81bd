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
    """Whether it can give a pipeline stage several model chunks, so that a blank ``vpp`` may be any number."""
    unknown: tuple[str, ...] = ()
    """Fields of ``Strategy`` that neither the rows nor the software decide: ``recompute``, ``sequence_parallel``,
    ``overlap_tp``."""
    flash_rate: float = 1.0
    """As in ``Strategy``."""
    keeps_gathered: bool = False
    """As in ``Strategy``."""
    grad_bytes: int = 4
    """As in ``Strategy``."""
    adds_gradients: bool = False
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


TRITON_2023 = 0.55
"""Rate of the Triton kernels of 2022 and 2023 relative to FlashAttention 2: that paper (arXiv 2307.08691, section 4.1)
measures 1.3 to 2.5 times between them, on an A100."""
TORCH_2024 = 0.75
"""Rate of torch's own scaled dot-product attention of 2024, which torchtitan calls, relative to FlashAttention 2: what
its rows of the fitted half show, most of all those under context parallelism, which calls it for pieces."""
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
    (r"MegaScale", Source(software="Megatron-LM", gpt=True, flash=False, recompute="selective", interleaves=True)),
    # Its text: pipeline communication is overlapped by default; Megatron-Core does so only in the interleaved schedule.
    (
        r"Megatron-LM README\.md",
        Source(software="Megatron-Core, TE", gpt=True, overlap_tp=True, te=True, interleaves=True),
    ),
    (
        r"Megatron-Bridge",
        Source(software="Megatron-Core, TE", overlap_tp=True, te=True, convention="causal", interleaves=True),
    ),
    # configure.sh: remat_policy save_qkv_proj; XLA removes what backward does not read.
    (r"maxtext", Source(software="MaxText", zero=3, te=True, recompute="qkv", early_stop=True)),
    (r"dgxc-benchmarking", Source(software="NeMo, TE", overlap_tp=True, te=True, interleaves=True)),
    # Composer's default is BACKWARD_POST: a layer's weights are gathered after the backward before it.
    (
        r"mosaicml",
        Source(
            software="llm-foundry",
            gpt=True,
            zero=3,
            grad_bytes=2,
            early_stop=True,
            prefetches=False,
            flash_rate=TRITON_2023,
        ),
    ),
    # torchtitan/metrics.py: reserved_bytes.all.peak. Its loss in 2024 was not compiled: fp32 logits, log-softmax and
    # gradient; in the run of 2025 it was: bf16 logits and their gradient.
    (
        r"torchtitan.*202412",
        Source(
            software="torchtitan", zero=3, logit_bytes=12, memory_of="reserved", early_stop=True, flash_rate=TORCH_2024
        ),
    ),
    (
        r"torchtitan",
        Source(
            software="torchtitan", zero=3, logit_bytes=4, memory_of="reserved", recompute="selective", early_stop=True
        ),
    ),
    # nanotron at 2411b022a: bf16 gradients, which are views of DDP's buckets, beside accumulated fp32 ones; the inputs
    # that sequence parallelism gathered are kept (functional.py), and so is silu's output; logits in
    # bf16, in fp32, less their maximum, and the bf16 gradient. Rank 0 writes the peak (helpers.py).
    # Its gradients are added to the fp32 ones by a hook (gradient_accumulator.py).
    # Its sharded optimizer reduces and gathers tensor by tensor (gradient_accumulator.py, zero.py).
    (
        r"nanotron",
        Source(
            software="nanotron",
            overlap_dp=False,
            copied_grad_bytes=2,
            adds_gradients=True,
            keeps_gate=True,
            keeps_gathered=True,
            logit_bytes=12,
            memory_of_first=True,
            tensors_of_layer=6,
        ),
    ),
)


_NVIDIA = Source(
    software="Megatron-Core, TE", overlap_tp=True, te=True, interleaves=True, unknown=("recompute", "overlap_tp")
)
_SOFTWARE: tuple[tuple[str, Source], ...] = (
    (r"NeMo|nemo_|Transformer ?Engine|Megatron-?Core|MCore|Megatron-Bridge", _NVIDIA),
    (r"Megatron", replace(_NVIDIA, software="Megatron-LM", te=False)),
    (r"torchtitan|FSDP", Source(software="FSDP", zero=3, early_stop=True, unknown=("recompute",))),
    (r"DeepSpeed", Source(software="DeepSpeed", sequence_parallel=False, unknown=("recompute",))),
)
"""What a row's source, model or note calls the software where the publication is not one of those above."""
_NOT_STATED = Source(
    sequence_parallel=False, interleaves=True, unknown=("recompute", "sequence_parallel", "overlap_tp")
)


def source_named(text: str, also: str = "") -> Source:
    """What is known of the source that a row's first column names: of that publication, else of the software that it or
    ``also`` (the model's name and the note) names, else nothing."""
    found = (known for pattern, known in _SOURCES if re.search(pattern, text))
    named = (known for pattern, known in _SOFTWARE if re.search(pattern, f"{text} {also}"))
    return next(found, None) or next(named, _NOT_STATED)
