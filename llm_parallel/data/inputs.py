"""Raw text on disk: which files an input names, how they are divided into shards, and the documents of a shard."""

from __future__ import annotations

import codecs
import difflib
import glob
import os
import shlex
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_parallel.data.containers import Damaged, blocks, utf8_blocks
from llm_parallel.data.kinds import TELLING, Kind, NotRead, ending, judge
from llm_parallel.data.readers import (
    MAX_RECORD_BYTES,
    SHOWN,
    TOO_LONG,
    MissingColumn,
    parse_line,
    records,
    surrogates,
)
from llm_parallel.errors import UserError

TEXT_EXTENSIONS = frozenset(TELLING)
"""Endings of the files that are read from a folder, compressed or not, in small or capital letters; a file that is
named itself or matches a glob is always read."""
MAX_DOCUMENT_BYTES = 256 << 20
"""A tokenizer works on a whole document at once and needs some hundred bytes of memory for each of its bytes."""
BUFFER_BYTES = 1 << 20
SHOWN_FIELDS = 12
USUAL_FIELDS = ("text", "content", "raw_content", "body", "document", "article", "code", "completion", "response")
"""Names under which published corpora keep their text."""


@dataclass(frozen=True)
class Input:
    """A file to read: its path as it was given, its size in bytes, and what it holds."""

    path: str
    size: int
    kind: Kind

    @property
    def identity(self) -> tuple[str, int, int]:
        """What tells whether it is still the same file: where it lies, size, and time of its last change."""
        return os.path.realpath(self.path), self.size, Path(self.path).stat().st_mtime_ns


@dataclass(frozen=True)
class Piece:
    """The bytes [start, end) of a file. Of uncompressed JSON lines they stand for the lines that begin in this range;
    of any other file they are always the whole."""

    path: str
    start: int
    end: int
    kind: Kind
    whole: bool = True
    """Whether it is all of the file."""


@dataclass
class Found:
    """What the inputs name: ``files`` to read, ``skipped`` (path, reason), and how many files of folders were not
    looked at because of their ending."""

    files: list[Input] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    other_endings: Counter[str] = field(default_factory=Counter)


@dataclass
class Losses:
    """What was left out of the pieces that were read: documents without text, bad records (how many, and of the first
    five path, place and reason; a place that is a number is an offset in bytes), the rest of damaged files (a sentence
    each), and files of which nothing was read (path, reason). With ``strict`` the first that is bad, damaged or not
    read is a UserError."""

    strict: bool = False
    empty: int = 0
    bad: int = 0
    first: list[tuple[str, str | int, str]] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def add(self, path: str, place: str | int, reason: str) -> None:
        """Counts a bad record."""
        if self.strict:
            raise UserError(sentence(path, place, reason))
        self.bad += 1
        if len(self.first) < SHOWN:
            self.first.append((path, place, reason))

    def skip(self, path: str, reason: str) -> None:
        """Notes a file of which nothing is read."""
        if self.strict:
            raise UserError(f"{path} {reason}")
        self.skipped.append((path, reason))

    def merge(self, other: Losses, whole: Piece | None) -> None:
        """Adds what was left out of a piece. whole: the piece, if it is a whole file that gave nothing at all; then
        its bad records are the reason why the file was not read."""
        self.empty += other.empty
        self.skipped += other.skipped
        self.damaged += other.damaged
        if whole and not other.skipped:
            if not other.bad:
                self.skipped.append((whole.path, "holds no records"))
                return
            path, place, reason = other.first[0]
            where = f"{place_of(path, place)} {reason}"
            others = f"none of its {other.bad:,} records can be read; " if other.bad > 1 else ""
            self.skipped.append((path, f"gives no document: {others}{where}"))
            return
        self.bad += other.bad
        self.first += other.first[: SHOWN - len(self.first)]


def find_files(inputs: Sequence[str], extensions: Collection[str] | None = None, strict: bool = False) -> Found:
    """Files that ``inputs`` (files, folders, globs) name, in that order, folders and globs sorted, each file once.

    ``extensions``: what is taken from folders instead of TEXT_EXTENSIONS. Raises UserError if an input names nothing,
    if no file is left to read, and, with ``strict``, on the first file named by itself or a glob that is not read."""
    search = _Search(frozenset(extensions) if extensions is not None else TEXT_EXTENSIONS, strict)
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_dir():
            if not search.walk(path):
                raise UserError(f"input folder {name} holds no files that are read{search.what_else()}")
        elif path.exists():
            search.add(path, named=True)
        elif path.is_symlink():
            raise UserError(f"input {name} is a link to {path.readlink()}, which does not exist")
        else:
            # Path.glob takes no absolute patterns.
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
            taken = [search.walk(match) if match.is_dir() else search.add(match, named=True) for match in matches]
            if not any(taken):
                what = "matches only folders without such files" if matches else "does not exist and matches no file"
                raise UserError(f"input {name} {what}; give files, folders or globs")
    found = search.found
    if not found.files:
        raise UserError(f"none of the files given can be read: {'; '.join(map(' '.join, found.skipped[:SHOWN]))}")
    return found


