"""Random numbers that depend on nothing but what they are for, so that they are the same in every layout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ODD = tuple(value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mixed(x: Tensor) -> Tensor:
    """A bijection of int64 whose result looks random (the finalizer of SplitMix64; Steele et al. 2014, OOPSLA)."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _ODD[1]
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _ODD[2]
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def uniform_noise(seed: int, numbers: Tensor, positions: Tensor, width: int) -> Tensor:
    """fp32 [s, b, width], uniform between -1 and 1: a function of seed, sample number (int64 [b]), position (int64 [s])
    and channel."""
    channels = torch.arange(width, device=numbers.device)
    key = _mixed(numbers * _ODD[0] + seed)
    key = _mixed(key[None, :] + (positions[:, None] + 1) * _ODD[0])
    bits = _mixed(key[:, :, None] + (channels + 1) * _ODD[0])
    return ((bits >> 40) & ((1 << 24) - 1)).float() * 2.0**-23 - 1.0


def add_embedding_noise(
    embedded_SBH: Tensor, alpha: float, seed: int, numbers: Tensor, positions: Tensor, length: int
) -> Tensor:
    """Embeddings with the noise of NEFTune, uniform of size alpha / sqrt(tokens · width) (Jain et al. 2023, arXiv
    2310.05914).

    numbers: int64 [B] of the samples; positions: int64 [S] of the tokens; length: tokens of a whole sample."""
    width = embedded_SBH.shape[-1]
    size = alpha / math.sqrt(length * width)
    noise = uniform_noise(seed, numbers, positions.to(numbers.device), width)
    return embedded_SBH + (size * noise).to(embedded_SBH.dtype)
