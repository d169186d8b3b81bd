"""Folders that appear when they are complete."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_parallel.convert.export import ShardWriter
from llm_parallel.errors import UserError
from llm_parallel.files import folder_in_whole
from tests.support.disks import small_disk_at


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model"
    with folder_in_whole(target) as making:
        (making / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x" and names(target.parent) == ["model"]
    (tmp_path / "empty").mkdir()
    with folder_in_whole(tmp_path / "empty") as making:
        (making / "file").touch()
    assert names(tmp_path / "empty") == ["file"]


def test_nothing_is_left_of_a_folder_that_was_not_completed(tmp_path: Path) -> None:
    with pytest.raises(KeyError), folder_in_whole(tmp_path / "model") as making:
        (making / "file").touch()
        raise KeyError
    assert names(tmp_path) == []


def test_what_a_dead_process_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".model.making"
    (left / "deep").mkdir(parents=True)
    (left / "deep" / "file").touch()
    (left / "link").symlink_to(tmp_path)
    with folder_in_whole(tmp_path / "model") as making:
        (making / "own").touch()
    assert names(tmp_path / "model") == ["own"]


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    with folder_in_whole(tmp_path / "model") as making:
        (making / "file").touch()
        with pytest.raises(UserError, match="another process is writing"), folder_in_whole(tmp_path / "model"):
            pytest.fail("both write")
        assert (making / "file").exists()
    assert names(tmp_path / "model") == ["file"]


def test_a_place_that_is_taken_is_named(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "file").touch()
    (tmp_path / ".linked.making").symlink_to(tmp_path / "full")
    for name, sentence in (("full", "is not empty"), ("file", "is not empty"), ("linked", "symbolic link")):
        with pytest.raises(UserError, match=sentence), folder_in_whole(tmp_path / name):
            pytest.fail("written")
    assert (tmp_path / "full" / "file").exists()
    with pytest.raises(UserError, match="cannot be written"), folder_in_whole(tmp_path / "file" / "below"):
        pytest.fail("written")


@pytest.mark.processes
def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with small_disk_at(tmp_path / "disk", "1m") as disk:
        with pytest.raises(UserError, match=r"model cannot be written \(No space left"):
            with folder_in_whole(disk / "model") as making:
                writer = ShardWriter(making, 10**9)
                writer.add({"weight": torch.zeros(1 << 20)})
                writer.close()
        assert names(disk) == []
