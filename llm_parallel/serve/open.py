"""Opens the model that is served, on every process of its layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llm_parallel.data.chat import ChatEncoder
from llm_parallel.data.chat_open import open_encoder
from llm_parallel.data.tokenizer import Tokenizer
from llm_parallel.errors import UserError
from llm_parallel.generate.command import end_tokens, prompt_prefix
from llm_parallel.generate.load import Loaded, load_model


@dataclass(frozen=True)
class OpenedModel:
    """A model with its tokenizer. begin: tokens before a plain text; ends: tokens that end one."""

    loaded: Loaded
    tokenizer: Tokenizer
    begin: tuple[int, ...]
    ends: frozenset[int]

    @property
    def system(self) -> str | None:
        """The system message of conversations that have none."""
        return self.loaded.config.chat.system

    def encoder(self) -> ChatEncoder:
        """What writes conversations. Raises UserError if the model has no template that works."""
        return open_encoder(self.loaded.config)


def open_model(checkpoint: str, device: str) -> OpenedModel:
    """Raises UserError if there is no model, or no tokenizer beside it."""
    loaded = load_model(checkpoint, device)
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise UserError(
            f"{checkpoint} has no tokenizer beside its weights; put a tokenizer.json or tokenizer.model there"
        )
    beside = Path(loaded.config.data.tokenizer or checkpoint)
    folders = [Path(checkpoint), beside if beside.is_dir() else beside.parent]
    ends = frozenset(end_tokens(tokenizer, folders))
    return OpenedModel(loaded, tokenizer, tuple(prompt_prefix(tokenizer, folders)), ends)
