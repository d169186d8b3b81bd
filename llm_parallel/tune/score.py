"""Log-probabilities of every answer of a run's data under a model, computed once and kept beside the answers' tokens.

A file holds one fp32 number for each token of each answer (and of each mismatched answer, see ``GroupData``). Its name
is a hash of the model's weights, of how they are computed, and of the data's folder, whose name is a hash of records,
tokenizer and template; so every later run that needs the same numbers finds them. It appears whole or not at all. While
it is made, ``….part`` holds what is known so far: a run that is interrupted goes on there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from llm_parallel.checkpoint.base import Fingerprint
from llm_parallel.config.tree import RunConfig
from llm_parallel.data.batch import Batch
from llm_parallel.data.group_data import GroupData
from llm_parallel.data.loader import MicroBatchLoader
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write, sha256_of
from llm_parallel.model.adapters import every_adapter
from llm_parallel.model.tensors import canonical_parameters
from llm_parallel.model.vocabulary_adapters import is_trained
from llm_parallel.objectives.base import Output, Terms, Unweighted
from llm_parallel.parallel.engine import Network
from llm_parallel.parallel.groups import Groups
from llm_parallel.parallel.layout import Layout
from llm_parallel.train.feed import row_lengths
from llm_parallel.train.step import evaluate
from llm_parallel.tune.round_batches import Rows

BLOCK = 16
"""Micro batches of a replica between two notes of how far the file is."""


@dataclass(frozen=True)
class Collected(Unweighted):
    """An objective that minimises nothing and keeps the model's output of each micro batch."""

    outputs: list[Tensor] = field(default_factory=list)
    unit: Literal["token"] = "token"
    reads: tuple[str, ...] = ()
    statistics: tuple[str, ...] = ()

    def __call__(self, batch: Batch, groups: Groups, output: Output) -> Terms:
        """See ``Objective``."""
        assert isinstance(output, Tensor)
        self.outputs.append(output.detach())
        return Terms(output.sum() * 0.0, torch.ones((), dtype=torch.int32, device=output.device))


def token_outputs(network: Network, batches: Sequence[Batch]) -> list[Tensor]:
    """What a model says of each label, fp32 [b, s], of each micro batch of this replica, from one pass forward: its
    loss, or with a value head the value of the text before it. A process of the last stage has those of its context
    shard, and 0 elsewhere; other processes have none. Collective."""
    collected = Collected()
    evaluate(network, collected, batches)
    mesh, at = network.groups.mesh, network.groups.at
    found = []
    for batch, outputs in zip(batches, collected.outputs):
        whole = torch.zeros(batch.tokens.shape, dtype=torch.float32, device=outputs.device)
        start = 0
        for part in mesh.token_ranges(batch.tokens.shape[1], at.cp):
            whole[:, part.start : part.stop] = outputs[:, start : start + len(part)].float()
            start += len(part)
        found.append(whole)
    return found


def log_probabilities(network: Network, batches: Sequence[Batch]) -> list[Tensor]:
    """The same of the log-probability of each label."""
    return [-losses for losses in token_outputs(network, batches)]


def outputs_of_rows(network: Network, rows: Rows, layout: Layout, pad: int) -> list[NDArray[np.float32]]:
    """The same of the tokens of each text's answer, on every process. Collective."""
    groups = network.groups
    device = groups.platform.device
    whole = torch.zeros(len(rows.of_row), rows.length, device=device)
    values = token_outputs(network, rows.batches(layout, groups.at.dp, device, pad))
    if groups.reports_loss:
        for micro, numbers in zip(values, rows.numbers(layout, groups.at.dp)):
            for place, row in enumerate(numbers):
                if row < len(whole):
                    whole[row] += micro[place]
    dist.all_reduce(whole)
    return rows.by_text(whole.cpu().numpy())


def fingerprint_of(network: Network) -> str:
    """What tells a model's weights from others, whatever their layout; adapters count while they are on. Collective."""
    found, base = Fingerprint(network.groups), network.base
    off = any(not adapter.on for adapter in every_adapter(network.models))
    for chunk in network.models:
        for name, parameter in canonical_parameters(chunk):
            if base is None or (is_trained(name, base.whole) and not off):
                found.add(chunk, name, parameter.detach())
    own = found.value()
    if base is None:
        return own
    return f"{base.fingerprint} {base.adapter.base}" + ("" if off else f" {own}")


def describe_model(network: Network) -> str:
    """A name of a model's weights and of how it computes, for a file of what it said."""
    numerics = network.models[0].numerics
    return hashlib.sha256(f"{fingerprint_of(network)} {numerics.dtype} 1".encode()).hexdigest()[:16]


