"""Cosines and sines by position, and which position every token has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeTable:
    """What a rotary embedding needs of the tokens.

    cos, sin: fp32 [positions, d/2], contiguous, one row per position; token_positions: int32 [s] or [s, b], or None
    where token i has position ``offset + i``. Documents packed after each other have a position array: 4 bytes a token
    beside some kilobytes of heads, which costs less than a search in ``cu_seqlens`` by every program.
    """

    cos: Tensor
    sin: Tensor
    token_positions: Tensor | None = None
    offset: int = 0

    @staticmethod
    def make(frequencies: Tensor, num_positions: int) -> RopeTable:
        """Table of positions 0 … num_positions - 1 for frequencies [d/2]; tokens have the positions of their index."""
        positions = torch.arange(num_positions, device=frequencies.device, dtype=torch.float32)
        angles = positions.unsqueeze(-1) * frequencies
        return RopeTable(angles.cos(), angles.sin())

    def at(self, token_positions: Tensor) -> RopeTable:
        """The same table for tokens at the given positions, whole numbers [s] or [s, b]."""
        return RopeTable(self.cos, self.sin, token_positions.to(self.cos.device, torch.int32).contiguous())

    def from_offset(self, offset: int) -> RopeTable:
        """The same table for tokens that begin at position ``offset``."""
        return RopeTable(self.cos, self.sin, None, offset)

    def from_cu_seqlens(self, cu_seqlens: Tensor, num_tokens: int) -> RopeTable:
        """The same table for documents [cu_seqlens[i], cu_seqlens[i + 1]), each beginning at position 0."""
        tokens = torch.arange(num_tokens, device=cu_seqlens.device)
        document = torch.searchsorted(cu_seqlens.long(), tokens, right=True) - 1
        return self.at(tokens - cu_seqlens.long()[document])

    @cached_property
    def _row_of_token(self) -> Tensor | slice:
        return slice(self.offset, None) if self.token_positions is None else self.token_positions.long()

    def full(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every token, fp32 [s, 1 or b, 1, d], halves repeated; what ref.rope takes."""
        key = f"_full_{num_tokens}"
        if key not in self.__dict__:  # kept: every layer of a model asks for the same
            pair = []
            for half in (self.cos, self.sin):
                rows = half[self._row_of_token][:num_tokens]
                rows = rows.unsqueeze(1) if rows.ndim == 2 else rows
                pair.append(torch.cat((rows, rows), dim=-1).unsqueeze(2))
            self.__dict__[key] = tuple(pair)
        return self.__dict__[key]
