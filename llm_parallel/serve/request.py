"""What ``llm-parallel serve`` is asked; each field's docstring is the help of its option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_parallel.errors import UserError
from llm_parallel.generate.held import Held
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
    adapter: Sequence[str] = option((), name="--adapter")
    """NAME=FOLDER of an adapter on the model (PEFT, or a checkpoint of adapters), which clients choose by its name; may
    be given several times."""
    tp: int = 1
    """Processes that share each layer (tensor parallelism)."""
    pp: int = 1
    """Stages of layers, each on processes of its own (pipeline parallelism)."""
    reload_s: float | None = None
    """Look for a newer checkpoint of a run every so many seconds, and take it up; by default the run's newest stays."""
    weights: str = "saved"
    """How weights are held: saved (as in the folder), fp32, bf16, or on a CPU int8 or int4."""
    deterministic: bool = option(False, flag=True)
    """Answers depend on neither batch nor layout in a single bit; slower."""
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
    logs: Path | None = None
    """With several processes: folder of their logs; by default a temporary one."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise UserError(f"--port is {self.port}; it must be 0 to 65535")
        for name in ("max_request_mb", "finish_s"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must not be negative")
        for name in ("tp", "pp"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if self.reload_s is not None and self.reload_s <= 0:
            raise UserError(f"--reload-s is {self.reload_s}; it must be over 0")
        if self.reload_s is not None and self.adapter:
            raise UserError(
                "--reload-s and --adapter are given together; adapters need the model that they were made for"
            )
        self.adapters()
        self.held()
        if self.max_queue < 0:
            raise UserError(f"--max-queue is {self.max_queue}; it must be 0 or more")

    def held(self) -> Held:
        """How the model is to be held. Raises UserError."""
        return Held(self.device, self.weights, self.deterministic)

    @property
    def num_processes(self) -> int:
        """Processes that hold the model together."""
        return self.tp * self.pp

    def adapters(self) -> dict[str, str]:
        """Folders of adapters by their names. Raises UserError."""
        found: dict[str, str] = {}
        for given in self.adapter:
            name, equals, folder = given.partition("=")
            if not name or not equals or not folder:
                raise UserError(f"--adapter is {given!r}; give NAME=FOLDER")
            if name in found:
                raise UserError(f"--adapter gives the name {name!r} twice; give each another one")
            found[name] = folder
        return found
