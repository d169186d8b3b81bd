"""The documents that two evaluations have in common, with what each asked and got."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """One document under one filter, in both evaluations."""

    task: str
    first: Sample
    second: Sample

    @property
    def document(self) -> tuple[Any, ...]:
        """What tells its document from others; a task with two filters has two pairs of one document."""
        return self.task, self.first.get("doc_id"), self.first.get("doc_hash")

    @property
    def same_prompt(self) -> bool:
        """Whether both asked the same thing: the whole text before the answer, of all requests."""
        return prompts_of(self.first) == prompts_of(self.second)

    def values(self, metric: str) -> tuple[float, float] | None:
        """The values of a metric, if it is a number in both."""
        one, other = self.first.get(metric), self.second.get(metric)
        if isinstance(one, int | float) and isinstance(other, int | float):
            return float(one), float(other)
        return None

    @property
    def metrics(self) -> list[str]:
        """Metrics that both have."""
        return [name for name in self.first.get("metrics", ()) if name in self.second.get("metrics", ())]


def arguments_of(sample: Sample) -> list[list[Any]]:
    """Arguments of a sample's requests: ours and lm-eval's files write them differently."""
    arguments = sample.get("arguments") or []
    if isinstance(arguments, Mapping):
        return [list(one.values()) if isinstance(one, Mapping) else list(one) for one in arguments.values()]
    return [list(one) for one in arguments]


def prompts_of(sample: Sample) -> list[str]:
    """The texts before the answers."""
    return [str(one[0]) for one in arguments_of(sample)]


def log_probs_of(sample: Sample) -> list[float]:
    """Log-probabilities of a sample's choices; none for one that was generated."""
    found = []
    for response in sample.get("resps") or ():
        while isinstance(response, Sequence) and not isinstance(response, str) and len(response) == 1:
            response = response[0]
        if isinstance(response, Sequence) and not isinstance(response, str) and len(response) == 2:
            try:
                found.append(float(response[0]))
            except (TypeError, ValueError):
                return []
    return found


def answers_of(sample: Sample) -> list[str]:
    """Texts that were generated for a sample."""
    found = []
    for response in sample.get("resps") or ():
        while isinstance(response, Sequence) and not isinstance(response, str) and response:
            response = response[0]
        if isinstance(response, str):
            found.append(response)
    return found


def pairs_of(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Pair]]:
    """Pairs by task, in the order of the first evaluation. Documents are the same if their hashes are."""
    found: dict[str, list[Pair]] = {}
    for task, samples in first["samples"].items():
        others = second["samples"].get(task)
        if others is not None:
            found[task] = list(_matched(task, samples, others))
    return found


def _matched(task: str, samples: Sequence[Sample], others: Sequence[Sample]) -> Iterator[Pair]:
    waiting: dict[tuple[Any, Any], list[Sample]] = {}
    for sample in others:
        waiting.setdefault((sample.get("doc_hash"), sample.get("filter")), []).append(sample)
    for sample in samples:
        same = waiting.get((sample.get("doc_hash"), sample.get("filter")))
        if same:
            yield Pair(task, sample, same.pop(0))
