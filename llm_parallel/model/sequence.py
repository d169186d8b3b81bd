"""What attention must know about a micro batch: positions, and which tokens attend to which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from llm_kernels.attention.op import Segments
from llm_kernels.attention.ref import Segment
from llm_kernels.rope.table import RopeTable
from llm_parallel.config.tree import ModelConfig
from llm_parallel.data.batch import Documents
from llm_parallel.model.rotary import frequencies


@dataclass
class SequenceInfo(PackedSeqParams):
    """Passes through megatron-core's layers as ``packed_seq_params`` to our core attention.

    rope: angles of this process's tokens; segments: as in llm_kernels.attention.ref, for each batch row or one for all;
    parts: lengths of the token ranges that this process holds; shape: samples and tokens of a whole sample.
    """

    qkv_format: str = "sbhd"
    rope: RopeTable = field(default=None)  # type: ignore[assignment]  # the base class's fields have defaults
    segments: tuple[tuple[Segment, ...], ...] = ()
    parts: tuple[int, ...] = ()
    shape: tuple[int, int] = (1, 0)
    _tables: list[tuple[slice, Segments]] = field(default_factory=list, repr=False)

    def tables(self) -> list[tuple[slice, Segments]]:
        """For each token range of this process: its place among the process's tokens, and the segments of its queries
        on the device. The tables are made once for all layers."""
        if not self._tables:
            rows, num_keys = self.shape
            by_row = self.segments if len(self.segments) > 1 else self.segments * rows
            start = 0
            for length in self.parts:
                end = start + length
                found = [
                    (row, part.q_start - start, part.q_end - start, part.k_start, part.k_end)
                    for row, parts in enumerate(by_row)
                    for part in parts
                    if start <= part.q_start < end
                ]
                table = Segments.from_rows(found, rows, length, num_keys, self.rope.cos.device)
                self._tables.append((slice(start, end), table))
                start = end
        return self._tables


class Angles:
    """The rotary table of a model, which is extended when more positions are needed."""

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        self._model, self._device = model, device
        self._frequencies: Tensor | None = None
        self._table: RopeTable | None = None

    def reaching(self, num_positions: int, length: int) -> RopeTable:
        """Table of at least ``num_positions`` positions, for samples of ``length`` tokens."""
        wanted = frequencies(self._model, length, self._device) if self._depends(length) else self._frequencies
        changed = wanted is not self._frequencies
        self._frequencies = wanted
        assert wanted is not None
        if changed or self._table is None or self._table.cos.shape[0] < num_positions:
            self._table = RopeTable.make(wanted, num_positions)
        return self._table

    def _depends(self, length: int) -> bool:
        """Whether frequencies must be computed: the first time, and where they follow the length of the sample."""
        scaling = self._model.rope_scaling
        return self._frequencies is None or (scaling is not None and scaling.kind in ("dynamic", "longrope"))


def document_segments(starts: Sequence[int], token_ranges: tuple[range, ...]) -> tuple[Segment, ...]:
    """Segments of one sample, one for each document in each of this process's token ranges: a token attends to its
    document's tokens up to itself. ``starts``: positions of the documents' first tokens; the last document ends with
    the sample."""
    segments = []
    offset = 0
    for part in token_ranges:
        for index, start in enumerate(starts):
            end = starts[index + 1] if index + 1 < len(starts) else part.stop
            low, high = max(start, part.start), min(end, part.stop)
            if low < high:
                segments.append(Segment(offset + low - part.start, offset + high - part.start, start, high))
        offset += len(part)
    return tuple(segments)


def whole_length(documents: Documents | None, tokens: int) -> int:
    """Tokens of a whole sample, of which a micro batch has ``tokens`` after padding was cut off."""
    return tokens if documents is None or documents.sample_tokens is None else documents.sample_tokens


def sequence_info(
    token_ranges: tuple[range, ...],
    documents: Documents | None,
    angles: Angles,
    shape: tuple[int, int],
) -> SequenceInfo:
    """Positions and segments of a micro batch of which this process holds ``token_ranges`` of every sample. shape:
    samples, and tokens of a sample over all processes.

    documents: None where attention crosses from one document to another.
    """
    reached = max(part.stop for part in token_ranges)
    table = angles.reaching(reached, whole_length(documents, shape[1]))
    parts = tuple(len(part) for part in token_ranges)
    positions = torch.cat([torch.arange(part.start, part.stop) for part in token_ranges])
    if documents is None:
        segments: tuple[tuple[Segment, ...], ...] = (document_segments([0], token_ranges),)
        rope = table.from_offset(token_ranges[0].start) if len(parts) == 1 else table.at(positions)
    else:
        segments = tuple(document_segments(starts.tolist(), token_ranges) for starts in documents.starts)
        rows = zip(documents.starts, documents.of_positions(positions))
        rope = table.at(torch.stack([positions - starts.long()[numbers] for starts, numbers in rows], dim=1))
    return SequenceInfo(rope=rope, segments=segments, parts=parts, shape=shape)
