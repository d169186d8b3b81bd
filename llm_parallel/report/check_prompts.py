"""``llm-parallel check`` of prompts that a model answers itself: as it will see them, and what judges read of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from llm_parallel.config.rules_rounds import steps_of_round
from llm_parallel.config.tree import RunConfig
from llm_parallel.data.chat_counts import some
from llm_parallel.data.chat_open import open_encoder
from llm_parallel.data.chat_tokens import ChatTokenizer
from llm_parallel.data.check import Piece, histogram, pieces_of, quantiles
from llm_parallel.data.prompts import Prompt, Prompts, report_of
from llm_parallel.screen import show as tell
from llm_parallel.tasks.base import Asked
from llm_parallel.tasks.readings import check_records, readings


@dataclass(frozen=True)
class ShownPrompt:
    """One prompt: its file and line, its tokens, and what each judge takes for a good answer to it."""

    where: str
    pieces: list[Piece]
    tokens: int
    readings: list[str]


@dataclass(frozen=True)
class CheckedPrompts:
    """All that the command shows of a run in rounds."""

    report: dict[str, Any]
    notices: list[str]
    facts: list[tuple[str, str, str]]
    sources: list[tuple[str, ...]]
    lengths: list[int]
    bins: list[tuple[int, int, int]]
    prompts: list[ShownPrompt]
    head: Sequence[str] = ("", "prompts", "tokens", "longest")
    rows: list[Any] = field(default_factory=list)
    groups: list[Any] = field(default_factory=list)
    noun: str = "prompt"
    title: str = "Prompts"
    measured: str = "a prompt"


def checked_prompts(config: RunConfig, prompts: Prompts, count: int, notices: list[str]) -> CheckedPrompts:
    """What there is to say about prepared prompts, with the first ``count`` that are asked. Raises UserError if a judge
    cannot read their records."""
    check_records(config.method.rollout.judges, prompts.asked())
    every = (*prompts.training, *prompts.held_out)
    lengths = np.array([len(prompt.tokens) for prompt in every], np.int64)
    tokenizer = open_encoder(config).tokenizer
    first = [prompt for _, prompt in prompts.of_round(0, min(count, len(prompts.training)), config.seed)]
    return CheckedPrompts(
        report_of(prompts.folder),
        notices,
        list(_facts(config, prompts, tokenizer)),
        [_row("trained on", prompts.training), _row("held out", prompts.held_out)],
        quantiles(lengths),
        histogram(lengths, int(lengths.max())),
        [_shown(config, prompt, tokenizer) for prompt in first],
    )


def _facts(config: RunConfig, prompts: Prompts, tokenizer: ChatTokenizer) -> Iterator[tuple[str, str, str]]:
    rollout, count = config.method.rollout, len(prompts.training)
    yield "prompts", f"{count:,}", f"{len(prompts.held_out):,} are held out"
    steps = (
        f"{some(steps_of_round(config), 'step')}; all prompts are asked once in {count / rollout.prompts:.3g} rounds"
    )
    yield "a round", f"{rollout.prompts} x {rollout.answers}", f"prompts and answers to each, then {steps}"
    yield "an answer", f"{rollout.max_new_tokens}", "tokens at most"
    stops = sorted(f"{tokenizer.name_of(stop) or ''} {stop}".strip() for stop in prompts.stops)
    yield "stops", ", ".join(stops), "each of them ends an answer"


def _row(name: str, prompts: Sequence[Prompt]) -> tuple[str, ...]:
    lengths: NDArray[np.int64] = np.array([len(prompt.tokens) for prompt in prompts], np.int64)
    return name, f"{len(prompts):,}", f"{lengths.sum():,}", f"{lengths.max(initial=0):,}"


def _shown(config: RunConfig, prompt: Prompt, tokenizer: ChatTokenizer) -> ShownPrompt:
    pieces = list(pieces_of(tokenizer, list(prompt.tokens), [0.0] * len(prompt.tokens)))
    said = readings(config.method.rollout.judges, Asked(prompt.messages, prompt.record, prompt.where))
    return ShownPrompt(prompt.where, pieces, len(prompt.tokens), said)


def show_prompts(
    prompts: Sequence[ShownPrompt], console: Console, coloured: Callable[[Sequence[Piece], bool], Text]
) -> None:
    """Prints prompts, and under each what judges say of an answer."""
    if prompts:
        tell("\nprompts as the model sees them, and what is judged:", console)
    for number, prompt in enumerate(prompts):
        tell(f"\nprompt {number}: {prompt.where}, {some(prompt.tokens, 'token')}", console)
        console.print(coloured(prompt.pieces, console.is_terminal), soft_wrap=not console.is_terminal)
        for reading in prompt.readings:
            tell(f"judged: {reading}", console)
