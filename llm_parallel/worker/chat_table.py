"""What a fine-tuning run takes from each source of conversations, shown before anything starts."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table

from llm_parallel.config.tree import RunConfig
from llm_parallel.data.chat_data import ChatData
from llm_parallel.train.step_settings import total_samples


def show_conversations(config: RunConfig) -> None:
    """Prints a table of the sources, and how many samples an epoch and the run have."""
    assert config.chat.prepared is not None
    data = ChatData.open(config.chat.prepared)
    samples, train = data.training(config.seed), total_samples(config.train)
    epoch, place = samples.packer.locate(train)
    epochs = epoch + place / samples.packer.samples_of(epoch)
    table = Table(title="Conversations", title_justify="left")
    for name in ("source", "weight", "trained on", "held out", "tokens", "times seen"):
        table.add_column(name, justify="left" if name == "source" else "right")
    lengths, sources = data.tokens.document_lengths, np.asarray(data.sources)
    trained, held = (np.bincount(sources[data.numbers(split)], minlength=len(lengths)) for split in ("train", "eval"))
    for number, path in enumerate(data.report["paths"]):
        weights = data.report["weights"]
        weight = weights[number] if number < len(weights) else 0.0
        tokens = int(lengths[sources == number].sum())
        table.add_row(
            path,
            f"{weight:g}" if weight else "held out",
            f"{trained[number]:,}",
            f"{held[number]:,}",
            f"{tokens:,}",
            f"{weight * epochs:.2f}" if weight else "",
        )
    Console().print(table)
    size, rows = config.data.seq_length_tokens, samples.packer.samples_of(0)
    used = int((lengths[data.numbers("train")] - 1).sum()) if all(x == 1 for x in data.report["weights"]) else None
    filled = f", {used / (rows * size):.0%} of them filled" if used is not None else ""
    print(
        f"an epoch has {rows:,} samples of {size:,} tokens{filled}; {config.train.steps:,} steps of "
        f"{config.train.global_batch_size} samples are {epochs:.2f} epochs"
    )
