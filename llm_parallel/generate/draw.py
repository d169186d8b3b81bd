"""Draws tokens so that an answer depends on nothing but its request.

The random number of a token is a pure function of seed, stream, sample and position. A generator that all requests of a
batch draw from would make an answer depend on who else is in the batch, and on how many processes there are.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm_parallel.errors import UserError
from llm_parallel.generate.extension import best_of
from llm_parallel.generate.requests import TopTokens
from llm_parallel.generate.sampling import Sampling, filtered
from llm_parallel.model.deterministic import log_probs_of


@dataclass(frozen=True)
class Draw:
    """One token to choose: the settings, and what has been written so far. ``prompt_length`` of ``tokens`` are the
    prompt's. ``allowed``: bool [v], the tokens that may be chosen, by default all."""

    sampling: Sampling
    stream: int
    sample: int
    tokens: Sequence[int]
    prompt_length: int
    allowed: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Choice:
    """A chosen token, the logarithm of its probability, and the likeliest tokens, all of the distribution drawn from
    (for temperature 0, the model's over the allowed tokens). ``NO_TOKEN`` if none was allowed."""

    token: int
    log_prob: float
    top: TopTokens = ()


NO_TOKEN = -1


def uniform(seed: int, stream: int, sample: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits."""
    words = struct.pack("<qqqq", seed, stream, sample, position)
    return (int.from_bytes(blake2b(words, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def choose_tokens(logits: Tensor, draws: Sequence[Draw], deterministic: bool = False) -> list[Choice]:
    """One token for each row of fp32 logits [b, v]. ``deterministic``: log-probabilities have the roundings of
    training under ``kernels.deterministic``."""
    lost = [draw.allowed is not None and not draw.allowed.any() for draw in draws]
    if any(lost):
        draws = [replace(draw, allowed=None) if without else draw for draw, without in zip(draws, lost)]
        chosen = choose_tokens(logits, draws, deterministic)
        return [Choice(NO_TOKEN, 0.0) if without else choice for choice, without in zip(chosen, lost)]
    logits = _allowed(_changed(logits, draws), draws)
    by_settings: dict[tuple[float, int, float, float], list[int]] = {}
    for row, draw in enumerate(draws):
        how = draw.sampling
        by_settings.setdefault((how.temperature, how.top_k, how.top_p, how.min_p), []).append(row)
    found: list[Choice | None] = [None] * len(draws)
    for rows in by_settings.values():
        part = logits if len(rows) == len(draws) else logits[torch.tensor(rows, device=logits.device)]
        for row, choice in zip(rows, _alike(part, [draws[row] for row in rows], deterministic)):
            found[row] = choice
    return [choice for choice in found if choice is not None]


def _changed(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Logits with penalties and biases."""
    if not any(draw.sampling.changes_logits for draw in draws):
        return logits
    logits = logits.clone()
    for row, draw in zip(logits, draws):
        how = draw.sampling
        if how.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(draw.tokens)), device=row.device)
            of_seen = row[seen]
            penalty = how.repetition_penalty
            row[seen] = torch.where(of_seen > 0, of_seen / penalty, of_seen * penalty)
        counts = Counter(draw.tokens[draw.prompt_length :])
        if counts and (how.frequency_penalty or how.presence_penalty):
            seen, times = (torch.tensor(list(x), device=row.device) for x in (counts.keys(), counts.values()))
            row[seen] -= how.frequency_penalty * times + how.presence_penalty
        for token, bias in how.logit_bias:
            row[token] += bias
    return logits


def _allowed(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Logits with minus infinity for tokens that are not allowed."""
    rows = [row for row, draw in enumerate(draws) if draw.allowed is not None]
    if not rows:
        return logits
    refused = torch.zeros(logits.shape, dtype=torch.bool)
    refused[rows] = torch.from_numpy(~np.stack([draw.allowed for draw in draws if draw.allowed is not None]))
    return logits.masked_fill(refused.to(logits.device), -torch.inf)


def _alike(logits: Tensor, draws: Sequence[Draw], deterministic: bool) -> list[Choice]:
    """The same for rows that agree about everything but penalties, biases and top_log_probs."""
    how = draws[0].sampling
    most = max(draw.sampling.top_log_probs for draw in draws)
    if how.temperature == 0.0 and not (most or deterministic) and (found := best_of(logits)) is not None:
        chosen = zip(found.tokens, found.logits, found.log_sums)
        return [Choice(token, _finite(logit - log_sum)) for token, logit, log_sum in chosen]
    if how.temperature == 0.0:
        best, tokens = logits.max(dim=-1)
    else:
        logits = filtered(logits, how)
        tokens = _drawn(logits, draws)
        best = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
    totals = torch.logsumexp(logits, dim=-1)
    log_probs = log_probs_of(logits, tokens) if deterministic else best - totals
    numbers = torch.stack((tokens.double(), log_probs.double())).tolist()
    if not most:
        return [Choice(int(token), _finite(log_prob)) for token, log_prob in zip(*numbers)]
    likeliest = (logits - totals.unsqueeze(1)).topk(min(most, logits.shape[1]), dim=-1)
    rows = zip(*numbers, likeliest.indices.tolist(), likeliest.values.tolist(), draws)
    return [
        Choice(int(token), _finite(log_prob), _top(ids[: draw.sampling.top_log_probs], values))
        for token, log_prob, ids, values, draw in rows
    ]


def _finite(log_prob: float) -> float:
    if not math.isfinite(log_prob):
        raise UserError("the model's output is not finite; its weights are damaged, or training has diverged")
    return log_prob


def _top(ids: Sequence[int], values: Sequence[float]) -> TopTokens:
    return tuple((token, value) for token, value in zip(ids, values) if value > -math.inf)


def _drawn(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The token at which the sum of the shares, in the order of the token ids, passes the row's random number. Another
    rounding of the logits changes the answer only if it moves the sum across that number."""
    random = [
        uniform(draw.sampling.seed, draw.stream, draw.sample, len(draw.tokens) - draw.prompt_length) for draw in draws
    ]
    sums = logits.softmax(dim=-1).double().cumsum_(dim=-1)
    wanted = torch.tensor(random, dtype=torch.float64, device=logits.device).unsqueeze(1) * sums[:, -1:]
    return torch.searchsorted(sums, wanted, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)
