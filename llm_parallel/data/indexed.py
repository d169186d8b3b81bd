"""Megatron's token files: ``PREFIX.bin`` (token ids, document after document) and ``PREFIX.idx`` (where each lies).

Layout of .idx, little-endian: b"MMIDIDX\\0\\0", uint64 version 1, uint8 type code, uint64 sequences N, uint64 entries D
of the document list, int32 lengths [N], int64 byte offsets [N], int64 document list [D]. A sequence is a document here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_parallel.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
VERSION = 1
TYPE_CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
UINT16_VOCABULARY = 65500
"""Vocabularies below this are stored in uint16, as by megatron-core's ``DType.optimal_dtype``."""

REPORT_ENDING = ".report.json"
"""Ending of the report that ``prepare`` writes beside the pair; token files of other programs have none."""
CHUNK = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type in which megatron-core would store token ids of such a vocabulary."""
    return np.dtype(np.uint16 if vocab_size < UINT16_VOCABULARY else np.int32)


def type_code(dtype: np.dtype[Any]) -> int:
    """The .idx header's code of a token type."""
    return next(code for code, known in TYPE_CODES.items() if np.dtype(known) == dtype)


def write_index(write: Callable[[bytes], Any], dtype: np.dtype[Any], lengths: Iterable[NDArray[np.int32]]) -> None:
    """Writes an .idx file through ``write``. ``lengths``: number of tokens of each document, in order, in chunks;
    iterated over once."""
    chunks = list(lengths)
    count = sum(len(chunk) for chunk in chunks)
    write(HEADER.pack(MAGIC, VERSION, type_code(dtype), count, count + 1))
    for chunk in chunks:
        write(chunk.tobytes())
    offset = 0
    for chunk in chunks:
        ends = offset + np.cumsum(chunk.astype(np.int64) * dtype.itemsize)
        write((ends - chunk.astype(np.int64) * dtype.itemsize).tobytes())
        offset = int(ends[-1]) if len(ends) else offset
    for start in range(0, count + 1, CHUNK):
        write(np.arange(start, min(start + CHUNK, count + 1), dtype=np.int64).tobytes())


class TokenFile:
    """A read-only, memory-mapped pair of .bin and .idx.

    Attributes: ``prefix``; ``dtype`` of the ids; ``num_documents``; ``num_tokens``; ``document_lengths``, int32
    [num_documents], in tokens. Opening checks the whole index against the size of .bin and raises UserError.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self._bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        for path in (idx_path, self._bin_path):
            if not path.is_file():
                raise UserError(f"token file {path} does not exist; give the prefix that `prepare --out` wrote")
        self.dtype, self.num_documents, entries = _read_header(idx_path)
        end = HEADER.size + 12 * self.num_documents + 8 * entries
        size = idx_path.stat().st_size
        if self.num_documents and size == end + self.num_documents:
            raise UserError(f"index {idx_path} has a mode for every sequence (multimodal data), which is not read")
        if size != end:
            raise UserError(
                f"index {idx_path} has {size} bytes where its header announces {end}: it is truncated or damaged; "
                "run prepare again"
            )
        if not self.num_documents:
            raise UserError(f"index {idx_path} lists no documents; run prepare again on inputs that hold text")
        raw = np.memmap(idx_path, np.uint8, "r")
        lengths_end = HEADER.size + 4 * self.num_documents
        self._length_bytes: NDArray[np.uint8] = raw[HEADER.size : lengths_end]
        self.document_lengths: NDArray[np.int32] = self._length_bytes.view(np.int32)
        self._offsets: NDArray[np.int64] = raw[lengths_end : lengths_end + 8 * self.num_documents].view(np.int64)
        self.num_tokens = self._checked_tokens(idx_path)
        self._tokens: NDArray[Any] = np.memmap(self._bin_path, self.dtype, "r")

    @property
    def length_bytes(self) -> NDArray[np.uint8]:
        """``document_lengths`` as bytes: what ``llm_parallel._C.Epoch`` takes."""
        return self._length_bytes

    def tokens(self, document: int, start: int = 0, length: int | None = None) -> NDArray[Any]:
        """Tokens [start, start + length) of a document, to its end if no length is given: a view of ``dtype``."""
        held = int(self.document_lengths[document])
        end = held if length is None else start + length
        assert 0 <= start <= end <= held, (self.prefix, document, start, length)
        first = int(self._offsets[document]) // self.dtype.itemsize
        return self._tokens[first + start : first + end]

    def token_chunks(self, size: int = 16 * CHUNK) -> Iterable[NDArray[Any]]:
        """All tokens in order, in views of at most ``size``."""
        for start in range(0, self.num_tokens, size):
            yield self._tokens[start : start + size]

    def _checked_tokens(self, idx_path: Path) -> int:
        expected = 0
        for start in range(0, self.num_documents, CHUNK):
            lengths = self.document_lengths[start : start + CHUNK].astype(np.int64)
            ends = expected + np.cumsum(lengths) * self.dtype.itemsize
            begins = ends - lengths * self.dtype.itemsize
            if lengths.min() < 0 or not np.array_equal(begins, self._offsets[start : start + CHUNK]):
                raise UserError(
                    f"index {idx_path} is damaged: its documents do not follow each other; run prepare again"
                )
            expected = int(ends[-1])
        size = self._bin_path.stat().st_size
        if size != expected:
            raise UserError(
                f"token file {self._bin_path} has {size} bytes where its index announces {expected}: one of the two "
                "is truncated or from another run; run prepare again"
            )
        if not expected:
            raise UserError(f"token file {self._bin_path} holds no tokens; run prepare again on inputs that hold text")
        return expected // self.dtype.itemsize


def _read_header(path: Path) -> tuple[np.dtype[Any], int, int]:
    with path.open("rb") as handle:
        header = handle.read(HEADER.size)
    if not header.startswith(MAGIC):
        raise UserError(f"{path} is not a megatron index (it should begin with MMIDIDX); run prepare again")
    if len(header) < HEADER.size:
        raise UserError(f"index {path} is truncated to {len(header)} bytes, less than its header; run prepare again")
    _, version, code, documents, entries = HEADER.unpack(header)
    if version != VERSION:
        raise UserError(f"index {path} has version {version}, and only version {VERSION} is known; run prepare again")
    if code not in TYPE_CODES:
        raise UserError(f"index {path} has the unknown token type {code}, not an integer type; run prepare again")
    return np.dtype(TYPE_CODES[code]), documents, entries
