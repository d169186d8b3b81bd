"""What a run takes from each source of conversations or preferences, shown before anything starts."""

from __future__ import annotations

import numpy as np

from llm_parallel.config.rules_rounds import steps_of_round
from llm_parallel.config.tree import RunConfig
from llm_parallel.data.chat_data import ChatData
from llm_parallel.data.group_data import GroupData
from llm_parallel.data.group_rows import UNITS
from llm_parallel.data.prompts import Prompts
from llm_parallel.lines import say
from llm_parallel.screen import show_table
from llm_parallel.train.step_settings import total_samples


def show_conversations(config: RunConfig) -> None:
    """Prints a table of the sources, and how many samples an epoch and the run have."""
    assert config.chat.prepared is not None
    data = ChatData.open(config.chat.prepared)
    samples, train = data.training(config.seed), total_samples(config.train)
    epoch, place = samples.packer.locate(train)
    epochs = epoch + place / samples.packer.samples_of(epoch)
    lengths, sources = data.tokens.document_lengths, np.asarray(data.sources)
    paths, weights, rows = data.report["paths"], data.report["weights"], []
    trained, held = (np.bincount(sources[data.numbers(split)], minlength=len(paths)) for split in ("train", "eval"))
    for number, path in enumerate(paths):
        weight = weights[number] if number < len(weights) else 0.0
        tokens = int(lengths[sources == number].sum())
        shares = (f"{weight:g}", f"{weight * epochs:.2f}") if weight else ("held out", "")
        rows.append((path, shares[0], f"{trained[number]:,}", f"{held[number]:,}", f"{tokens:,}", shares[1]))
    show_table("Conversations", ("source", "weight", "trained on", "held out", "tokens", "times seen"), rows)
    size, count = config.data.seq_length_tokens, samples.packer.samples_of(0)
    used = int((lengths[data.numbers("train")] - 1).sum()) if all(weight == 1 for weight in weights) else None
    filled = f", {used / (count * size):.0%} of them filled" if used is not None else ""
    say(
        f"an epoch has {count:,} samples of {size:,} tokens{filled}; {config.train.steps:,} steps of "
        f"{config.train.global_batch_size} samples are {epochs:.2f} epochs"
    )


def show_preferences(config: RunConfig) -> None:
    """Prints a table of the sources of preferences, and how many samples an epoch and the run have."""
    assert config.chat.prepared is not None
    data = GroupData.open(config.chat.prepared)
    packer, train = data.training(config.seed).packer, total_samples(config.train)
    epoch, place = packer.locate(train)
    epochs = epoch + place / packer.samples_of(epoch)
    sources = np.asarray(data.chat.sources)
    of_groups = sources[data.firsts[:-1]]
    paths, weights, rows = data.report["paths"], data.report["weights"], []
    trained, held = (np.bincount(of_groups[data.numbers(split)], minlength=len(paths)) for split in ("train", "eval"))
    for number, path in enumerate(paths):
        weight = weights[number] if number < len(weights) else 0.0
        tokens = int(data.chat.tokens.document_lengths[sources == number].sum())
        shares = (f"{weight:g}", f"{weight * epochs:.2f}") if weight else ("held out", "")
        rows.append((path, shares[0], f"{trained[number]:,}", f"{held[number]:,}", f"{tokens:,}", shares[1]))
    unit = f"{UNITS[config.trains]}s"
    show_table(f"Preferences, as {unit}", ("source", "weight", "trained on", "held out", "tokens", "times seen"), rows)
    say(
        f"an epoch has {packer.samples_of(0):,} samples of {config.data.seq_length_tokens:,} tokens; "
        f"{config.train.steps:,} steps of {config.train.global_batch_size} samples are {epochs:.2f} epochs"
    )


def show_rounds(config: RunConfig) -> None:
    """Prints how many rounds the run has, and of what."""
    assert config.chat.prepared is not None
    prompts, rollout = Prompts.open(config.chat.prepared), config.method.rollout
    steps = steps_of_round(config)
    count = -(-config.train.steps // steps)
    say(
        f"{count:,} rounds of {rollout.prompts:,} prompts with {rollout.answers} answers of at most "
        f"{rollout.max_new_tokens:,} tokens and {steps:,} steps; {len(prompts.training):,} prompts, each answered in "
        f"{count * rollout.prompts / len(prompts.training):.2f} rounds; {len(prompts.held_out):,} held out"
    )
