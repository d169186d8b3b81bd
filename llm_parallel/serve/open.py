"""Opens the model that is served, on every process of its layout, and newer checkpoints of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llm_parallel.checkpoint.base import load_adapters
from llm_parallel.checkpoint.folders import latest_checkpoint, step_of
from llm_parallel.checkpoint.load import load_weights
from llm_parallel.config.tree import ParallelConfig
from llm_parallel.data.chat import ChatEncoder
from llm_parallel.data.chat_open import open_encoder
from llm_parallel.data.tokenizer import Tokenizer
from llm_parallel.errors import UserError
from llm_parallel.generate.command import end_tokens, prompt_prefix
from llm_parallel.generate.load import Loaded, Member, load_model
from llm_parallel.serve.request import ServeRequest


@dataclass(frozen=True)
class OpenedModel:
    """A model with its tokenizer. begin: tokens before a plain text; ends: tokens that end one; folder: the checkpoint
    that was loaded, None for other folders."""

    loaded: Loaded
    tokenizer: Tokenizer
    begin: tuple[int, ...]
    ends: frozenset[int]
    folder: Path | None

    @property
    def system(self) -> str | None:
        """The system message of conversations that have none."""
        return self.loaded.config.chat.system

    def encoder(self) -> ChatEncoder:
        """What writes conversations. Raises UserError if the model has no template that works."""
        return open_encoder(self.loaded.config)

    def load(self, folder: str) -> None:
        """Takes up the weights, or the adapters, of a newer checkpoint of the same run. All processes call this."""
        network = self.loaded.network
        load_weights(folder, network) if network.base is None else load_adapters(folder, network)


def open_model(request: ServeRequest, rank: int = 0, local_rank: int = 0) -> OpenedModel:
    """Raises UserError if there is no model, or no tokenizer beside it."""
    checkpoint = request.checkpoint
    parallel = ParallelConfig(tp=request.tp, pp=request.pp)
    loaded = load_model(
        checkpoint,
        request.device,
        weights=request.weights,
        deterministic=request.deterministic,
        member=Member(rank, local_rank, request.num_processes, parallel),
        adapters=request.adapters(),
    )
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise UserError(
            f"{checkpoint} has no tokenizer beside its weights; put a tokenizer.json or tokenizer.model there"
        )
    beside = Path(loaded.config.data.tokenizer or checkpoint)
    folders = [Path(checkpoint), beside if beside.is_dir() else beside.parent]
    ends = frozenset(end_tokens(tokenizer, folders))
    folder = loaded.folder if step_of(loaded.folder) is not None else None
    return OpenedModel(loaded, tokenizer, tuple(prompt_prefix(tokenizer, folders)), ends, folder)


def newer_checkpoint(path: str, than: Path) -> Path | None:
    """The newest complete checkpoint of a run if it is of a later step than another one."""
    step = step_of(than)
    for folder in (Path(path), Path(path) / "checkpoints"):
        newest = latest_checkpoint(folder)
        if newest is not None and step is not None and (step_of(newest) or 0) > step:
            return newest
    return None
