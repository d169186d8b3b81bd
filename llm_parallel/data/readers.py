"""Records out of data files: JSON lines, JSON, Parquet, Arrow, CSV and TSV, plain or compressed. This is the one place
that opens such a file and says what is wrong in it."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_parallel.data.containers import Damaged, blocks, utf8_blocks
from llm_parallel.data.json_stream import JsonStream, repeated
from llm_parallel.data.kinds import Kind, NotRead, judge
from llm_parallel.errors import UserError

SHOWN = 5
MAX_RECORD_BYTES = 256 << 20
BATCH_ROWS = 1024
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
"""The last bytes of an Arrow stream."""
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
UNDECODED = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True)
class Row:
    """A record and its place: "FILE line 17" or "FILE row 17"."""

    value: Any
    where: str


class MissingColumn(NotRead):
    """A table lacks a column; ``names`` are those that it has."""

    def __init__(self, missing: str, names: Sequence[str]) -> None:
        super().__init__(f"has no column {missing!r}; its columns are {', '.join(map(repr, names))}")
        self.names = names


class Problems:
    """What could not be read: how many records, and the first five sentences, each with file and place.

    With ``strict`` the first of them is a UserError."""

    def __init__(self, strict: bool = False) -> None:
        self.strict, self.count = strict, 0
        self.first: list[str] = []

    def add(self, where: str, reason: str) -> None:
        """Counts a record at ``where`` that is left out because of ``reason``, which goes on the sentence that
        ``where`` begins. Raises UserError if the first such record is one too many."""
        if self.strict:
            raise UserError(f"{where} {reason}")
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{where} {reason}")

    def summary(self) -> str | None:
        """One sentence about all of them, or None if there are none."""
        if not self.count:
            return None
        more = f"; and {self.count - len(self.first):,} more" if self.count > len(self.first) else ""
        return f"left out {self.count:,} records that cannot be read: {'; '.join(self.first)}{more}"


class _Limited(Problems):
    """Tells another about the records that cannot be read, until ``limit`` records were seen."""

    def __init__(self, problems: Problems, limit: int) -> None:
        super().__init__()
        self._problems, self._limit, self.seen = problems, limit, 0

    def add(self, where: str, reason: str) -> None:
        if self.seen < self._limit:
            self.seen += 1
            self._problems.add(where, reason)


def first_rows(files: Sequence[Path], problems: Problems, limit: int | None) -> Iterator[Row]:
    """The records of several files in order, as ``rows`` gives them: the first ``limit`` (None: all), of which those
    that cannot be read are some."""
    limited = None if limit is None else _Limited(problems, limit)
    for path in files:
        for row in rows(path, limited or problems):
            if limited is not None:
                if limited.seen >= limited._limit:
                    return
                limited.seen += 1
            yield row


def rows(path: str | Path, problems: Problems | None = None, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The records of a data file in order, judged by its name and content: each line of JSON lines, each element of a
    JSON array, each of several JSON objects, each row of a table (as a dict).

    Files are streamed: memory holds a megabyte or the largest record (Parquet: some rows of a row group). What cannot
    be read goes to ``problems``; without it, the first such record is a UserError, and so is a file that holds no
    records at all. ``columns`` are read from a Parquet or Arrow table instead of all."""
    path = Path(path)
    problems = problems if problems is not None else Problems(strict=True)
    try:
        kind = judge(path)
        if kind.form == "text":
            raise NotRead("is plain text and no table of records; give JSON lines, JSON, Parquet, Arrow, CSV or TSV")
        found = records(path, kind, lambda place, reason: problems.add(f"{path} {place}", reason), columns)
        given = False
        try:
            for place, value in found:
                given = True
                yield Row(value, f"{path} {place}")
        except Damaged as error:
            if not given:
                raise
            problems.add(f"{path} {error.place}", error.reason)
    except (NotRead, Damaged) as error:
        raise UserError(f"{path} {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def records(
    path: Path, kind: Kind, bad: Callable[[str, str], None], columns: Sequence[str] | None = None
) -> Iterator[tuple[str, Any]]:
    """(place, value) of each record of a file of that kind, which is not text. ``bad`` is called with the place and the
    reason of what cannot be read. Raises Damaged where the rest of the file cannot be read, and MissingColumn if
    a table lacks one of ``columns``. With ``columns`` the caller
    looks only at them, and has to call ``surrogates`` itself; else records with such text are bad."""
    content = utf8_blocks(blocks(path, kind.compression), kind.encoding)
    values: Iterator[tuple[str, Any]]
    if kind.form in ("parquet", "arrow"):
        values = _table_rows(path, kind.form, bad, columns)
    elif kind.form == "lines":
        values = _json_lines(content, bad)
    elif kind.form == "json":
        values = iter(JsonStream(content, bad))
    else:
        values = _csv_rows(content, bad, kind.delimiter, columns)
    place = ""
    try:
        for place, value in values:
            if columns is None and (wrong := surrogates(value)):
                bad(place, wrong)
            else:
                yield place, value
    except Damaged as error:
        raise Damaged(error.reason, error.place or (f"after {place}" if place else "")) from None


