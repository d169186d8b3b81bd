"""Local files of evaluation sets: rows of jsonl, json, parquet and csv files, and which file holds which split."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from llm_parallel.errors import UserError

Row = dict[str, Any]
ENDINGS = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
SPLIT = re.compile(r"(?:^|[^a-z])(train|training|validation|valid|val|dev|test)(?=[^a-z]|$)")
SAME = {"training": "train", "valid": "validation", "val": "validation"}
LISTS = ("data", "Data", "rows", "examples")
"""Keys under which a JSON file may hold its rows."""


def kind_of(path: Path) -> str:
    """The ending of a data file without that of its compression; empty if it is none."""
    name = path.name.lower().removesuffix(".gz")
    return next((ending for ending in ENDINGS if name.endswith(ending)), "")


def stem_of(path: Path) -> str:
    """The name of a data file without its endings, in small letters."""
    return path.name.lower().removesuffix(".gz").removesuffix(kind_of(path))


def split_of(name: str) -> str | None:
    """The split that a name speaks of: train, validation, dev or test."""
    found = SPLIT.findall(name.lower())
    return SAME.get(found[-1], found[-1]) if found else None


@dataclass(frozen=True)
class DataFile:
    """A file of rows. within: its path from the folder of data; parts: the names of that path in small letters."""

    path: Path
    within: str

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """Names of the path, in small letters; the last one without endings."""
        *folders, _ = Path(self.within.lower()).parts
        return (*folders, stem_of(self.path))

    @property
    def split(self) -> str | None:
        """The split that the file's name speaks of, else that of its folders."""
        return next((found for part in reversed(self.parts) if (found := split_of(part))), None)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the content."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]

    @cached_property
    def rows(self) -> list[Row]:
        """All rows. Raises UserError for a file that cannot be read."""
        try:
            return list(read_rows(self.path))
        except (OSError, EOFError, zlib.error, csv.Error) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"{self.path} cannot be read: {reason}; put the whole file there") from None
        except UnicodeDecodeError:
            raise UserError(f"{self.path} is not UTF-8; write it anew as UTF-8") from None


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a file as dictionaries. Tables without a header have the columns ``0``, ``1`` and so on."""
    kind = kind_of(path)
    if kind == ".parquet":
        yield from _parquet_rows(path)
        return
    content = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        content = gzip.decompress(content)
    text = content.decode("utf-8-sig")
    if kind in (".csv", ".tsv"):
        yield from _table_rows(text, "\t" if kind == ".tsv" else ",")
    elif kind == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield _dictionary(_parsed(line, f"line {number} of {path}"), f"line {number} of {path}")
    else:
        yield from _json_rows(text, path)


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException
    except ImportError:
        raise UserError(f"{path} needs pyarrow, which is not installed; pip install 'llm-parallel[parquet]'") from None
    try:
        yield from parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise UserError(f"{path} is no parquet file: {str(error).splitlines()[0]}; put the whole file there") from None


def _table_rows(text: str, delimiter: str) -> Iterator[Row]:
    before = csv.field_size_limit(max(len(text), 1))  # of all of this process, whose other readers have their own
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    finally:
        csv.field_size_limit(before)
    if not lines:
        return
    names = [name.strip() for name in lines[0]]
    simple = all(re.fullmatch(r"[A-Za-z_][\w .-]{0,30}|", name) for name in names)
    if simple and len(set(names)) == len(names) and not _is_question(names):
        yield from (dict(zip(names, line)) for line in lines[1:] if line)
    else:
        yield from ({str(place): value for place, value in enumerate(line)} for line in lines if line)


def _is_question(names: list[str]) -> bool:
    """Whether the first line of a table of questions is one of them: its last column is a letter of an answer."""
    return len(names) == 6 and names[-1] in ("A", "B", "C", "D") and names[1:5] != ["A", "B", "C", "D"]


def _json_rows(text: str, path: Path) -> Iterator[Row]:
    lines = text.lstrip().split("\n", 1)
    if len(lines) == 2 and lines[0].rstrip().endswith("}") and lines[1].lstrip().startswith("{"):
        for number, line in enumerate(text.split("\n"), 1):  # JSON lines under the name .json
            if line.strip():
                yield _dictionary(_parsed(line, f"line {number} of {path}"), f"line {number} of {path}")
        return
    content = _parsed(text, str(path))
    if isinstance(content, dict):
        content = next((content[key] for key in LISTS if isinstance(content.get(key), list)), [content])
    if not isinstance(content, list):
        raise UserError(f"{path} holds {type(content).__name__}; it must hold a list of objects")
    for number, one in enumerate(content, 1):
        yield _dictionary(one, f"element {number} of {path}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is no JSON: {error}; put the whole file there") from None


def _dictionary(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{where} is {json.dumps(value)[:60]}; it must be an object with the fields of the set")
    return value


@dataclass
class DataFolder:
    """A folder of data files, however deep they lie in it. Raises UserError if there is no such folder."""

    root: Path
    files: list[DataFile] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            raise UserError(f"--data-dir {self.root} is no folder; give the one that the sets lie in")
        found = sorted(path for path in self.root.rglob("*") if path.is_file() and kind_of(path))
        self.files = [DataFile(path, str(path.relative_to(self.root))) for path in found]
        if not self.files:
            raise UserError(f"--data-dir {self.root} holds no file that ends in {', '.join(ENDINGS)} (or .gz)")
