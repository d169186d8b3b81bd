"""What several tests of the data part need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm_parallel.data.indexed import write_index


def write_token_file(prefix: Path, documents: Sequence[NDArray[np.int32]], dtype: type = np.int32) -> str:
    """A .bin/.idx pair of these documents; returns the prefix."""
    kind = np.dtype(dtype)
    flat = np.concatenate(documents) if documents else np.zeros(0)
    Path(f"{prefix}.bin").write_bytes(flat.astype(kind).tobytes())
    with Path(f"{prefix}.idx").open("wb") as handle:
        write_index(handle.write, kind, [np.array([len(document) for document in documents], np.int32)])
    return str(prefix)


def numbered_documents(lengths: Sequence[int], first: int = 0) -> list[NDArray[np.int32]]:
    """Documents in which no token occurs twice: they count on from ``first``."""
    ends = first + np.cumsum(lengths)
    return [np.arange(end - length, end, dtype=np.int32) for end, length in zip(ends, lengths)]