class _Search:
    """Collects files, each once."""

    def __init__(self, wanted: Collection[str], strict: bool) -> None:
        self.found = Found()
        self._wanted, self._strict = wanted, strict
        self._known: dict[tuple[int, int], str] = {}

    def add(self, path: Path, named: bool = False) -> bool:
        """Takes a file, or says why not. Returns whether there was anything to say about it."""
        try:
            about = path.stat()
            if (first := self._known.get((about.st_dev, about.st_ino))) is not None:
                again = "is given twice and read once" if first == str(path) else ""
                self.found.skipped.append((str(path), again or f"is the same file as {first}, which is read"))
                return True
            self.found.files.append(Input(str(path), about.st_size, judge(path)))
            self._known[about.st_dev, about.st_ino] = str(path)
        except NotRead as error:
            self._refuse(path, str(error), named)
        except FileNotFoundError:
            self._refuse(path, "is a link to something that does not exist", named)
        except OSError as error:
            self._refuse(path, f"cannot be opened: {error.strerror or error}", named)
        return True

    def walk(self, folder: Path) -> bool:
        """Takes the files in a folder and its folders. Returns whether there were any that it could take."""
        before = len(self.found.files), len(self.found.skipped)
        walk = os.walk(folder, onerror=lambda error: self._refuse(Path(error.filename), _not_listed(error), False))
        for here, subfolders, names in walk:
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in subfolders:
                if (linked := Path(here) / name).is_symlink():
                    self._refuse(linked, "is a link to a folder, which is not followed; give it by itself", False)
            for name in sorted(names):
                path = Path(here) / name
                if name.startswith("."):
                    continue
                kind = ending(name)
                if kind not in self._wanted and path.is_symlink():
                    kind = ending(path.resolve().name)
                if kind in self._wanted:
                    self.add(path)
                else:
                    self.found.other_endings[kind or "no ending"] += 1
        return (len(self.found.files), len(self.found.skipped)) != before

    def what_else(self) -> str:
        """What a folder without files to take holds instead."""
        others = ", ".join(f"{count:,} {kind}" for kind, count in self.found.other_endings.most_common(SHOWN))
        return f"; endings taken: {' '.join(sorted(self._wanted))}" + (f"; it holds {others}" if others else "")

    def _refuse(self, path: Path, reason: str, named: bool) -> None:
        if named and self._strict and reason != "is empty":
            raise UserError(f"{path} {reason}")
        self.found.skipped.append((str(path), reason))


def _not_listed(error: OSError) -> str:
    return f"cannot be listed: {error.strerror}"


def plan_shards(files: Sequence[Input], max_bytes: int) -> list[list[Piece]]:
    """Divides files, in order, into shards of about ``max_bytes``; uncompressed JSON lines are cut within a file."""
    shards: list[list[Piece]] = [[]]
    room = max_bytes
    for file in files:
        size = file.size
        step = max_bytes if file.kind.divisible else max(size, 1)
        for start in range(0, max(size, 1), step):
            piece = Piece(file.path, start, min(start + step, size), file.kind, size <= step)
            if shards[-1] and piece.end - piece.start > room:
                shards.append([])
                room = max_bytes
            shards[-1].append(piece)
            room -= piece.end - piece.start
    return [shard for shard in shards if shard]


def documents(piece: Piece, key: str, losses: Losses) -> Iterator[str]:
    """Non-empty texts of a piece. ``key`` is the field or column that holds the text of a record. What cannot be read
    goes to ``losses``."""
    here = Losses(losses.strict)
    given = 0
    try:
        for text in _whole_text(piece) if piece.kind.form == "text" else _texts(piece, key, here):
            given += 1
            if text:
                yield text
            else:
                here.empty += 1
    except MissingColumn as error:
        name = _likely_field(key, error.names)
        here.skip(piece.path, f"{error}; name the column with --key{name}")
    except NotRead as error:
        here.skip(piece.path, str(error))
    except Damaged as error:
        if losses.strict or not given:
            here.skip(piece.path, str(error))
        else:
            here.damaged.append(f"{piece.path} {error}")
    losses.merge(here, piece if piece.whole and not given else None)


def sentence(path: str, place: str | int, reason: str) -> str:
    """A bad record as a sentence."""
    return f"{path} {place_of(path, place)} {reason}"


