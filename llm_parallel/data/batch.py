"""One micro batch, as models and objectives see it.

Shapes: b rows, s tokens of a row, d documents of the row that has the most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llm_parallel.parallel.mesh import Mesh


@dataclass(frozen=True)
class Documents:
    """Where the documents of each row begin: one int32 CPU tensor for each row, whose first number is 0. The last
    document ends with the row. Attention does not cross from one document to another, and positions begin at 0 in
    each. sample_tokens: the tokens of a whole sample, where the padding at its end was cut off (``Batch.cut``); what
    depends on the length of a sample takes this one."""

    starts: tuple[Tensor, ...]
    sample_tokens: int | None = None

    def __post_init__(self) -> None:
        for starts in self.starts:
            ascending = bool((starts[1:] > starts[:-1]).all())
            assert len(starts) and starts[0] == 0 and ascending, f"documents begin at {starts.tolist()}"

    @property
    def most(self) -> int:
        """Documents of the row that has the most."""
        return max(len(starts) for starts in self.starts)

    def cut(self, tokens: int, length: int) -> Documents:
        """Those that begin before position ``length`` of samples of so many tokens."""
        return Documents(tuple(starts[starts < length] for starts in self.starts), self.sample_tokens or tokens)

    def of_positions(self, positions: Tensor) -> Tensor:
        """Number of the document, from 0, in which each position lies: int64 [b, positions], on the CPU."""
        return torch.stack([torch.searchsorted(starts.long(), positions, right=True) - 1 for starts in self.starts])


@dataclass(frozen=True)
class Batch:
    """tokens, labels: int64 [b, s]; weights: fp32 [b, s], the weight of each label's loss (0 within a prompt);
    documents: None where attention crosses from one document to another; columns: fp32 [b, s] by name, a number for
    each label, such as its log-probability under a reference model; facts: fp32 [b, d] by name, a number for each
    document, such as a reward; numbers: int64 [b], the numbers of the samples, if they have any; mismatched: the same
    prompts with answers to others, where an objective needs those (``objectives/kto.py``)."""

    tokens: Tensor
    labels: Tensor
    weights: Tensor
    documents: Documents | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Tensor] = field(default_factory=dict)
    numbers: Tensor | None = None
    mismatched: Batch | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; copies from pinned memory do not block."""

        def moved(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        return replace(
            self,
            tokens=moved(self.tokens),
            labels=moved(self.labels),
            weights=moved(self.weights),
            columns={name: moved(column) for name, column in self.columns.items()},
            facts={name: moved(fact) for name, fact in self.facts.items()},
            numbers=None if self.numbers is None else moved(self.numbers),
            mismatched=None if self.mismatched is None else self.mismatched.to(device),
        )

    def without_rows(self, keep: Tensor) -> Batch:
        """The batch in which nothing counts of the rows where ``keep`` [b] is 0."""
        beside = None if self.mismatched is None else self.mismatched.without_rows(keep)
        return replace(self, weights=self.weights * keep.unsqueeze(1), mismatched=beside)

    def cut(self, length: int) -> Batch:
        """The batch without the positions from ``length`` on, which must be padding in every row: documents of their
        own at the end, whose labels weigh nothing."""
        tokens = self.tokens.shape[1]
        if length >= tokens:
            return self
        assert self.documents is not None, "padding is a document of its own"
        documents = self.documents.cut(tokens, length)

        def taken(x: Tensor) -> Tensor:
            return x[:, :length].contiguous()

        return replace(
            self,
            tokens=taken(self.tokens),
            labels=taken(self.labels),
            weights=taken(self.weights),
            documents=documents,
            columns={name: taken(column) for name, column in self.columns.items()},
            facts={name: fact[:, : documents.most] for name, fact in self.facts.items()},
            mismatched=None if self.mismatched is None else self.mismatched.cut(length),
        )

    def context_shard(self, mesh: Mesh, cp_rank: int) -> Batch:
        """The tokens that context-parallel rank ``cp_rank`` holds; documents, their facts and ``mismatched`` stay
        whole."""
        if mesh.cp == 1:
            return self
        ranges = mesh.token_ranges(self.tokens.shape[1], cp_rank)

        def take(x: Tensor) -> Tensor:
            return torch.cat([x[:, part.start : part.stop] for part in ranges], dim=1)

        return replace(
            self,
            tokens=take(self.tokens),
            labels=take(self.labels),
            weights=take(self.weights),
            columns={name: take(column) for name, column in self.columns.items()},
        )
