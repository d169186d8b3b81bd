"""Raw text on disk: which files an input names, how they are divided into shards, and the documents of a shard."""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llm_parallel.errors import UserError

JSON_LINES = (".jsonl", ".ndjson")
COMPRESSED = (".gz", ".zst")
PROSE = (".txt", ".md", ".rst", ".tex")
SOURCE_CODE = (
    ".py",
    ".pyi",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".hpp",
    ".cu",
    ".java",
    ".js",
    ".ts",
    ".go",
    ".rs",
    ".rb",
    ".sh",
)
TEXT_EXTENSIONS = frozenset((*JSON_LINES, *PROSE, *SOURCE_CODE))
"""Endings of the files that are read from a folder, compressed or not; a file that is named itself or matches a glob is
always read."""
MAX_DOCUMENT_BYTES = 256 << 20
"""A tokenizer works on a whole document at once and needs some hundred bytes of memory for each of its bytes."""
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Piece:
    """The bytes [start, end) of a file. Of a file of JSON lines they stand for the lines that begin in this range; of
    any other file they are always the whole."""

    path: str
    start: int
    end: int

    @property
    def json_lines(self) -> bool:
        """Whether each line is a document; else the file is one."""
        return _plain_suffix(self.path) in JSON_LINES


@dataclass
class Skipped:
    """What was left out: files that are not UTF-8, and documents without text."""

    undecodable: int = 0
    empty: int = 0


def find_files(inputs: Sequence[str], extensions: Collection[str] | None = None) -> list[Path]:
    """Files that ``inputs`` (files, folders, globs) name, in that order, folders and globs sorted, each file once.

    ``extensions``: what is taken from folders instead of TEXT_EXTENSIONS. Raises UserError if an input names nothing.
    """
    wanted = frozenset(extensions) if extensions is not None else TEXT_EXTENSIONS
    found: dict[Path, None] = {}
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_dir():
            here = list(_walk(path, wanted))
            if not here:
                raise UserError(f"input folder {name} holds no text files; endings taken: {' '.join(sorted(wanted))}")
        elif path.exists():
            here = [path]
        else:
            # Path.glob takes no absolute patterns.
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
            here = [file for match in matches for file in _files_of(match, wanted)]
            if not here:
                raise UserError(f"input {name} does not exist and matches no file; give files, folders or globs")
        found.update(dict.fromkeys(file.resolve() for file in here))
    return list(found)


def plan_shards(files: Sequence[Path], max_bytes: int) -> list[list[Piece]]:
    """Divides files, in order, into shards of about ``max_bytes``; uncompressed JSON lines are cut within a file."""
    shards: list[list[Piece]] = [[]]
    room = max_bytes
    for path in files:
        size = path.stat().st_size
        step = max_bytes if path.suffix in JSON_LINES else max(size, 1)
        for start in range(0, max(size, 1), step):
            piece = Piece(str(path), start, min(start + step, size))
            if shards[-1] and piece.end - piece.start > room:
                shards.append([])
                room = max_bytes
            shards[-1].append(piece)
            room -= piece.end - piece.start
    return [shard for shard in shards if shard]


def documents(piece: Piece, key: str, skipped: Skipped) -> Iterator[str]:
    """Non-empty texts of a piece. ``key`` is the field of a JSON line that holds the text.

    Raises UserError on a line that is not JSON or lacks the field, and on damaged compressed files.
    """
    try:
        texts = _json_texts(piece, key) if piece.json_lines else _whole_text(piece, skipped)
        for text in texts:
            if text:
                yield text
            else:
                skipped.empty += 1
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise UserError(f"compressed input {piece.path} is truncated or damaged; fetch or compress it again") from None


def _files_of(path: Path, extensions: Collection[str]) -> Iterator[Path]:
    if path.is_dir():
        yield from _walk(path, extensions)
    elif path.is_file():
        yield path


def _walk(folder: Path, extensions: Collection[str]) -> Iterator[Path]:
    for here, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            path = Path(here) / name
            if not name.startswith(".") and _plain_suffix(name) in extensions and path.is_file():
                yield path


def _plain_suffix(name: str) -> str:
    """The ending that says what a file holds: that before .gz or .zst."""
    path = Path(name)
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _whole_text(piece: Piece, skipped: Skipped) -> Iterator[str]:
    content = bytearray()
    for block in _blocks(piece):
        content += block
        if len(content) > MAX_DOCUMENT_BYTES:
            raise UserError(
                f"input {piece.path} is one document of over {MAX_DOCUMENT_BYTES >> 20} MiB; divide it into files or "
                "JSON lines"
            )
    try:
        yield content.decode("utf-8-sig")
    except UnicodeDecodeError:
        skipped.undecodable += 1


def _json_texts(piece: Piece, key: str) -> Iterator[str]:
    for offset, line in _lines(piece):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            raise UserError(f"{_place(piece, offset)} is not JSON; every line has to be a JSON object") from None
        text = record.get(key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            fields = f"its fields are {', '.join(map(repr, record))}" if isinstance(record, dict) else "it is no object"
            raise UserError(f"{_place(piece, offset)} has no text under {key!r}: {fields}; name the field with --key")
        yield text


def _place(piece: Piece, offset: int) -> str:
    """File and line of the byte at ``offset`` of the uncompressed text. Counts lines; only for messages."""
    whole = Piece(piece.path, 0, offset) if Path(piece.path).suffix in COMPRESSED else Piece(piece.path, 0, 0)
    seen, number = 0, 1
    for block in _blocks(whole):
        number += block[: max(offset - seen, 0)].count(b"\n")
        seen += len(block)
        if seen >= offset:
            break
    return f"{piece.path} line {number}"


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Lines that begin in a piece, each with its offset in the uncompressed file."""
    if Path(piece.path).suffix not in COMPRESSED:
        with Path(piece.path).open("rb", buffering=BLOCK_BYTES) as handle:
            if piece.start:
                # Reads on from the byte before ``start``: if that byte ends a line, the first line of this piece begins
                # at ``start``, else after the next line end.
                handle.seek(piece.start - 1)
                handle.readline()
            offset = handle.tell()
            while offset < piece.end and (line := handle.readline()):
                yield offset, line
                offset += len(line)
        return
    offset, rest = 0, b""
    for block in _blocks(piece):
        *whole, rest = (rest + block).split(b"\n")
        for line in whole:
            yield offset, line
            offset += len(line) + 1
    if rest:
        yield offset, rest


def _blocks(piece: Piece) -> Iterator[bytes]:
    """The uncompressed bytes of the whole file."""
    with Path(piece.path).open("rb") as raw:
        if piece.path.endswith(".zst"):
            yield from _zstd_blocks(raw)
            return
        with gzip.open(raw) if piece.path.endswith(".gz") else raw as handle:
            while block := handle.read(BLOCK_BYTES):
                yield block


def _zstd_blocks(raw: IO[bytes]) -> Iterator[bytes]:
    """Every frame of a .zst file. The library's own reader takes a truncated file for a complete one."""
    import zstandard

    frame, rest = zstandard.ZstdDecompressor().decompressobj(), b""
    started = False
    try:
        while block := rest or raw.read(BLOCK_BYTES):
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            started = True
            yield frame.decompress(block)
            rest = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError:
        raise EOFError from None
    if started and not frame.eof:
        raise EOFError