def place_of(path: str, place: str | int) -> str:
    """A place in words: an offset in bytes becomes the number of its line, which reads the file up to there."""
    if isinstance(place, str):
        return place
    number, left = 1, place
    with Path(path).open("rb") as handle:
        while left and (block := handle.read(min(BUFFER_BYTES, left))):
            number += block.count(b"\n")
            left -= len(block)
    return f"line {number}"


def _texts(piece: Piece, key: str, here: Losses) -> Iterator[str]:
    """The texts of records."""
    path, kind = piece.path, piece.kind
    found: Iterator[tuple[str | int, Any]]
    if kind.divisible:
        found = _cut_lines(piece, here)
    else:
        found = records(Path(path), kind, lambda place, reason: here.add(path, place, reason), (key,))
    for place, record in found:
        text = record.get(key) if type(record) is dict else None
        if type(text) is str and text.isascii():
            yield text
            continue
        text, wrong = _text_of(record, key)
        if wrong is None:
            yield text
        else:
            here.add(path, place, wrong)


def _cut_lines(piece: Piece, here: Losses) -> Iterator[tuple[int, Any]]:
    """Values of the lines that begin in a piece of uncompressed JSON lines, each with its offset in the file."""
    with Path(piece.path).open("rb", buffering=BUFFER_BYTES) as handle:
        if piece.start:
            # Reads on from the byte before ``start``: if that byte ends a line, the first line of this piece begins
            # at ``start``, else after the next line end.
            handle.seek(piece.start - 1)
            while (line := handle.readline(MAX_RECORD_BYTES)) and not line.endswith(b"\n"):
                pass
        offset = handle.tell()
        while offset < piece.end and (line := handle.readline(MAX_RECORD_BYTES)):
            size = len(line)
            if size == MAX_RECORD_BYTES and not line.endswith(b"\n"):
                while (more := handle.readline(MAX_RECORD_BYTES)) and not more.endswith(b"\n"):
                    size += len(more)
                size += len(more)
                here.add(piece.path, offset, TOO_LONG)
            else:
                if not offset:
                    line = line.removeprefix(codecs.BOM_UTF8)
                value, wrong = parse_line(line)
                if wrong is None:
                    yield offset, value
                elif line.strip():
                    here.add(piece.path, offset, wrong)
            offset += size


def _whole_text(piece: Piece) -> Iterator[str]:
    """A file as one document. Raises NotRead or Damaged if it is none."""
    content = bytearray()
    for block in utf8_blocks(blocks(Path(piece.path), piece.kind.compression), piece.kind.encoding):
        content += block
        if len(content) > MAX_DOCUMENT_BYTES:
            raise NotRead(f"is one document of over {MAX_DOCUMENT_BYTES >> 20} MiB; divide it into files or JSON lines")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise NotRead(
            f"is not UTF-8 (byte 0x{byte:02x} at position {error.start + 1}): it is binary or of another encoding; "
            "convert text to UTF-8"
        ) from None
    if "\0" in text:
        raise NotRead("holds NUL bytes: it is binary, or UTF-16 without a byte order mark; convert it to UTF-8")
    yield text


def _text_of(record: Any, key: str) -> tuple[str, None] | tuple[str, str]:
    """The text of a record and None, or what is wrong with it second."""
    if not isinstance(record, dict):
        return "", f"has no text under {key!r}: it is no object but {_what(record)}"
    if key not in record:
        return "", f"has no text under {key!r}: {_fields(record, key)}"
    text = record[key]
    if isinstance(text, bytes):
        try:
            return text.decode(), None
        except UnicodeDecodeError:
            return "", f"has no text under {key!r}: its bytes are not UTF-8"
    if not isinstance(text, str):
        return "", f"has no text under {key!r} but {_what(text)}"
    wrong = surrogates(text)
    return ("", wrong) if wrong else (text, None)


def _fields(record: dict[str, Any], key: str) -> str:
    """What a record has instead of ``key``, and what to do."""
    if not record:
        return "it is empty"
    shown = ", ".join(map(repr, list(record)[:SHOWN_FIELDS])) + (" …" if len(record) > SHOWN_FIELDS else "")
    names = [name for name, value in record.items() if isinstance(value, str)]
    lists = [name for name, value in record.items() if isinstance(value, list) and value and type(value[0]) is dict]
    if lists and not names:
        return f"its fields are {shown}; write the list under {lists[0]!r} to a file of its own"
    return f"its fields are {shown}; name the field with --key{_likely_field(key, names)}"


def _what(value: Any) -> str:
    """What a value of JSON is called."""
    if value is None:
        return "null"
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), f"a value of type {type(value).__name__}")


def _likely_field(key: str, names: Sequence[str]) -> str:
    """The name among those of a record that its text probably has, as the end of a command; "" if none is likely."""
    near = difflib.get_close_matches(key, names, 1) or [name for name in USUAL_FIELDS if name in names]
    return f" {shlex.quote(near[0])}" if near else ""
