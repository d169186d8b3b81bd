"""What ``llm-parallel serve`` is asked; each field's docstring is the help of its option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_parallel.errors import UserError
from llm_parallel.options import argument, option


@dataclass(frozen=True)
class ServeRequest:
    """A model, and how it is served."""

    checkpoint: str = argument()
    """Run, checkpoints, iter_…, adapter or Hugging Face folder."""
    name: str | None = None
    """Name of the model for clients; by default that of its folder."""
    host: str = "127.0.0.1"
    """Address to listen on; the default is reached from this machine only."""
    port: int = 8000
    """Port to listen on; 0 for a free one."""
    api_key_file: Path | None = None
    """File of keys, one a line, of which clients must send one. Or set LLM_PARALLEL_API_KEYS, with commas."""
    allow_origin: Sequence[str] = option((), name="--allow-origin")
    """Origin of a web page that may ask, such as https://chat.example; may be given several times."""
    device: str = "auto"
    """auto, cpu or cuda."""
    max_running: int = 32
    """Answers in work at a time."""
    max_queue: int = 256
    """Answers that may wait; further requests get status 429."""
    pass_tokens: int = 512
    """Tokens of one pass through the model; longer prompts go in chunks."""
    cache_tokens: int | None = None
    """Tokens that the cache holds; by default what a quarter of the free memory can."""
    max_request_mb: float = 8.0
    """Largest body of a request."""
    finish_s: float = 30.0
    """After SIGTERM: time for answers in work to finish."""
    log_requests: bool = option(False, flag=True)
    """Log path, status and time of each request, never its text."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise UserError(f"--port is {self.port}; it must be 0 to 65535")
        for name in ("max_request_mb", "finish_s"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must not be negative")
        if self.max_queue < 0:
            raise UserError(f"--max-queue is {self.max_queue}; it must be 0 or more")
