"""The cosines and sines of every position, and the position of every token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeTable:
    """Cosines and sines by position, and the tokens' positions.

    cos, sin: fp32 [positions, d/2], contiguous, one row per position. token_positions: int32 [s] or [s, b], or None if
    token i has position ``offset + i``. Packed documents have token_positions: reading 4 bytes a token, beside the
    kilobytes of its heads, costs less than a search in ``cu_seqlens`` by every program.
    """

    cos: Tensor
    sin: Tensor
    token_positions: Tensor | None = None
    offset: int = 0

    @staticmethod
    def make(frequencies: Tensor, num_positions: int) -> RopeTable:
        """The table of positions 0 … num_positions - 1 for frequencies [d/2]; token i has position i."""
        positions = torch.arange(num_positions, device=frequencies.device, dtype=torch.float32)
        angles = positions.unsqueeze(-1) * frequencies
        return RopeTable(angles.cos(), angles.sin())

    def at(self, token_positions: Tensor) -> RopeTable:
        """The same table for tokens at the given positions, integers [s] or [s, b]."""
        return RopeTable(self.cos, self.sin, token_positions.to(self.cos.device, torch.int32).contiguous())

    def from_offset(self, offset: int) -> RopeTable:
        """The same table for tokens of which the first has position ``offset``."""
        return RopeTable(self.cos, self.sin, None, offset)

    def from_cu_seqlens(self, cu_seqlens: Tensor, num_tokens: int) -> RopeTable:
        """The same table for documents [cu_seqlens[i], cu_seqlens[i + 1]), each beginning at position 0."""
        tokens = torch.arange(num_tokens, device=cu_seqlens.device)
        document = torch.searchsorted(cu_seqlens.long(), tokens, right=True) - 1
        return self.at(tokens - cu_seqlens.long()[document])

    def full(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every token as ref.rope takes them: fp32 [s, 1 or b, 1, d], the d/2 numbers twice."""
        if torch.compiler.is_compiling():  # a compiled graph computes them anew
            return self._spread(num_tokens)
        key = f"_full_{num_tokens}"
        if key not in self.__dict__:  # cached, because every layer of a model asks for the same
            self.__dict__[key] = self._spread(num_tokens)
        return self.__dict__[key]

    def _spread(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        positions = self.token_positions
        at = slice(self.offset, self.offset + num_tokens) if positions is None else positions.long()
        rows = [half[at] for half in (self.cos, self.sin)]
        cos, sin = (torch.cat((x, x), dim=-1).unsqueeze(2 if x.ndim == 3 else 1) for x in rows)
        return (cos, sin) if cos.ndim == 4 else (cos.unsqueeze(1), sin.unsqueeze(1))
