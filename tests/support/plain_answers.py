"""Greedy answers by the forward of training alone, without a cache, in every layout: what the generator is held to."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm_parallel.parallel.engine import Network
from llm_parallel.parallel.groups import Groups
from llm_parallel.train.step import schedule


@torch.no_grad()
def greedy_answers(
    network: Network, prompts: Sequence[Sequence[int]], ends: Collection[int], max_new_tokens: int
) -> list[list[int]]:
    """The most likely tokens after each prompt, up to and with the first of ``ends`` or ``max_new_tokens`` of them.

    Every process of the run calls this with the same prompts, none of them empty, and gets the same answers."""
    answers: list[list[int]] = [[] for _ in prompts]
    network.set_training(False)
    for _ in range(max_new_tokens):
        going_on = [n for n, answer in enumerate(answers) if not answer or answer[-1] not in ends]
        if not going_on:
            break
        chosen = _next_tokens(network, [[*prompts[n], *answers[n]] for n in going_on])
        for number, token in zip(going_on, chosen):
            answers[number].append(token)
    network.set_training(True)
    return answers


def _next_tokens(network: Network, rows: Sequence[Sequence[int]]) -> list[int]:
    """The most likely next token of each row."""
    groups, mesh = network.groups, network.groups.mesh
    # Interleaved stages take micro batches in groups of pp; what is missing repeats the first row.
    count = mesh.pp if network.stages.vpp > 1 else 1
    size = -(-len(rows) // count)
    filled = [*rows, *[rows[0]] * (count * size - len(rows))]
    unit = math.lcm(2 * mesh.cp if mesh.cp > 1 else 1, mesh.tp * mesh.cp if mesh.sequence_parallel else 1)
    length = -(-max(len(row) for row in rows) // unit) * unit
    padded = torch.tensor([[*row, *[0] * (length - len(row))] for row in filled])
    micro_batches = padded.to(groups.platform.device).split(size)
    last_places = torch.tensor([len(row) - 1 for row in filled]).split(size)
    found = schedule(network.stages)(
        forward_step_func=partial(_forward, groups, length, network.models[-1].num_valid_tokens),
        data_iterator=[zip(micro_batches, last_places) for _ in network.chunks],
        model=list(network.chunks),
        num_microbatches=count,
        seq_length=length,
        micro_batch_size=size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    chosen = torch.cat(found).tolist() if found else [0] * len(filled)
    return [int(token) for token in groups.sum_over_world(*chosen)][: len(rows)]


def _forward(
    groups: Groups, length: int, num_valid: int, iterator: Iterator[tuple[Tensor, Tensor]], chunk: Any
) -> tuple[Tensor, Any]:
    tokens, last_places = next(iterator)
    ranges = groups.mesh.token_ranges(length, groups.at.cp)
    own = torch.cat([tokens[:, part.start : part.stop] for part in ranges], dim=1)
    positions = torch.cat([torch.arange(part.start, part.stop) for part in ranges])
    return chunk(own), partial(_most_likely, groups, positions, last_places, num_valid)


def _most_likely(
    groups: Groups,
    positions: Tensor,
    last_places: Tensor,
    num_valid: int,
    logits: Tensor,
    non_loss_data: bool = True,
) -> Tensor:
    """int64 [b] on the CPU: the most likely token after each row's last one, on the one process of the run that says
    it, and 0 on all others. logits [b, s, v/tp] of the tokens at ``positions``; columns from ``num_valid`` on only
    round the vocabulary up."""
    held = positions[None, :] == last_places[:, None]
    chosen = torch.zeros(len(last_places), dtype=torch.int64)
    rows, places = held.nonzero(as_tuple=True)
    if not len(rows):
        return chosen
    last = logits[rows.to(logits.device), places.to(logits.device)].float()
    last[:, num_valid:] = -math.inf
    best, token = last.max(dim=-1)
    group = groups.collection.tp
    if group.size() > 1:
        pairs = torch.stack([best.double(), token.double() + groups.at.tp * logits.shape[-1]])
        parts = [torch.empty_like(pairs) for _ in range(group.size())]
        dist.all_gather(parts, pairs, group=group)
        every = torch.stack(parts)
        token = every[:, 1].gather(0, every[:, 0].argmax(dim=0, keepdim=True))[0]
    if groups.reports_loss and groups.at.dp == 0:
        chosen[rows] = token.long().cpu()
    return chosen
