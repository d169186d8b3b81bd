"""What ``llm-parallel convert`` is asked; each field's docstring is the help of its option."""

from __future__ import annotations

from dataclasses import dataclass

from llm_parallel.options import argument


@dataclass(frozen=True)
class ConvertRequest:
    """A folder, and the one to write from it."""

    source: str = argument()
    """Hugging Face folder, or a run, checkpoints or iter_… folder of ours."""
    target: str = argument()
    """Folder to write; the other kind."""
    verify: bool = True
    """Compare logits with transformers', where it is installed, and print the largest difference."""
    max_shard_gb: float = 5.0
    """Largest safetensors file, in GB."""
    dtype: str | None = None
    """fp32, bf16 or fp16; the source's if not given."""
    merge: bool = False
    """Add adapters to the model under them, instead of writing a PEFT folder."""
