"""What ``llm-parallel chat`` is asked; each field's docstring is the help of its option."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llm_parallel.errors import UserError
from llm_parallel.generate.held import Held
from llm_parallel.options import argument, not_an_option, option


@dataclass(frozen=True)
class Settings:
    """How answers are drawn; None leaves a value to the model's side. max_new_tokens: most tokens of an answer."""

    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        limits = {
            "temperature": (self.temperature is None or 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "over 0 and at most 1"),
            "max_new_tokens": (self.max_new_tokens is None or self.max_new_tokens >= 1, "at least 1"),
            "seed": (self.seed is None or -(2**63) <= self.seed < 2**63, "a number of 64 bits"),
        }
        for name, (fine, right) in limits.items():
            if not fine:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {right}")


@dataclass(frozen=True)
class ChatRequest:
    """Whom to speak with, and how."""

    model: str = argument()
    """Run, checkpoint, adapter or Hugging Face folder, or http://HOST:PORT of a server with OpenAI's interface."""
    system: str | None = None
    """System message; by default the one that the model was trained with, if any."""
    load: Path | None = None
    """File of a conversation to go on with, as /save writes it."""
    name: str | None = None
    """Which of the server's models answers; by default the first."""
    temperature: float | None = None
    """0 for the likeliest token each time; default 0.7, or the server's."""
    top_p: float | None = None
    """Draw from the likeliest tokens with this share; default 0.95, or the server's."""
    max_new_tokens: int | None = None
    """Most tokens of an answer; default 1024, or the server's."""
    seed: int | None = None
    """Seed of the drawing; default 0, or the server's."""
    plain: bool = option(False, flag=True)
    """Show answers as they were written, without formatting."""
    device: str = "auto"
    """auto, cpu or cuda."""
    weights: str | None = None
    """How weights of a model in this process are held: saved (as in the folder, the default), fp32, bf16, or on a CPU
    int8 or int4."""
    environment: Mapping[str, str] = not_an_option(default_factory=dict)
    """Environment variables, for API keys and the folder of the history."""
    settings: Settings = field(init=False, compare=False, metadata=not_an_option(default=None).metadata)
    """How answers are drawn."""

    def __post_init__(self) -> None:
        drawn = Settings(self.temperature, self.top_p, self.max_new_tokens, self.seed)
        object.__setattr__(self, "settings", drawn)
        self.held()

    def held(self) -> Held:
        """How a model in this process is held. Raises UserError."""
        return Held(self.device, self.weights or "saved")
