"""What a data file holds and how it is packed, judged by its name and its first bytes."""

from __future__ import annotations

import itertools
import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llm_parallel.data.containers import (
    COMPRESSED_ENDINGS,
    Damaged,
    blocks,
    compression_of,
    encoding_of,
    foreign,
)
from llm_parallel.data.json_stream import BETWEEN, DECODER, is_cut

HEAD_BYTES = 1 << 16
Form = Literal["lines", "json", "parquet", "arrow", "csv", "text"]

RECORDS: dict[str, Form] = {
    ".jsonl": "lines",
    ".jsonlines": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
}
"""Endings of files of records."""
PROSE = (".txt", ".md", ".rst", ".tex")
SCRIPTS = (".py", ".pyi", ".js", ".ts", ".go", ".rs", ".rb", ".sh", ".java")
SOURCE_CODE = (*SCRIPTS, ".c", ".h", ".cc", ".cpp", ".hpp", ".cu")
TELLING: dict[str, Form] = {**RECORDS, **dict.fromkeys((*PROSE, *SOURCE_CODE), "text")}
FORM_NAMES: dict[Form, str] = {
    "lines": "JSON lines",
    "json": "JSON",
    "parquet": "Parquet",
    "arrow": "Arrow",
    "csv": "CSV",
    "text": "text",
}
"""How a form is called in messages."""


class NotRead(Exception):
    """A file is not read. The text is the sentence that its name begins: "is empty"."""


@dataclass(frozen=True)
class Kind:
    """What a file holds (``form``), and how it is packed. ``delimiter`` is that of CSV."""

    form: Form
    compression: str | None = None
    encoding: str = "utf-8"
    delimiter: str = ","

    @property
    def divisible(self) -> bool:
        """Whether a part of such a file can be read without what comes before: uncompressed JSON lines."""
        return self.form == "lines" and not self.compression and self.encoding.startswith("utf-8")


def ending(name: str) -> str:
    """The ending that says what a file holds, in lower case: that before .gz, .zst, .xz or .bz2 if there is one."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED_ENDINGS else path.suffix


def named_form(path: Path) -> Form | None:
    """What a file's name says that it holds; of a symbolic link its own name first, then that of its target."""
    form = TELLING.get(ending(path.name))
    return TELLING.get(ending(path.resolve().name)) if form is None and path.is_symlink() else form


def judge(path: Path) -> Kind:
    """The kind of a file. What the first bytes prove wins over its name, its name over what they suggest. Raises
    NotRead if it is empty, of a kind that is not read, or not what its name says; OSError if it cannot be opened."""
    refuse_special(path)
    with path.open("rb") as handle:
        head = handle.read(HEAD_BYTES)
    compression = compression_of(head)
    if compression:
        head = _uncompressed_head(path, compression)
    if not head:
        raise NotRead("is empty")
    if compression and compression_of(head):
        raise NotRead("is compressed twice; decompress it once")
    if said := foreign(head):
        raise NotRead(said)
    for magic, form in ((b"PAR1", "parquet"), (b"ARROW1", "arrow"), (b"\xff\xff\xff\xff", "arrow")):
        if head.startswith(magic):
            if compression:
                raise NotRead(f"is {FORM_NAMES[form]} inside {compression}; decompress it")  # type: ignore[index]
            return Kind(form)  # type: ignore[arg-type]
    return _judge_text(path, head, compression)


def refuse_special(path: Path) -> None:
    """Raises NotRead if a path is no regular file."""
    mode = path.stat().st_mode
    kinds = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
    if stat.S_ISDIR(mode):
        raise NotRead("is a folder and no file")
    if not stat.S_ISREG(mode):
        raise NotRead(f"is a {kinds.get(stat.S_IFMT(mode), 'special file')} and no regular file; write it to a file")


def _uncompressed_head(path: Path, compression: str) -> bytes:
    head = b""
    content = blocks(path, compression)
    try:
        while len(head) < HEAD_BYTES and (block := next(content, b"")):
            head += block
    except Damaged as error:
        if not head:  # else the reader finds out, after what can be read
            raise NotRead(str(error)) from None
    return head[:HEAD_BYTES]


def _judge_text(path: Path, head: bytes, compression: str | None) -> Kind:
    named, encoding = named_form(path), encoding_of(head)
    if named in ("parquet", "arrow"):
        begins = head[:20].decode(errors="replace")
        raise NotRead(f"is named like {FORM_NAMES[named]} and is none: it begins with {begins!r}; fetch it again")
    text = head.decode(encoding, "ignore")
    begin = text[BETWEEN.match(text).end() :] if named in ("lines", "json") else text.lstrip()  # type: ignore[union-attr]
    if "\0" in text and (named not in ("lines", "json", "csv") or "\0" in begin[:4]):
        raise NotRead("holds NUL bytes: it is binary, or UTF-16 without a byte order mark; convert it to UTF-8")
    if named == "csv":
        return Kind("csv", compression, encoding, _delimiter(path, text))
    if named == "text" and ending(path.name) != ".txt":
        return Kind("text", compression, encoding)
    guess = _json_form(begin, named, complete=len(head) < HEAD_BYTES)
    if guess is None and named in ("lines", "json"):
        guess = named
    if guess is None and named is None and encoding == "utf-8":
        _refuse_other_encodings(head)
    return Kind(guess or "text", compression, encoding)


def _json_form(begin: str, named: Form | None, complete: bool) -> Form | None:
    """Whether text is lines of JSON or other JSON, by how it begins; None if it is neither.

    In a file whose name does not say that it is JSON, only objects count: ``[1]`` begins many a text. complete: whether
    ``begin`` is all of the file."""
    if not begin.startswith(("{", "[")):
        return None
    if begin.startswith("["):
        objects = _opens_object(begin[1:].lstrip())
        if named == "lines" and not objects:
            return "lines"
        return "json" if objects or named == "json" else None
    try:
        _, end = DECODER.raw_decode(begin)
    except json.JSONDecodeError as error:
        if is_cut(error, begin) and not complete:
            # JSON allows no line end within a string, so this one stands between two fields.
            several_lines = "\n" in begin[: error.pos]
            return "json" if several_lines or named == "json" else "lines" if _opens_object(begin) else named
        later = any(_is_object(line) for line in itertools.islice(begin.split("\n"), 1, 20))
        if later or named == "lines":
            return "lines"
        return "json" if named is None and _opens_object(begin) else named
    except (RecursionError, ValueError):
        return named
    rest = begin[end:].lstrip(" \t\r")
    if "\n" in begin[:end]:
        return "json"
    if not rest or rest.startswith("\n"):
        return "lines"
    if rest[0] in ",{[\x1e":
        return "json"
    return named


def _opens_object(text: str) -> bool:
    return text.startswith("{") and text[1:].lstrip()[:1] in ('"', "}")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _delimiter(path: Path, text: str) -> str:
    first = text.split("\n", 1)[0]
    if any(ending(name) == ".tsv" for name in (path.name, path.resolve().name)):
        return "\t"
    return next((mark for mark in (",", "\t", ";") if mark in first), ",")


def _refuse_other_encodings(head: bytes) -> None:
    try:
        head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:
            raise NotRead(
                f"is not UTF-8 (byte 0x{head[error.start]:02x} at position {error.start + 1}): it is binary or of "
                "another encoding; convert text to UTF-8"
            ) from None
