"""Answers on disk while a file of prompts is answered: beside ``answers.jsonl`` a folder ``answers.jsonl.parts`` with a
file for each replica, to which it appends, and at the end all of them in the order of the prompts.

Answers are known by the number of their prompt and sample, not by who made them, so that a command that was killed goes
on under any layout.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write, locked
from llm_parallel.jsonlines import JsonLines

Key = tuple[int, int]
"""Number of a prompt, and of a sample of its answers."""


class _Place(NamedTuple):
    """Where a line stands."""

    path: Path
    start: int
    length: int


class Parts:
    """The output ``target`` of a job and its parts. mark: what tells the job's answers from those of others."""

    def __init__(self, target: Path, mark: str) -> None:
        self.target, self._mark = target, mark
        self.folder = target.with_name(target.name + ".parts")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds the output, so that no other command answers into it. Raises UserError if one does, or the folder
        cannot be made."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output {self.target} cannot be written: {error.strerror}; name another file") from None
        try:
            with locked(self.folder / "lock", f"another command is answering into {self.target}; wait for it"):
                yield
        finally:
            if not any(self.folder.glob("part-*")):
                self.remove()

    def known(self) -> set[Key]:
        """The answers that are complete. Raises UserError if there are answers of another job."""
        return set(self._places())

    def begun(self) -> bool:
        """Whether a command that was killed left parts."""
        return self.folder.is_dir()

    def writer(self, replica: int) -> JsonLines:
        """Appends answers of a replica, of which one process has one. Raises UserError."""
        return JsonLines(self.folder / f"part-{replica}.jsonl", remedy="make room there, or choose another --output")

    def line(self, key: Key, content: dict[str, Any]) -> dict[str, Any]:
        """What is written about an answer."""
        return {"job": self._mark, "number": key[0], "sample": key[1], **content}

    def merge(self, keys: Collection[Key]) -> None:
        """Writes the answers of ``keys`` into the output in that order, and removes the parts. Raises UserError if some
        are missing, or the output cannot be written."""
        places = self._places()
        missing = sum(key not in places for key in keys)
        if missing:
            raise UserError(
                f"{self.folder} lacks {missing} of {len(keys)} answers that other processes have written; put --output "
                "where every node sees it"
            )
        try:
            with atomic_write(self.target, "wb") as out:
                _copy((places[key] for key in keys), out)
        except OSError as error:
            raise UserError(
                f"output {self.target} cannot be written ({error.strerror}); make room there. The answers are in "
                f"{self.folder}, and the same command goes on with them"
            ) from None
        self.remove()

    def remove(self) -> None:
        """Removes the parts."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _places(self) -> dict[Key, _Place]:
        """Where each answer stands, for the first time."""
        found: dict[Key, _Place] = {}
        for path in (self.target, *sorted(self.folder.glob("part-*.jsonl"))):
            for start, text in _lines(path):
                record: Any = None
                with suppress(ValueError):  # a line that a kill has cut
                    record = json.loads(text)
                if not isinstance(record, dict):
                    continue
                if record.get("job") != self._mark:
                    raise UserError(
                        f"{path} holds something else than answers to this input with this model and these settings; "
                        "name another --output, or remove it"
                    )
                found.setdefault((record["number"], record["sample"]), _Place(path, start, len(text)))
        return found


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that may not be there, and where they begin."""
    try:
        with path.open("rb") as handle:
            start = 0
            for text in handle:
                yield start, text
                start += len(text)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; name another --output") from None


def _copy(places: Iterable[_Place], out: Any) -> None:
    opened: dict[Path, Any] = {}
    try:
        for path, start, length in places:
            if path not in opened:
                opened[path] = path.open("rb")
            opened[path].seek(start)
            out.write(opened[path].read(length).rstrip(b"\n") + b"\n")
    finally:
        for handle in opened.values():
            handle.close()
