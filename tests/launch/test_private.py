"""Another user of the machine creates our folders first, or puts links in them: none of our files is lost, read or
changed.

The other user is a real process under another user id, so these tests need root."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llm_launch.copy_files import (
    Claim,
    CopyFile,
    copy_name,
    forget,
    forget_all_but,
    forget_stale,
    inventory,
    make_run_folder,
    run_folder,
)
from llm_launch.private import private_folder
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write, locked, refuse_strangers

STRANGER = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")


@pytest.fixture
def shm() -> Iterator[Path]:
    """As /dev/shm: everyone may write to it, and remove only what is his. Not in tmp_path, where no stranger gets."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        root = Path(name) / "shm"
        root.mkdir()
        root.chmod(0o1777)
        yield root


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Old files of the victim."""
    folder = tmp_path / "home"
    (folder / "thesis").mkdir(parents=True)
    (folder / "thesis" / "chapter1").write_text("years of work")
    for path in (folder, folder / "thesis", folder / "thesis" / "chapter1"):
        os.utime(path, (0, 0))
    return folder


def as_stranger(command: str) -> subprocess.CompletedProcess[str]:
    """What a shell of another user does."""
    return subprocess.run(
        ["sh", "-c", command], user=STRANGER, group=STRANGER, extra_groups=[], capture_output=True, text=True, cwd="/"
    )


def make(folder: Path, generation: int = 1) -> CopyFile:
    """A copy of step 4 in a node's folder."""
    header = {"generation": generation, "rank": 0, "numbers": 5, "index": []}
    file = CopyFile.create(folder / "own" / copy_name(generation, 0), header)
    file.commit(0, 4, {})
    return file


@needs_root
def test_no_sweep_follows_a_strangers_link(shm: Path, home: Path, tmp_path: Path) -> None:
    """Folders with our names that a stranger made first, with links to the victim's files in them or instead of them;
    everything in them is old."""
    mine = run_folder(shm, tmp_path / "run") / "n1"
    make(mine)
    ours = f"{shm}/llm-parallel-{os.getuid()}"
    laid = as_stranger(
        f"umask 0; mkdir -p {ours}/old {ours}-other; ln -s {home} {ours}/old/n1; ln -s {home} {ours}-other/n1;"
        f"ln -s {home} {ours}-link; ln -s {home}/thesis {ours}-other/own; touch -hd @0 {ours}*/* {ours}-link"
    )
    assert laid.returncode == 0, laid.stderr
    forget_stale(mine)
    for planted in ("", "-other", "-link"):
        folder = Path(f"{ours}{planted}") / "n1"
        forget_all_but(folder, [])
        forget(folder)
        assert inventory(folder) == []
    assert (home / "thesis" / "chapter1").read_text() == "years of work"
    assert inventory(mine)


@pytest.mark.parametrize("which", ["run", "node", "own", "kept"])
def test_no_sweep_follows_a_link_in_our_own_folder(which: str, shm: Path, home: Path, tmp_path: Path) -> None:
    """However it came there."""
    mine, dead = (run_folder(shm, tmp_path / name) / "n1" for name in ("mine", "dead"))
    make(mine)
    make(dead)
    link = {"run": dead.parent, "node": dead, "own": dead / "own", "kept": dead / "kept"}[which]
    if link.exists():
        shutil.rmtree(link)
    link.symlink_to(home)
    for path in (dead, dead.parent):
        if path.exists():
            os.utime(path, (0, 0), follow_symlinks=False)
    forget_all_but(dead, [])
    forget_stale(mine)
    forget(dead)
    assert (home / "thesis" / "chapter1").read_text() == "years of work"
    assert not dead.exists() or which == "run"


@needs_root
def test_a_folder_that_a_stranger_made_first_is_refused(shm: Path, home: Path, tmp_path: Path) -> None:
    run = run_folder(shm, tmp_path / "run")
    for command, words in (
        (f"umask 0; mkdir {run}", f"belongs to user {STRANGER}"),
        (f"ln -s {home} {run}", "is no folder but a symbolic link"),
        (f"touch {run}", "is no folder"),
    ):
        assert as_stranger(command).returncode == 0
        for open_it in (
            lambda: make(run / "n1"),
            lambda: Claim(run / "n1").renew(),
            lambda: make_run_folder(shm, tmp_path / "run"),
        ):
            with pytest.raises(UserError, match=rf"{run.name} {words}.*set elastic\.replica_dir"):
                open_it()
        assert inventory(run / "n1") == []
        shutil.rmtree(run) if run.is_dir() and not run.is_symlink() else run.unlink()
    assert sorted(path.name for path in home.iterdir()) == ["thesis"]


def test_a_folder_of_ours_that_is_open_to_others_is_refused(shm: Path, tmp_path: Path) -> None:
    node = run_folder(shm, tmp_path / "run") / "n1"
    file = make(node)
    for folder in (node.parent, node, node / "own"):
        folder.chmod(0o770)
        with pytest.raises(UserError, match="has the mode 0770, with which other users get in"):
            make(node, 2)
        folder.chmod(0o700)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (node.parent, node, node / "own")] == [0o700] * 3
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600


