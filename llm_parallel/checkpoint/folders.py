"""Names and completeness of checkpoint folders, laid out as Megatron's: ``iter_0000100`` and
``latest_checkpointed_iteration.txt``."""

from __future__ import annotations

import re
from pathlib import Path

from llm_parallel.errors import UserError
from llm_parallel.files import read_small
from llm_parallel.model.hf_files import what_it_is

LATEST_NAME = "latest_checkpointed_iteration.txt"
COMPLETE = ("metadata.json", ".metadata", "common.pt", "train_state.json", "config.yaml")


def folder_name(step: int) -> str:
    """Name of the checkpoint after ``step`` steps."""
    return f"iter_{step:07d}"


def step_of(folder: Path) -> int | None:
    """Step of a checkpoint folder's name; None for any other name."""
    match = re.fullmatch(r"iter_(\d{7,})", folder.name)
    return int(match.group(1)) if match else None


def is_complete(folder: Path) -> bool:
    """Whether all parts of a checkpoint are there. A folder gets its final name only when they are."""
    return all((folder / name).is_file() for name in COMPLETE)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a ``checkpoints`` folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [(step_of(path), path) for path in folder.iterdir() if path.is_dir()]
    return [path for _, path in sorted((step, path) for step, path in found if step is not None and is_complete(path))]


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that ``latest_checkpointed_iteration.txt`` names if it is complete, else the newest that is."""
    try:
        named = folder / folder_name(int(read_small(folder / LATEST_NAME)))
        if is_complete(named):
            return named
    except (OSError, ValueError):
        pass
    complete = complete_checkpoints(folder)
    return complete[-1] if complete else None


def find_checkpoint(path: str | Path) -> Path:
    """The ``iter_…`` folder that ``path`` means: itself, or the latest of a ``checkpoints`` or run folder.

    Raises UserError if there is no complete one."""
    path = Path(path)
    if step_of(path) is not None:
        if is_complete(path):
            return path
        missing = [name for name in COMPLETE if not (path / name).is_file()]
        raise UserError(
            f"{path} is not a complete checkpoint: it lacks {', '.join(missing)}; give another iter_… folder"
        )
    for folder in (path, path / "checkpoints"):
        found = latest_checkpoint(folder)
        if found is not None:
            return found
    raise UserError(
        what_it_is(path)
        or f"{path} holds no checkpoint; give a run folder, its checkpoints folder, or an iter_… folder in it"
    )