def score(config: RunConfig, network: Network, data: GroupData, path: Path, say: Callable[[str], None]) -> None:
    """Writes the log-probabilities of all answers of ``data`` under ``network`` into the file ``path``, or what is
    missing of them. Collective."""
    part = Path(f"{path}.part")
    groups, samples = network.groups, data.everything()
    rows = samples.packer.samples_of(0)
    first = _known(part, data, groups)
    say(
        f"log-probabilities of the reference: {rows:,} samples, written to {path}"
        + (f"; going on after {first:,}" if first else "")
    )
    layout = Layout.from_config(config, groups.mesh.world_size)
    unit = layout.micro_batch_size * layout.dp * (layout.pp if layout.vpp > 1 else 1)
    size = unit * max(1, -(-BLOCK // (layout.pp if layout.vpp > 1 else 1)))
    device = groups.platform.device
    lengths = row_lengths(config, groups, samples.packer)
    starts = range(first, rows, size)
    filled = [-(-min(size, rows - start) // unit) * unit for start in starts]
    numbers = [list(layout.micro_batches(start, count, groups.at.dp)) for start, count in zip(starts, filled)]
    flat = (each for block in numbers for each in block)
    values = np.memmap(part, np.float32, "r+") if groups.is_first_rank and len(starts) else None
    with MicroBatchLoader(samples, flat, device, config.data.prefetch_batches) as loader:
        for start, block in zip(starts, numbers):
            batches = list(islice(loader, len(block)))
            batches = batches if lengths is None else lengths.cut(batches, block)
            count = min(size, rows - start)
            for mismatched in (False, True)[: 1 + data.mismatches]:
                chosen = [batch.mismatched if mismatched else batch for batch in batches]
                shape = count, config.data.seq_length_tokens
                whole = _everywhere(network, [one for one in chosen if one is not None], block, start, shape)
                if values is not None:
                    for row in range(count):
                        for here, there in samples.places(start + row, mismatched):
                            values[there] = whole[row, here].numpy()
            if values is not None:
                values.flush()
                _note(part, start + count)
    if groups.is_first_rank:
        del values
        _publish(part, path)
    groups.sum_over_world(0.0)  # nobody opens the file before it is there


def _everywhere(
    network: Network, batches: Sequence[Batch], numbers: Sequence[range], start: int, shape: tuple[int, int]
) -> Tensor:
    """Log-probabilities of the samples from ``start`` on, on the CPU of every process, fp32. shape: how many samples,
    and the tokens of one, of which the batches may lack padding; 0 stands for that."""
    groups = network.groups
    found = log_probabilities(network, batches)
    whole = torch.zeros(shape, dtype=torch.float32, device=groups.platform.device)
    if groups.reports_loss:
        for values, rows in zip(found, numbers):
            for place, number in enumerate(rows):
                if number - start < shape[0]:
                    whole[number - start, : values.shape[1]] += values[place]
    dist.all_reduce(whole)
    return whole.cpu()


def _known(part: Path, data: GroupData, groups: Groups) -> int:
    """Samples whose numbers the unfinished file holds already; makes the file if it is not there."""
    known = 0
    if groups.is_first_rank:
        size = data.num_values * 4
        with suppress(OSError, ValueError, KeyError):
            if part.stat().st_size == size:
                known = int(json.loads(Path(f"{part}.json").read_text())["samples"])
        if not known:
            part.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as handle:
                handle.truncate(size)
    return int(groups.sum_over_world(float(known))[0])


def _note(part: Path, samples: int) -> None:
    with atomic_write(Path(f"{part}.json")) as handle:
        json.dump({"samples": samples}, handle)


def _publish(part: Path, path: Path) -> None:
    with atomic_write(Path(f"{path}.json")) as handle:
        json.dump({"sha256": sha256_of(part)}, handle)
    part.replace(path)
    Path(f"{part}.json").unlink(missing_ok=True)


def is_whole(path: Path, data: GroupData, groups: Groups) -> bool:
    """Whether a file of log-probabilities is there, as it was written, for these data. Collective; the first process
    looks."""
    whole = False
    if groups.is_first_rank:
        with suppress(OSError, ValueError, KeyError):
            wanted = json.loads(Path(f"{path}.json").read_text())["sha256"]
            whole = path.stat().st_size == data.num_values * 4 and sha256_of(path) == wanted
    return bool(groups.sum_over_world(float(whole))[0])


def read_scores(path: Path, data: GroupData) -> NDArray[np.float32]:
    """The numbers of a file that ``is_whole``. Raises UserError if this process does not see it."""
    try:
        values = np.memmap(path, np.float32, "r")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read here ({error}); put run_dir, or method.reference.folder, where every node of the "
            "run sees it"
        ) from None
    if len(values) != data.num_values:
        raise UserError(f"{path} is damaged: it holds {len(values)} numbers for {data.num_values} tokens; remove it")
    return values
