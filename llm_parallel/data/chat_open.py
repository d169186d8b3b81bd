"""The tokenizer and the template of a configuration, as the encoder of its conversations."""

from __future__ import annotations

from datetime import date
from pathlib import Path

from llm_parallel.config.tree import RunConfig
from llm_parallel.config.tree_tune import ChatConfig
from llm_parallel.data.chat import ChatEncoder
from llm_parallel.data.chat_tokens import ChatTokenizer
from llm_parallel.data.template import DATE, ChatTemplate, chatml, own_template
from llm_parallel.data.tokenizer import load_tokenizer
from llm_parallel.errors import UserError


def open_encoder(config: RunConfig) -> ChatEncoder:
    """The encoder of a configuration: its tokenizer and template. Raises UserError."""
    assert config.data.tokenizer is not None
    tokenizer = ChatTokenizer(load_tokenizer(config.data.tokenizer))
    return ChatEncoder(tokenizer, open_template(config.chat, tokenizer), config.chat.train_on, config.chat.system)


def open_template(chat: ChatConfig, tokenizer: ChatTokenizer) -> ChatTemplate:
    """The template that ``chat.template`` names, else the tokenizer's own, else ChatML. Raises UserError."""
    day = DATE
    if chat.date is not None:
        try:
            day = date.fromisoformat(chat.date)
        except ValueError:
            raise UserError(f"chat.date = {chat.date!r} is no date; give one such as 2026-01-31") from None
    source: tuple[str, str] | None
    if chat.template not in (None, "chatml"):
        try:
            source = Path(chat.template).read_text(encoding="utf-8"), chat.template
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise UserError(
                f"chat.template = {chat.template} cannot be read: {reason}; give a file with a Jinja template, or "
                "chatml"
            ) from None
    else:
        source = own_template(tokenizer.folder) if chat.template is None else None
    if source is None:
        begin, end = turn_tokens(tokenizer)
        source = chatml(begin, end), f"ChatML with {begin} and {end}"
    return ChatTemplate(*source, tokenizer.variables, day)


def turn_tokens(tokenizer: ChatTokenizer) -> tuple[str, str]:
    """The tokens with which ChatML begins and ends a turn: its own, if the tokenizer has them, else those that begin
    and end a text. No row of the embedding is added for it."""
    if "<|im_start|>" in tokenizer.added and "<|im_end|>" in tokenizer.added:
        return "<|im_start|>", "<|im_end|>"
    end = tokenizer.name_of(tokenizer.eos)
    if end is None:
        raise UserError(
            f"tokenizer {tokenizer.tokenizer.name} has no special token that could end an answer; give chat.template"
        )
    return tokenizer.variables.get("bos_token", end), end
