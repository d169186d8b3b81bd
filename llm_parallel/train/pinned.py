"""Which checkpoints a run began with. A run that others begin from may go on to train and save newer ones, so the ones
that were meant at the first start are noted, and every later start and every process takes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from llm_parallel.checkpoint.folders import find_checkpoint, is_complete
from llm_parallel.config.node import Node
from llm_parallel.config.tree import RunConfig
from llm_parallel.config.tree_online import OF_POLICY
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write
from llm_parallel.model.hf_files import is_hf_folder, is_peft_folder
from llm_parallel.parallel.groups import Groups

AnyNode = TypeVar("AnyNode", bound=Node)
FILE = "loaded.json"
"""File of a run folder: for each folder of a run that the run file names, the checkpoint that it meant."""


def pinned(config: RunConfig, groups: Groups) -> tuple[RunConfig, list[str]]:
    """The configuration with checkpoints in place of the runs that it loads from, and what is to be said of them.

    A checkpoint that was noted and does not exist any longer is replaced by the newest of its run. Folders without
    checkpoints stay as they are: those who load them say what is wrong. Collective."""
    paths = _paths(config)
    if not paths:
        return config, []
    file = Path(config.run_dir) / FILE
    chosen, said = groups.of_first_rank(_choose(paths, file) if groups.is_first_rank else None)
    return _with(config, chosen), said


def _choose(paths: list[str], file: Path) -> tuple[dict[str, str], list[str]]:
    known, said = _noted(file)
    chosen, noted = dict[str, str](), dict[str, str]()
    for path in paths:
        before = known.get(path)
        found = _meant(path) if before is None or not is_complete(Path(before)) else before
        if found is None:
            if before is not None:  # which may come back, as a file system that is not mounted does
                noted[path] = before
            continue
        chosen[path] = noted[path] = found
        if before not in (None, found):
            said.append(f"{before}, which the run began with, does not exist any longer; {found} takes its place")
    if noted != known:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as handle:
                json.dump(noted, handle, indent=2)
        except OSError as error:
            said.append(f"{file} cannot be written ({error.strerror}); a later start takes what is newest then")
    return chosen, said


def _noted(file: Path) -> tuple[dict[str, str], list[str]]:
    """What an earlier start noted, and a sentence if that cannot be read."""
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(known, dict) and all(isinstance(value, str) for value in known.values()):
            return known, []
        reason = "it is no object of paths"
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no JSON"
    return {}, [f"{file} cannot be read ({reason}), so what is newest now is taken"]


def _meant(path: str) -> str | None:
    if is_hf_folder(path) or is_peft_folder(path):
        return None
    try:
        return str(find_checkpoint(path))
    except UserError:
        return None


def _paths(config: RunConfig) -> list[str]:
    """The folders that weights come from, each once."""
    method = config.method
    adapter = config.adapter.load if config.adapter is not None else None
    critic = method.critic.load if method.critic.load != OF_POLICY else None
    judges = [judge.folder for judge in method.rollout.judges]
    found = [config.checkpoint.load, adapter, method.reference.load, critic, *judges]
    return list(dict.fromkeys(path for path in found if path is not None))


def _with(config: RunConfig, chosen: dict[str, str]) -> RunConfig:
    def load(node: AnyNode, field: str = "load") -> AnyNode:
        path = getattr(node, field)
        return node if path not in chosen else node.model_copy(update={field: chosen[path]})

    method = config.method
    judges = tuple(load(judge, "folder") for judge in method.rollout.judges)
    method = method.model_copy(
        update={
            "reference": load(method.reference),
            "critic": method.critic if method.critic.load == OF_POLICY else load(method.critic),
            "rollout": method.rollout.model_copy(update={"judges": judges}),
        }
    )
    adapter = None if config.adapter is None else load(config.adapter)
    return config.model_copy(update={"checkpoint": load(config.checkpoint), "adapter": adapter, "method": method})
