"""What earlier settings of a run have left in its folder, which nothing needs any more."""

from __future__ import annotations

import re
from pathlib import Path

from llm_parallel.checkpoint.folders import complete_checkpoints
from llm_parallel.checkpoint.run_file import read_config
from llm_parallel.data.chat_data import REPORT
from llm_parallel.errors import UserError

_NAME = re.compile(r"[0-9a-f]{16}")
"""How the folder of prepared conversations is called: a hash of all that they depend on."""


def unused_conversations(run_dir: Path, current: Path) -> str | None:
    """A sentence about the prepared conversations in a run folder that neither the run file (``current``) nor a
    checkpoint of the run names, with their sizes; None if there are none. They are not removed: other settings may be
    wanted again."""
    needed = {current.name}
    for checkpoint in complete_checkpoints(run_dir / "checkpoints"):
        try:
            prepared = read_config(checkpoint).chat.prepared
        except UserError:
            return None  # what a damaged checkpoint needs is not known
        needed |= {Path(prepared).name} if prepared is not None else set()
    folders = sorted(path for path in (run_dir / "data").glob("*") if _NAME.fullmatch(path.name))
    unused = [path for path in folders if (path / REPORT).is_file() and path.name not in needed]
    if not unused:
        return None
    named = ", ".join(f"{path.name} ({_size(path)})" for path in unused)
    return (
        f"{run_dir / 'data'} holds conversations of earlier settings that neither this run file nor a checkpoint here "
        f"needs: {named}; they may be removed"
    )


def _size(folder: Path) -> str:
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{held / 2**30:.2f} GiB" if held >= 2**30 else f"{held / 2**20:.1f} MiB"
