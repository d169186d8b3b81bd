"""What a pass gives beside the tokens that it chooses: log-probabilities of the prompt's own tokens, and hidden states
of a prompt, summed.

Both are taken from the same pass that computes the prompt's keys, on the last stage, and handed to all processes of the
replica. A prompt for which they are wanted shares only those pages that others have filled which end before the first
row that is needed, or parts of it would not be computed; where its sequence is interrupted, all of them are computed
and taken again. Passes are settled in the order in which they were planned, so the rows of a prompt come in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_parallel.generate.draw import Choice
from llm_parallel.generate.scheduler import Part
from llm_parallel.model.deterministic import log_probs_of


@dataclass(frozen=True)
class Extras:
    """Rows of one pass. scored_rows: those from which tokens are predicted whose log-probabilities are wanted; scored:
    the place in ``scored_rows`` of each such token, the token, and how many of the likeliest ones are wanted with it;
    pooled: for each part whose hidden states are wanted, its rows."""

    scored_rows: tuple[int, ...]
    scored: tuple[tuple[int, int, int], ...]
    pooled: tuple[tuple[Part, range], ...]

    @staticmethod
    def of(parts: Sequence[Part]) -> Extras | None:
        """Those of a plan; None if nothing is wanted, as in most passes."""
        if not any(wants(part) for part in parts):
            return None
        rows, scored, pooled, row = list[int](), list[tuple[int, int, int]](), list[tuple[Part, range]](), 0
        for part in parts:
            request = part.sequence.request
            inside = range(part.start, min(part.start + part.count, len(request.prompt)))
            if not wants(part) or not len(inside):
                row += part.count
                continue
            for place in _scored_places(part):
                scored.append((len(rows), request.prompt[place], request.prompt_log_probs or 0))
                rows.append(row + place - 1 - part.start)
            if _ends_prompt(part) and request.candidates:
                scored += [(len(rows), token, 0) for token in request.candidates]
                rows.append(row + len(request.prompt) - 1 - part.start)
            if request.embeds:
                pooled.append((part, range(row, row + len(inside))))
            row += part.count
        return Extras(tuple(rows), tuple(scored), tuple(pooled))

    @property
    def width(self) -> int:
        """Most of the likeliest tokens that are wanted with one."""
        return max((top for _, _, top in self.scored), default=0)

    def scores(self, logits: Tensor, deterministic: bool = False) -> list[Choice]:
        """The prompt's own tokens as if they had been chosen, under the model's distribution. logits: fp32 [scored
        rows, v]; deterministic: as of ``choose_tokens``."""
        if not self.scored:
            return []
        log_probs = logits.log_softmax(-1)
        places, tokens, _ = torch.tensor(self.scored, device=logits.device).unbind(1)
        exact = log_probs_of(logits[places], tokens) if deterministic else log_probs[places, tokens]
        own = exact.tolist()
        if not self.width:
            return [Choice(token, log_prob) for (_, token, _), log_prob in zip(self.scored, own)]
        top = log_probs.topk(min(self.width, logits.shape[1]), dim=-1)
        ids, values = top.indices.tolist(), top.values.tolist()
        return [
            Choice(token, log_prob, tuple(zip(ids[place][:wanted], values[place])))
            for (place, token, wanted), log_prob in zip(self.scored, own)
        ]

    def sums(self, hidden: Tensor) -> Tensor:
        """fp32 [parts, H] from the normalized hidden states of all rows of the pass."""
        return torch.stack([hidden[rows.start : rows.stop].float().sum(0) for _, rows in self.pooled])

    def keep_scores(self, parts: Sequence[Part], choices: Sequence[Choice]) -> None:
        """Notes the scores with the sequences that they belong to."""
        taken = iter(choices)
        for part in parts:
            sequence = part.sequence
            if not wants(part):
                continue
            places = _scored_places(part)
            ends = _ends_prompt(part)
            if places.start == sequence.request.scores_from or sequence.request.prompt_log_probs is None:
                sequence.prompt_scores.clear()
            for _ in range(len(places) + (len(sequence.request.candidates) if ends else 0)):
                choice = next(taken)
                sequence.prompt_scores.append((choice.log_prob, choice.top))

    def keep_sums(self, sums: Tensor) -> None:
        """Adds the sums to the sequences that they belong to."""
        for (part, _), total in zip(self.pooled, sums.double().cpu().numpy()):
            sequence, before = part.sequence, part.sequence.hidden_sum
            sequence.hidden_sum = total if part.start == 0 or before is None else before + total


def wants(part: Part) -> bool:
    """Whether a part is of a sequence for whose prompt more is wanted than keys: the first answer to a request that
    asks for it, while its prompt is computed."""
    request = part.sequence.request
    return part.sequence.sample == 0 and part.start < len(request.prompt) and request.looks_at_prompt


def _scored_places(part: Part) -> range:
    """Places of the prompt whose tokens are predicted by rows of this part, and whose scores are wanted."""
    request = part.sequence.request
    first = max(part.start + 1, request.scores_from)
    if request.prompt_log_probs is None:
        return range(first, first)
    return range(first, min(part.start + part.count + 1, len(request.prompt)))


def _ends_prompt(part: Part) -> bool:
    """Whether the part computes the prompt's last token."""
    return part.start < len(part.sequence.request.prompt) <= part.start + part.count
