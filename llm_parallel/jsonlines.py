"""Files of one JSON object per line, to which a run appends and which stay readable however the run ends."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from llm_parallel.errors import UserError
from llm_parallel.files import open_regular, open_to_append

LINE_BYTES = 64 << 20
"""A line that is as long was written by no run; a sparse file has one of any length on a disk of any size."""


class JsonLines:
    """Appends objects to ``path``, one complete line each; lines that are there already stay.

    Each line is one write to a descriptor opened for appending, so a killed process leaves at most one torn line at the
    end, the lines of several writers do not mix, and nothing waits in a buffer of this process; with ``sync`` each line
    is on the disk before ``append`` returns. Raises UserError when the file cannot be written (full disk), which ends
    with ``remedy``; a line that was written only in part is removed again. A file that was deleted meanwhile begins
    anew.
    """

    def __init__(
        self, path: Path, sync: bool = False, remedy: str = "make room there or choose another run_dir"
    ) -> None:
        self.path, self._sync, self._remedy = path, sync, remedy
        try:
            self._fd = self._open()
            self._end_torn_line()
        except OSError as error:
            raise self._user_error(error) from error

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return open_to_append(self.path, os.O_RDWR)

    def append(self, record: dict[str, Any], at: datetime | None = None) -> None:
        """Writes ``record`` with its time, by default now; numbers that JSON lacks (NaN, infinity) become null."""
        time = at or datetime.now(timezone.utc)
        record = {**record, "time": time.isoformat(timespec="milliseconds")}
        line = _encoded(record) + b"\n"
        try:
            if os.fstat(self._fd).st_nlink == 0:  # somebody has deleted the file, and would never see these lines
                os.dup2(fd := self._open(), self._fd, inheritable=False)
                os.close(fd)
            written = os.write(self._fd, line)
            if written < len(line):
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self._sync:
                os.fsync(self._fd)
        except OSError as error:
            raise self._user_error(error) from error

    def sync(self) -> None:
        """Returns when what was appended is on the disk. Raises UserError."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._user_error(error) from error

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)

    def _end_torn_line(self) -> None:
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            os.write(self._fd, b"\n")

    def _user_error(self, error: OSError) -> UserError:
        return UserError(f"cannot write {self.path}: {error.strerror}; {self._remedy}")


def read_jsonlines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of ``path`` in order; lines torn by a kill are left out. Raises UserError if it cannot be read or has
    a line of ``LINE_BYTES``."""
    try:
        with os.fdopen(open_regular(path), "rb") as handle:
            while line := handle.readline(LINE_BYTES):
                if len(line) == LINE_BYTES:
                    raise endless(path)
                record = parsed(line)
                if record is not None:
                    yield record
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give the folder of a run") from error


def endless(path: Path) -> UserError:
    """What is said of a file with a line of ``LINE_BYTES``."""
    return UserError(f"cannot read {path}: it has a line of {LINE_BYTES >> 20} MiB, which no run wrote")


def parsed(line: bytes) -> dict[str, Any] | None:
    """The object on a line; None if there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _encoded(record: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:  # a number that JSON lacks
        text = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False, default=str)
    return text.encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
