"""What a node must have to take part: the run's own folder, its run file, and the files that the run reads.

A node without its shared mount would make the folder anew, and one without the data would end the run as its user's
mistake."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_launch.copy_files import run_number

if TYPE_CHECKING:  # it takes longer to import than the rest of an agent
    from llm_parallel.config.tree import RunConfig

FIELDS = ("path", "load", "tokenizer", "prepared", "folder", "data_dir")
"""Names of the fields of a run file that name what workers read."""
TOKEN_FILES = (".bin", ".idx")


def needs_of(config: RunConfig, run_file: Path) -> dict[str, Any]:
    """What the agents are sent: the folder in which relative paths begin if there are any, the run folder and its
    random number, and every file and folder of the configuration that workers read and that is here; of token files,
    which never change, with their size in bytes (else -1)."""
    run_dir = Path(config.run_dir)
    tree = json.loads(config.model_dump_json())
    tree["chat"] = {"prepared": config.chat.prepared}  # conversations themselves are read by the launcher alone
    named = [Path(name) for name in _named(tree)]
    tokens = [path.with_name(path.name + ending) for path in named for ending in TOKEN_FILES]
    files = {path: -1 for path in (run_file, *named) if path.exists()}
    files |= {path: path.stat().st_size for path in tokens if path.is_file()}
    relative = not all(path.is_absolute() for path in (run_dir, Path(config.elastic.replica_dir), *files))
    return {
        "is": "needs",
        "at": str(Path.cwd()) if relative else None,
        "run_dir": str(run_dir),
        "run": run_number(run_dir),
        "files": [[str(path.absolute()), size] for path, size in files.items()],
    }


def lacking(needs: Mapping[str, Any]) -> str | None:
    """What this node lacks, in words that follow the node's name; None if it has everything. Changes the present folder
    to that of the launcher."""
    if needs["at"] is not None:
        try:
            os.chdir(needs["at"])
        except OSError as error:
            return f"folder {needs['at']}, from which the run was started, cannot be entered there: {error.strerror}"
    run_dir = Path(needs["run_dir"])
    try:
        number = run_number(run_dir)
    except OSError as error:
        return f"the run folder {run_dir} cannot be read there: {error.strerror}"
    if number != needs["run"]:
        there = "another run's folder" if number else "no run's folder"
        return f"{run_dir.resolve()} is {there} there; is the shared file system mounted?"
    for name, size in needs["files"]:
        try:
            found = Path(name).stat()
            os.close(os.open(name, os.O_RDONLY))
        except OSError as error:
            return f"{name} cannot be read there: {error.strerror}"
        if size not in (-1, found.st_size):
            return f"{name} is another file there: {found.st_size} bytes instead of {size}"
    return None


def _named(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name in FIELDS and isinstance(value, str):
                yield value
            else:
                yield from _named(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _named(value)