class _Repeated(ValueError):
    """An object has two fields of one name."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs) and (wrong := repeated(pairs)):
        raise _Repeated(wrong)
    return found


_LINE = json.JSONDecoder(object_pairs_hook=_object)


def parse_line(line: bytes) -> tuple[Any, str | None]:
    """The value of a line of JSON and None, or None and what is wrong with it."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        byte = line[error.start]
        return None, f"is not UTF-8 (byte 0x{byte:02x} at position {error.start + 1}); convert the file to UTF-8"
    try:
        return _LINE.decode(text), None
    except _Repeated as error:
        return None, str(error)
    except json.JSONDecodeError as error:
        if text.endswith("\n"):  # else a string that is cut off seems to go on and hold the end of the line
            return parse_line(line.rstrip(b"\r\n"))
        reason = error.msg.removesuffix(" starting at").removesuffix(" at")
        return None, f"is not JSON (character {error.pos + 1}: {reason}); every line has to be a JSON object"
    except RecursionError:
        return None, "is nested too deeply"
    except ValueError as error:  # an integer of over 4300 digits
        return None, f"is not read ({str(error).partition(';')[0]})"


def surrogates(value: Any) -> str | None:
    """What is wrong with a value whose text cannot be written as UTF-8, else None."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if text.isascii():
        return None
    try:
        text.encode()
        return None
    except UnicodeEncodeError as error:
        if UNDECODED.match(text[error.start]):
            return "holds bytes that are not UTF-8; convert the file to UTF-8"
        return f"holds half of a surrogate pair (\\u{ord(text[error.start]):04x}), which is no character"


def _json_lines(content: Iterator[bytes], bad: Callable[[str, str], None]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(split_lines(content), 1):
        if not line.strip():
            continue
        value, wrong = (None, TOO_LONG) if len(line) > MAX_RECORD_BYTES else parse_line(line)
        if wrong is None:
            yield f"line {number}", value
        else:
            bad(f"line {number}", wrong)


TOO_LONG = f"is longer than {MAX_RECORD_BYTES >> 20} MiB"


def split_lines(content: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their ends. Of a line that is longer than a record may be, only a little more than that is kept."""
    held: list[bytes] = []
    size = 0
    for block in content:
        first, *others = block.split(b"\n")
        if size <= MAX_RECORD_BYTES:
            held.append(first)
            size += len(first)
        if others:
            yield b"".join(held)
            yield from others[:-1]
            held, size = [others[-1]], len(others[-1])
    if size:
        yield b"".join(held)


def _csv_rows(
    content: Iterator[bytes], bad: Callable[[str, str], None], delimiter: str, columns: Sequence[str] | None
) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a table whose first line names the columns."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    text = io.TextIOWrapper(io.BufferedReader(_Raw(content)), "utf-8", "surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            bad(f"line {line}", f"is not a row of CSV ({error})")
            continue
        if values is None:
            return
        if header is None:
            header = values
            if missing := [name for name in columns or () if name not in header]:
                raise MissingColumn(missing[0], header)
        elif len(values) != len(header) and values:
            bad(f"line {line}", f"has {len(values)} fields, and the first line names {len(header)} columns")
        elif values:
            yield f"line {line}", dict(zip(header, values))


