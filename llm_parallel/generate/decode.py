"""Continues prompts, with a KV cache, in one process or over TP x PP."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from llm_parallel.errors import UserError
from llm_parallel.generate.forward import pipeline_logits
from llm_parallel.generate.sampling import Sampling, choose
from llm_parallel.model.gpt import LlamaModel
from llm_parallel.model.sequence import KVCache


@torch.no_grad()
def generate(
    models: Sequence[LlamaModel],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    ends: Collection[int] = (),
    on_token: Callable[[int, int], bool | None] | None = None,
) -> list[list[int]]:
    """New tokens for each prompt, up to and without one of ``ends``.

    prompts: token ids, of any lengths; prompts of one length run as a batch, so nothing is padded. ``on_token`` is
    called with (prompt number, token) as they come, and an answer ends with the token for which it returns true. Every
    rank of the job calls this with the same arguments and gets the same answer. Raises UserError for an empty prompt or
    one that leaves no room in the model's context.
    """
    limit = models[0].model_config.max_seq_length_tokens
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {number} is empty; give at least one token")
        if len(prompt) + sampling.max_new_tokens > limit:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens and max_new_tokens is {sampling.max_new_tokens}, over "
                f"model.max_seq_length_tokens {limit}; shorten one of them"
            )
    for model in models:
        model.eval()
    generator = torch.Generator().manual_seed(sampling.seed)
    answers: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda number: (len(prompts[number]), number))
    for _, numbers in groupby(by_length, key=lambda number: len(prompts[number])):
        _generate_batch(models, prompts, list(numbers), sampling, ends, generator, answers, on_token)
    return answers


def _generate_batch(
    models: Sequence[LlamaModel],
    prompts: Sequence[Sequence[int]],
    rows: list[int],
    sampling: Sampling,
    ends: Collection[int],
    generator: torch.Generator,
    answers: list[list[int]],
    on_token: Callable[[int, int], bool | None] | None,
) -> None:
    """Answers the prompts ``rows``, all of one length; rows that reach one of ``ends`` leave the batch."""
    device = models[0].groups.platform.device
    tokens = torch.tensor([list(prompts[row]) for row in rows], device=device)
    cache = KVCache(tokens.shape[1] + sampling.max_new_tokens, len(rows))
    for _ in range(sampling.max_new_tokens):
        chosen = _next_tokens(models, tokens, cache, sampling, generator)
        going_on = []
        for place, (row, token) in enumerate(zip(rows, chosen.tolist())):
            if token in ends:
                continue
            answers[row].append(token)
            if on_token is None or not on_token(row, token):
                going_on.append(place)
        if not going_on:
            return
        if len(going_on) < len(rows):
            kept = torch.tensor(going_on, device=device)
            cache.reorder(kept)
            rows, chosen = [rows[place] for place in going_on], chosen[kept]
        tokens = chosen.unsqueeze(1)


def _next_tokens(
    models: Sequence[LlamaModel], tokens: Tensor, cache: KVCache, sampling: Sampling, generator: torch.Generator
) -> Tensor:
    """Next token of each row, int64 [b], the same on every rank."""
    groups = models[0].groups
    logits = pipeline_logits(models, tokens, cache)
    if logits is None:
        chosen = torch.empty(tokens.shape[0], dtype=torch.int64, device=tokens.device)
    else:
        chosen = choose(logits[:, -1], sampling, generator)
    if groups.mesh.world_size > 1:
        dist.broadcast(chosen, src=groups.mesh.world_size - 1)
    return chosen
