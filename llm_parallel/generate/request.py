"""What ``llm-parallel generate`` is asked; each field's docstring is the help of its option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llm_parallel.options import argument, option


@dataclass(frozen=True)
class GenerateRequest:
    """A model, prompts, and how tokens are drawn."""

    checkpoint: str = argument()
    """Run, checkpoints, iter_… or Hugging Face folder."""
    prompts: Sequence[str] = option(name="--prompt")
    """Text to go on from; may be given several times."""
    max_new_tokens: int = 64
    """Tokens to write."""
    temperature: float = 0.0
    """0 for the likeliest token each time (greedy)."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this share."""
    seed: int = 0
    """Seed of the drawing."""
    device: str = "auto"
    """auto, cpu or cuda."""