class _Raw(io.RawIOBase):
    """The file interface of an iterator of blocks."""

    def __init__(self, content: Iterator[bytes]) -> None:
        self._content, self._rest = content, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            block = next(self._content, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        taken = min(len(buffer), len(self._rest))
        buffer[:taken] = self._rest[:taken]
        self._rest = self._rest[taken:]
        return taken


def _table_rows(
    path: Path, form: str, bad: Callable[[str, str], None], columns: Sequence[str] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a Parquet or Arrow file, read in batches."""
    _need_pyarrow(form)
    with _damage_named():
        names, batches = (_parquet if form == "parquet" else _arrow)(path, columns)
    if missing := [name for name in columns or () if name not in names]:
        raise MissingColumn(missing[0], names)
    number = 0
    while True:
        with _damage_named():
            batch = next(batches, None)
            found = _values(batch) if batch is not None else None
        if found is None:
            return
        for value, wrong in found:
            number += 1
            if wrong is None:
                yield f"row {number}", value
            else:
                bad(f"row {number}", wrong)


@contextmanager
def _damage_named() -> Iterator[None]:
    """Turns what pyarrow raises on damaged files into Damaged."""
    try:
        yield
    except Exception as error:  # of many types, depending on the bytes
        if isinstance(error, OSError) and error.errno:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Damaged(f"is truncated or damaged ({reason}); fetch it again") from None


def _values(batch: Any) -> list[tuple[Any, str | None]]:
    """The rows of a batch, each with what is wrong with it."""
    import pyarrow

    nested = [field.name for field in batch.schema if pyarrow.types.is_nested(field.type)]
    try:
        return [(_as_written(value, nested), None) for value in batch.to_pylist()]
    except UnicodeDecodeError:  # in one of the rows
        return [_row(batch.slice(place, 1), nested) for place in range(batch.num_rows)]


def _as_written(row: dict[str, Any], nested: Sequence[str]) -> dict[str, Any]:
    """A row in which the objects of the columns ``nested`` have the fields that were written. Objects of a column have
    the same fields in a table, and those that an object lacks, such as another tool's arguments, are null there."""
    return row | {name: _without_nulls(row[name]) for name in nested}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(held) for name, held in value.items() if held is not None}
    return [_without_nulls(held) for held in value] if isinstance(value, list) else value


def _row(batch: Any, nested: Sequence[str]) -> tuple[Any, str | None]:
    try:
        return _as_written(batch.to_pylist()[0], nested), None
    except UnicodeDecodeError:
        return None, "holds bytes that are not UTF-8"


def _need_pyarrow(form: str) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        name = {"parquet": "Parquet", "arrow": "Arrow"}[form]
        raise NotRead(
            f"is a file of {name}, which needs pyarrow; install it (pip install 'llm-parallel[parquet]')"
        ) from None


def _parquet(path: Path, columns: Sequence[str] | None) -> tuple[list[str], Iterator[Any]]:
    from pyarrow import parquet

    file = parquet.ParquetFile(str(path))
    held = [name for name in columns or () if name in file.schema_arrow.names]
    return file.schema_arrow.names, file.iter_batches(BATCH_ROWS, columns=held if columns else None, use_threads=False)


def _arrow(path: Path, columns: Sequence[str] | None) -> tuple[list[str], Iterator[Any]]:
    import pyarrow

    with path.open("rb") as handle:
        is_file = handle.read(6) == b"ARROW1"
        handle.seek(-min(len(STREAM_END), path.stat().st_size), os.SEEK_END)
        ended = is_file or handle.read() == STREAM_END
    if is_file:
        reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        reader = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
        batches = iter(reader)
    names = reader.schema.names
    held = [name for name in columns or names if name in names]
    return names, _parts((batch.select(held) for batch in batches), ended)


def _parts(batches: Iterator[Any], ended: bool) -> Iterator[Any]:
    """Batches in parts that are small as Python objects. Their offsets are checked, since damaged ones would be
    followed to anywhere in memory; text that is not UTF-8 is found when it is read. ended: whether the file has the
    mark that ends a stream, without which pyarrow takes a truncated file for a complete one."""
    import pyarrow

    for batch in batches:
        for column in batch.columns:
            try:
                column.validate(full=True)
            except pyarrow.ArrowInvalid as error:
                if "UTF8" not in str(error):
                    raise
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield batch.slice(start, BATCH_ROWS)
    if not ended:
        raise ValueError("the mark that ends a stream is missing")
