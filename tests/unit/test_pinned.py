"""Which checkpoints a run takes from runs that go on to train."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_parallel.checkpoint.folders import COMPLETE, folder_name
from llm_parallel.config.load import load_config
from llm_parallel.config.tree import RunConfig
from llm_parallel.train.pinned import pinned
from tests.support.folders import NO_TENSORS

ONE_PROCESS: Any = SimpleNamespace(is_first_rank=True, of_first_rank=lambda value: value)


def save(run: Path, step: int) -> str:
    """A checkpoint, as far as its name is looked for."""
    folder = run / "checkpoints" / folder_name(step)
    folder.mkdir(parents=True)
    for name in COMPLETE:
        (folder / name).touch()
    return str(folder)


def config_of(tmp_path: Path, *overrides: str) -> RunConfig:
    return load_config(None, [f"run_dir={tmp_path / 'run'}", *overrides])


def loads(config: RunConfig) -> list[str | None]:
    method = config.method
    judges = [judge.folder for judge in method.rollout.judges]
    return [config.checkpoint.load, method.reference.load, method.critic.load, *judges]


def test_a_later_start_takes_what_the_first_one_took(tmp_path: Path) -> None:
    base, other = tmp_path / "base", tmp_path / "other"
    first, theirs = save(base, 5), save(other, 7)
    config = config_of(
        tmp_path, f"checkpoint.load={base}", f"method.reference.load={other / 'checkpoints'}",
        f"method.rollout.judges=[{{kind: reward_model, folder: {other}}}]",
    )  # fmt: skip
    found, said = pinned(config, ONE_PROCESS)
    assert loads(found) == [first, theirs, "policy", theirs] and not said
    save(base, 9)
    save(other, 8)
    assert pinned(config, ONE_PROCESS) == (found, [])

    shutil.rmtree(first)  # as checkpoint.keep_last of that run does
    found, said = pinned(config, ONE_PROCESS)
    second = str(base / "checkpoints" / folder_name(9))
    assert loads(found) == [second, theirs, "policy", theirs]
    assert said == [f"{first}, which the run began with, does not exist any longer; {second} takes its place"]
    assert pinned(config, ONE_PROCESS) == (found, [])

    third = save(tmp_path / "third", 1)
    changed, said = pinned(config_of(tmp_path, f"checkpoint.load={tmp_path / 'third'}"), ONE_PROCESS)
    assert changed.checkpoint.load == third and not said


def test_what_is_no_run_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text("{}")
    (hf / "model.safetensors").write_bytes(NO_TENSORS)
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "policy", 3)  # a run that is called as the critic's keyword
    for path in (str(hf), str(tmp_path), "policy/checkpoints/iter_0000003"):
        found, said = pinned(config_of(tmp_path, f"checkpoint.load={path}"), ONE_PROCESS)
        assert found.checkpoint.load == path and not said
    found, _ = pinned(config_of(tmp_path, "checkpoint.load=policy"), ONE_PROCESS)
    assert (found.checkpoint.load, found.method.critic.load) == ("policy/checkpoints/iter_0000003", "policy")
    without = config_of(tmp_path)
    assert pinned(without, ONE_PROCESS)[0] is without


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    first = save(tmp_path / "base", 5)
    (tmp_path / "run").write_text("a file")
    found, said = pinned(config_of(tmp_path, f"checkpoint.load={tmp_path / 'base'}"), ONE_PROCESS)
    assert found.checkpoint.load == first
    assert any("cannot be written" in sentence for sentence in said)


def test_a_run_that_is_away_for_a_start_is_not_forgotten(tmp_path: Path) -> None:
    """As a file system that is mounted late."""
    first = save(tmp_path / "base", 5)
    config = config_of(tmp_path, f"checkpoint.load={tmp_path / 'base'}")
    pinned(config, ONE_PROCESS)
    (tmp_path / "base").rename(tmp_path / "away")
    found, said = pinned(config, ONE_PROCESS)
    assert found.checkpoint.load == str(tmp_path / "base") and not said
    (tmp_path / "away").rename(tmp_path / "base")
    save(tmp_path / "base", 9)
    assert pinned(config, ONE_PROCESS)[0].checkpoint.load == first


@pytest.mark.parametrize("content", ["3", "[1]", '{"a": 1}', "{", ""])
def test_a_damaged_note_is_said(content: str, tmp_path: Path) -> None:
    first = save(tmp_path / "base", 5)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "loaded.json").write_text(content)
    found, (said,) = pinned(config_of(tmp_path, f"checkpoint.load={tmp_path / 'base'}"), ONE_PROCESS)
    assert found.checkpoint.load == first and "loaded.json cannot be read (it is no " in said
