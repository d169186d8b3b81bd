"""The bytes of a data file without its compression, and what the first of them say about it."""

from __future__ import annotations

import bz2
import codecs
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

INPUT_BYTES = 1 << 16
"""Compressed bytes that are decompressed at once. Text is seldom compressed to less than a tenth of its size, so that
the result stays below a megabyte."""
BLOCK_BYTES = 1 << 20

COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2"}
"""First bytes of what is decompressed."""
COMPRESSED_ENDINGS = (".gz", ".gzip", ".zst", ".zstd", ".xz", ".bz2")
SKIPPABLE_FRAME = (b"*M\x18", 1)
"""A zstd file may begin with a frame that holds no data; pzstd writes such files. Its bytes, and where they begin."""
ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order marks, in the order in which they are looked for: that of UTF-16 begins one of UTF-32."""
FOREIGN: tuple[tuple[bytes, int, str], ...] = (
    (b"version https://git-lfs.", 0, "is a Git LFS pointer and not the data itself; run `git lfs pull` in its folder"),
    (b"PK\x03\x04", 0, "is a zip archive; unpack it"),
    (b"ustar", 257, "is a tar archive; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", 0, "is a 7z archive; unpack it"),
    (b"\x04\x22\x4d\x18", 0, "is compressed with lz4; decompress it, or compress it with zstd or gzip"),
    (b"%PDF-", 0, "is a PDF; extract its text"),
    (b"\x89HDF\r\n", 0, "is an HDF5 file; convert it to JSON lines or Parquet"),
    (b"SQLite format 3", 0, "is an SQLite database; convert it to JSON lines or Parquet"),
    (b"\x93NUMPY", 0, "is a numpy array and no text"),
    (b"Obj\x01", 0, "is an Avro file; convert it to JSON lines or Parquet"),
    (b"ORC", 0, "is an ORC file; convert it to Parquet"),
    (b"MMIDIDX", 0, "is the index of token files, which are prepared already"),
    (b"\x80\x04\x95", 0, "is a Python pickle; convert it to JSON lines or Parquet"),
)
"""First bytes of what is not read, where they stand, and what to say."""


class Damaged(Exception):
    """The content of a file is not what its first bytes announce. ``reason`` says what is wrong, ``place`` where, if
    that is another place than the end of what was read."""

    def __init__(self, reason: str, place: str = "") -> None:
        super().__init__(f"{place} {reason}".strip())
        self.reason, self.place = reason, place


def compression_of(head: bytes) -> str | None:
    """The compression that the first bytes of a file announce."""
    frame, at = SKIPPABLE_FRAME
    if head[at : at + len(frame)] == frame and head[:1] and 0x50 <= head[0] <= 0x5F:
        return "zstd"
    return next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), None)


def encoding_of(head: bytes) -> str:
    """The encoding that a byte order mark announces, else UTF-8."""
    return next((name for mark, name in ENCODINGS.items() if head.startswith(mark)), "utf-8")


def foreign(head: bytes) -> str | None:
    """What to say of a file that begins like something that is not read."""
    return next((said for magic, at, said in FOREIGN if head[at : at + len(magic)] == magic), None)


def blocks(path: Path, compression: str | None) -> Iterator[bytes]:
    """The uncompressed bytes of a file, every member and frame of it. Raises Damaged where they end early or are no
    data of that compression; what came before has been yielded."""
    with path.open("rb") as raw:
        if compression is None:
            while block := raw.read(BLOCK_BYTES):
                yield block
            return
        start, errors = _decompressor(compression)
        member, rest, begun = start(), b"", False
        while block := rest or raw.read(INPUT_BYTES):
            if member.eof:
                # gzip and xz files may be padded with zeros.
                block = block.lstrip(b"\0") if compression in ("gzip", "xz") else block
                if not block:
                    rest = b""
                    continue
                member = start()
            begun = True
            try:
                out = member.decompress(block)
            except errors as error:
                raise Damaged(
                    f"holds damaged {compression} data ({error}), so that what was read of it may be wrong too; fetch "
                    "or compress it again"
                ) from None
            rest = member.unused_data if member.eof else b""
            if out:
                yield out
        if begun and not member.eof:
            raise Damaged(f"holds {compression} data that ends early; fetch or compress it again")


def utf8_blocks(content: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """The same text in UTF-8 and without a byte order mark. Raises Damaged where the bytes are not of that encoding
    (UTF-8 itself is not checked)."""
    if encoding == "utf-8":
        yield from content
        return
    if encoding == "utf-8-sig":
        first = b""
        for block in content:
            first += block
            if len(first) >= len(codecs.BOM_UTF8):
                yield first.removeprefix(codecs.BOM_UTF8)
                break
        yield from content
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for block in content:
            yield decoder.decode(block).encode()
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise Damaged(f"is not {encoding.upper()} all through ({error.reason}); convert it to UTF-8") from None


def _decompressor(compression: str) -> tuple[Callable[[], Any], tuple[type[Exception], ...]]:
    """What makes a decompressor of one member, and the errors that it raises on damaged data."""
    if compression == "gzip":
        return (lambda: zlib.decompressobj(31)), (zlib.error,)
    if compression == "xz":
        return lzma.LZMADecompressor, (lzma.LZMAError,)
    if compression == "bzip2":
        return bz2.BZ2Decompressor, (OSError,)
    import zstandard

    # Large windows (`zstd --long=31`) are refused by default.
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj, (zstandard.ZstdError,)
