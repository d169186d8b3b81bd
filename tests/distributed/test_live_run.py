"""Models of a run that goes on to train: all processes load the same checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.harness import run_ranks
from tests.support.parity_models import random_folder

pytestmark = pytest.mark.gloo


def opened(rank: int, world_size: int, run: str) -> str:
    """The checkpoint that a process loads; the second one looks after the run has saved another."""
    from llm_parallel.config.tree import ParallelConfig
    from llm_parallel.generate import load

    if rank:
        newer = Path(run) / "checkpoints" / "iter_0000002"
        load.find_checkpoint = lambda _: newer
    loaded = load.load_model(run, "cpu", member=load.Member(rank, rank, world_size, ParallelConfig(tp=2)))
    return loaded.folder.name


def test_processes_load_one_checkpoint_though_a_run_saves_another(tmp_path: Path) -> None:
    from llm_parallel.convert.importing import import_from_hf
    from llm_parallel.generate.load import describe_folder

    folder = random_folder("llama-2", tmp_path / "model")
    first = import_from_hf(folder, tmp_path / "run", describe_folder(folder), lambda _: None)
    for step in (1, 2):
        shutil.copytree(first, first.parent / f"iter_000000{step}")
    (first.parent / "latest_checkpointed_iteration.txt").write_text("1")
    assert run_ranks(opened, 2, str(tmp_path / "run")) == ["iter_0000001"] * 2