@needs_root
def test_a_stranger_cannot_read_or_change_a_copy(shm: Path, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        file = make(run_folder(shm, tmp_path / "run") / "n1")
    finally:
        os.umask(before)
    for command in (f"cat {file.path}", f"echo x >> {file.path}", f"ls {file.path.parents[2]}", f"rm -r {file.path}"):
        assert as_stranger(command).returncode != 0, command
    assert as_stranger(f"mv {file.path.parents[2]} {shm}/elsewhere").returncode != 0


@needs_root
def test_a_root_in_which_folders_can_be_exchanged_is_refused(shm: Path, tmp_path: Path) -> None:
    assert as_stranger(f"mkdir {shm}/theirs; chmod 755 {shm}/theirs").returncode == 0
    with pytest.raises(UserError, match=rf"replica_dir = .*theirs belongs to user {STRANGER}"):
        make_run_folder(shm / "theirs", tmp_path / "run")
    (shm / "open").mkdir()
    (shm / "open").chmod(0o777)
    with pytest.raises(UserError, match=r"every user may replace what is in .*open \(mode 0777, no sticky bit\)"):
        make_run_folder(shm / "open", tmp_path / "run")
    with pytest.raises(UserError, match=r"elastic\.replica_dir = .*nowhere cannot be used"):
        make_run_folder(shm / "nowhere", tmp_path / "run")


@needs_root
def test_the_launcher_refuses_in_one_sentence(shm: Path, tmp_path: Path) -> None:
    """As a command, with nothing started."""
    run = run_folder(shm, tmp_path / "run")
    assert as_stranger(f"umask 0; mkdir {run}").returncode == 0
    program = (
        "from llm_launch.starters import LocalStarter; from llm_launch.supervise import StopRequests, launch_elastic;"
        "from llm_parallel.config.tree import ElasticConfig, RunConfig;"
        f"config = RunConfig(run_dir={str(tmp_path / 'run')!r}, elastic=ElasticConfig(replica_dir={str(shm)!r}));"
        "launch_elastic(LocalStarter(config, None, {'n1': [0]}, 'secret', {}), 'cpu', StopRequests())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode and f"UserError: {run} belongs to user {STRANGER}" in done.stderr.splitlines()[-1]


def test_no_two_runs_share_a_folder(shm: Path, tmp_path: Path) -> None:
    """Names that differ by a slash only, or only before their last 80 characters; a copy of a run's folder; a run that
    was begun anew in the same place."""
    long = "x" * 90
    places = [tmp_path / "a" / "b", tmp_path / "a-b", tmp_path / "one" / long, tmp_path / "two" / long]
    folders = [run_folder(shm, place) for place in places]
    shutil.copytree(places[0], tmp_path / "copy")
    folders.append(run_folder(shm, tmp_path / "copy"))
    assert run_folder(shm, places[0]) == folders[0]
    shutil.rmtree(places[0])
    folders.append(run_folder(shm, places[0]))
    assert len(set(folders)) == len(folders)
    assert all(len(folder.name) < 120 for folder in folders)


def test_a_copy_of_another_run_is_not_opened(shm: Path, tmp_path: Path) -> None:
    """Not even if it lies where this run's should, and not kept for it either."""
    mine, theirs = (run_folder(shm, tmp_path / name) / "n1" for name in ("mine", "theirs"))
    file = make(mine)
    shutil.copytree(mine.parent, theirs.parent)
    shutil.copytree(mine, theirs, dirs_exist_ok=True)
    assert inventory(mine) and inventory(theirs) == []
    with pytest.raises(ValueError, match="is a copy of another run"):
        CopyFile.open(theirs / "own" / file.path.name)
    with pytest.raises(ValueError, match=r"a copy of the run .* is not kept in"):
        CopyFile.create(theirs / "kept" / file.path.name, dict(file.header))


def _lock(path: Path) -> None:
    with locked(path, "held"):
        pass


def _write(path: Path) -> None:
    with atomic_write(path) as handle:
        handle.write("new")


@needs_root
def test_a_link_laid_at_the_very_name_of_a_temporary_file(
    shm: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it has a random number in it."""
    victim = home / "thesis" / "chapter1"
    monkeypatch.setattr("secrets.token_hex", lambda *_: "0")
    assert as_stranger(f"ln -s {victim} {shm}/.corpus.{os.getpid()}.0.tmp").returncode == 0
    with pytest.raises(FileExistsError):
        _write(shm / "corpus")
    assert victim.read_text() == "years of work" and (shm / f".corpus.{os.getpid()}.0.tmp").is_symlink()


@needs_root
@pytest.mark.parametrize(("do", "refused"), [(_lock, True), (_write, False)])
def test_links_laid_where_files_of_ours_are_written(
    do: Callable[[Path], None], refused: bool, shm: Path, home: Path
) -> None:
    """Lock files and the temporary neighbours of what is written whole, in a folder that everyone may write to."""
    victim, path = home / "thesis" / "chapter1", shm / "corpus"
    command = f"ln -s {victim} {path}; ln -s {victim} {shm}/.corpus.{os.getpid()}.tmp"
    assert as_stranger(command).returncode == 0
    if refused:
        with pytest.raises(UserError, match="is a symbolic link where LLM Parallel needs its own file"):
            do(path)
    else:
        do(path)
        assert path.read_text() == "new" and not path.is_symlink()
    assert victim.read_text() == "years of work"


@needs_root
def test_a_strangers_lock_or_run_folder_is_refused(shm: Path) -> None:
    assert as_stranger(f"touch {shm}/lock; mkdir {shm}/run").returncode == 0
    with pytest.raises(UserError, match=f"lock belongs to user {STRANGER}"):
        _lock(shm / "lock")
    with pytest.raises(UserError, match=f"run belongs to user {STRANGER}"):
        refuse_strangers(shm / "run", (shm / "run").stat())


def test_a_private_folder_is_found_by_its_parts_alone(shm: Path) -> None:
    with pytest.raises(FileNotFoundError), private_folder(shm, "a", "b", make=False):
        pass
    with private_folder(shm, "a", "b", make=True) as fd:
        assert os.path.samestat(os.fstat(fd), (shm / "a" / "b").stat())
