"""What a pass gives beside the tokens that it chooses: log-probabilities of the prompt's own tokens, and hidden states
of a prompt, summed.

Both are taken from the same pass that computes the prompt's keys, on the last stage, and handed to all processes of the
replica. A prompt for which they are wanted shares no pages that others have filled, or parts of it would not be
computed; where its sequence is interrupted, it is computed and taken from the beginning again. Passes are settled in
the order in which they were planned, so the rows of a prompt come in order.
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
    """Rows of one pass. scored: those from which the next token of a prompt is predicted, with that token and how many
    of the likeliest ones are wanted; pooled: for each part whose hidden states are wanted, its rows."""

    scored_rows: tuple[int, ...]
    scored: tuple[tuple[int, int], ...]
    pooled: tuple[tuple[Part, range], ...]

    @staticmethod
    def of(parts: Sequence[Part]) -> Extras | None:
        """Those of a plan; None if nothing is wanted, as in most passes."""
        if not any(wants(part) for part in parts):
            return None
        rows, scored, pooled, row = list[int](), list[tuple[int, int]](), list[tuple[Part, range]](), 0
        for part in parts:
            prompt, top = part.sequence.request.prompt, part.sequence.request.prompt_log_probs
            inside = range(part.start, min(part.start + part.count, len(prompt)))
            if not wants(part) or not len(inside):
                row += part.count
                continue
            if top is not None:
                predicting = inside[: max(len(prompt) - 1 - part.start, 0)]
                rows += [row + place - part.start for place in predicting]
                scored += [(prompt[place + 1], top) for place in predicting]
            if part.sequence.request.embeds:
                pooled.append((part, range(row, row + len(inside))))
            row += part.count
        return Extras(tuple(rows), tuple(scored), tuple(pooled))

    @property
    def width(self) -> int:
        """Most of the likeliest tokens that are wanted with one."""
        return max((top for _, top in self.scored), default=0)

    def scores(self, logits: Tensor, deterministic: bool = False) -> list[Choice]:
        """The prompt's own tokens as if they had been chosen, under the model's distribution. logits: fp32 [scored
        rows, v]; deterministic: as of ``choose_tokens``."""
        if not self.scored:
            return []
        log_probs = logits.log_softmax(-1)
        tokens = torch.tensor([token for token, _ in self.scored], device=logits.device)
        exact = log_probs_of(logits, tokens) if deterministic else log_probs.gather(1, tokens.unsqueeze(1)).squeeze(1)
        own = exact.tolist()
        if not self.width:
            return [Choice(token, log_prob) for (token, _), log_prob in zip(self.scored, own)]
        top = log_probs.topk(min(self.width, logits.shape[1]), dim=-1)
        likeliest = zip(top.indices.tolist(), top.values.tolist())
        return [
            Choice(token, log_prob, tuple(zip(ids[:wanted], values)))
            for (token, wanted), log_prob, (ids, values) in zip(self.scored, own, likeliest)
        ]

    def sums(self, hidden: Tensor) -> Tensor:
        """fp32 [parts, H] from the normalized hidden states of all rows of the pass."""
        return torch.stack([hidden[rows.start : rows.stop].float().sum(0) for _, rows in self.pooled])

    def keep_scores(self, parts: Sequence[Part], choices: Sequence[Choice]) -> None:
        """Notes the scores with the sequences that they belong to."""
        taken = iter(choices)
        for part in parts:
            sequence = part.sequence
            if sequence.request.prompt_log_probs is None or not wants(part):
                continue
            if part.start == 0:
                sequence.prompt_scores.clear()
            for _ in range(part.start, min(part.start + part.count, len(sequence.request.prompt) - 1)):
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
