"""Supervised fine-tuning: conversations in, an assistant that answers and stops out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from llm_parallel.checkpoint.state import TrainState
from llm_parallel.config.tree import RunConfig
from llm_parallel.data.chat_files import ChatData
from llm_parallel.data.pack import Packer
from llm_parallel.data.tokenizer import Tokenizer, load_tokenizer
from llm_parallel.generate.decode import generate
from llm_parallel.generate.sampling import Sampling
from llm_parallel.metrics.record import AnswerRecord
from llm_parallel.objectives.base import Objective
from llm_parallel.objectives.by_source import by_source
from llm_parallel.parallel.groups import Groups
from llm_parallel.train.feed import HeldOut, SampleFeed, held_out_batches, row_lengths
from llm_parallel.train.open import Method
from llm_parallel.train.run import Run


class TokenCount:
    """Tokens of the conversations in the first samples of a run, padding not counted. ``lengths``: int64, of each
    conversation that the packer places."""

    def __init__(self, packer: Packer, lengths: NDArray[np.int64]) -> None:
        self._packer, self._lengths = packer, lengths
        self._samples = self._tokens = 0

    def before(self, samples: int) -> int:
        """Tokens of the first ``samples`` samples: of whole epochs at once, of the rest one sample after the other."""
        epoch, place = self._packer.locate(samples)
        if not samples - place <= self._samples <= samples:  # what is counted ends in another epoch, or after it
            self._samples = samples - place
            self._tokens = sum(int((self._lengths * self._packer.copies(past)).sum()) for past in range(epoch))
        for number in range(self._samples, samples):
            self._tokens += int(self._lengths[self._packer.sample(number)].sum())
        self._samples = samples
        return self._tokens


class ConversationFeed(SampleFeed):
    """Samples of conversations; records the epoch, which is the number of passes over ``chat.train``, and the number of
    tokens of the conversations so far, padding not counted."""

    def __init__(self, config: RunConfig, groups: Groups, state: TrainState) -> None:
        data = conversations(config)
        samples = data.training(config.seed)
        self._packer = samples.packer
        tokens = data.tokens.document_lengths[data.numbers("train")].astype(np.int64)
        self._tokens = TokenCount(samples.packer, tokens)
        lengths = row_lengths(config, groups, samples.packer)
        super().__init__(config, groups, state.consumed_samples, samples, ("source",), lengths=lengths)

    def progress(self, state: TrainState) -> Mapping[str, float]:
        """The epoch, with its fraction, and the tokens, in TRL's names."""
        epoch, place = self._packer.locate(state.consumed_samples)
        return {
            "epoch": epoch + place / self._packer.samples_of(epoch),
            "num_tokens": float(self._tokens.before(state.consumed_samples)),
        }


def conversations(config: RunConfig) -> ChatData:
    """The prepared conversations of a run, which the process that started it has written."""
    assert config.chat.prepared is not None, "conversations are prepared before processes start"
    return _opened(config.chat.prepared)


@lru_cache(maxsize=1)
def _opened(folder: str) -> ChatData:
    return ChatData.open(folder)


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return load_tokenizer(path)


def answers_loss(config: RunConfig) -> Objective:
    """-log p of the tokens of answers."""
    train = config.train
    return by_source(conversations(config).source_names, train.label_smoothing, train.z_loss)


def plain_answers_loss(config: RunConfig) -> Objective:
    """The same without the terms that only training has."""
    return by_source(conversations(config).source_names)


def held_out_conversations(config: RunConfig, groups: Groups, state: TrainState) -> HeldOut:
    """Samples of held-out conversations, each at most once and at most ``train.eval_samples`` of them."""
    data = conversations(config)
    if not data.held_out_rows:
        return HeldOut()
    wanted = min(config.train.eval_samples, data.held_out_rows)
    samples = data.held_out()
    return held_out_batches(config, groups, samples, wanted, row_lengths(config, groups, samples.packer))


def show_answers(run: Run) -> None:
    """Lets the model answer some prompts and records what it said."""
    chat, data = run.config.chat, conversations(run.config)
    prompts = [*data.questions(chat.show_answers), *data.encode_prompts(chat.show_prompts)]
    room = run.config.model.max_seq_length_tokens - chat.answer_tokens
    fitting = [prompt for prompt in prompts if len(prompt) <= room]
    if len(fitting) < len(prompts):
        run.metrics.message(
            f"{len(prompts) - len(fitting)} of {len(prompts)} prompts are not answered: with chat.answer_tokens = "
            f"{chat.answer_tokens} they are longer than model.max_seq_length_tokens = "
            f"{run.config.model.max_seq_length_tokens}"
        )
    if not fitting:
        return
    assert run.config.data.tokenizer is not None
    tokenizer = _tokenizer(run.config.data.tokenizer)
    wanted = Sampling(max_new_tokens=chat.answer_tokens)
    for prompt, answer in zip(fitting, generate(run.engine, fitting, wanted, data.stops)):
        stopped = len(answer) < chat.answer_tokens
        run.metrics.answer(AnswerRecord(run.state.step, tokenizer.decode(prompt), tokenizer.decode(answer), stopped))


SFT = Method(
    objective=answers_loss,
    evaluation=plain_answers_loss,
    feed=ConversationFeed,
    held_out=held_out_conversations,
    evaluated=show_answers,
    observes=True,
)
