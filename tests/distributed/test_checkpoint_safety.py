"""A checkpoint is whole or not there: kills, full disks, damage, and what does not fit."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ckpt_faults import (
    MOMENTS,
    after_kill_job,
    exact_state,
    first_save_job,
    full_disk_job,
    kept_job,
    killed_job,
    loads_job,
    weights_only_job,
    writer_killed_job,
)
from tests.support.disks import small_disk_at
from tests.support.harness import PRELOAD, _child, run_ranks

pytestmark = pytest.mark.gloo

DAMAGED = ("__0_0.distcp", ".metadata", "metadata.json", "common.pt", "train_state.json", "config.yaml")
PLAIN = {"parallel.distributed_optimizer": False}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A folder with the checkpoint of step 2, and the sum of its weights."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(first_save_job, 1, {}, str(folder))[0]


def _run_until_killed(world_size: int, *args: object) -> None:
    """Runs ``killed_job`` until its first rank is killed, then kills the others."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    out = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_child, args=(rank, world_size, folder, 60.0, killed_job, args, out))
            for rank in range(world_size)
        ]
        for child in ranks:
            child.start()
        deadline = time.monotonic() + 60.0
        try:
            while all(child.is_alive() for child in ranks) and time.monotonic() < deadline:
                time.sleep(0.05)
            codes = [child.exitcode for child in ranks]
        finally:
            for child in ranks:
                child.kill()
                child.join()
    assert -signal.SIGKILL in codes, f"no rank reached its moment: {codes} {out.get(timeout=1)}"


@pytest.mark.parametrize(
    ("moment", "asynchronous"),
    [(moment, True) for moment in MOMENTS] + [(moment, False) for moment in ("writing", "before rename")],
)
def test_a_kill_at_any_moment_leaves_a_good_checkpoint(
    moment: str, asynchronous: bool, saved: tuple[Path, float], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved[0], folder)
    _run_until_killed(2 if asynchronous else 1, str(folder), moment, asynchronous)
    state, weights, before, after = run_ranks(after_kill_job, 1, str(folder))[0]
    if moment == "before old are removed":
        assert state == exact_state(step=3) and weights != saved[1]
    else:
        assert state == exact_state() and weights == saved[1]
    assert any(name.endswith(".saving") for name in before) == (MOMENTS.index(moment) < MOMENTS.index("before latest"))
    assert [name for name in after if name.startswith(".iter")] == [] and "iter_0000009" in after


def test_a_killed_writer_is_an_error_and_no_hang(tmp_path: Path) -> None:
    answers = run_ranks(writer_killed_job, 2, str(tmp_path), timeout_s=60.0)
    """A failed save, as a full disk is, on every process. The last save of a run is then made without another
    process."""
    for answer, names, last in answers:
        assert answer.startswith("WriterLost: a process that wrote a checkpoint into ") and names == []
        assert last == ["iter_0000007", "latest_checkpointed_iteration.txt"]


def test_what_is_kept_and_going_back(tmp_path: Path) -> None:
    first, back, anew = run_ranks(kept_job, 1, str(tmp_path))[0]
    names = ["iter_0000003", "iter_0000006", "iter_0000007"]
    assert first == (names, 7, 0)
    assert back == (["iter_0000003", "iter_0000004", *names[1:]], 4, 1)  # the other future stays
    assert anew == (["iter_0000003", "iter_0000004", *names[1:]], 6, 1)  # and is replaced step by step


@pytest.fixture(scope="module")
def answers_to_damage(
    saved: tuple[Path, float], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], str]:
    """What loading says about each file cut in half or emptied."""
    attempts, keys = [], []
    for name in DAMAGED:
        for kind in ("half", "empty"):
            folder = tmp_path_factory.mktemp("damaged") / "checkpoints"
            shutil.copytree(saved[0], folder)
            path = folder / "iter_0000002" / name
            os.truncate(path, path.stat().st_size // 2 if kind == "half" else 0)
            keys.append((name, kind))
            attempts.append((str(folder), {}, True))
    return dict(zip(keys, run_ranks(loads_job, 1, attempts)[0]))


@pytest.mark.parametrize("kind", ["half", "empty"])
@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(name: str, kind: str, answers_to_damage: dict[tuple[str, str], str]) -> None:
    answer = answers_to_damage[name, kind]
    print(answer)
    assert "iter_0000002" in answer and ("damaged" in answer or "cut short" in answer)
    if name in ("train_state.json", "config.yaml"):
        assert name in answer


def test_damage_that_one_rank_meets_is_told_to_all(saved: tuple[Path, float], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved[0], folder)
    for path in folder.glob("iter_*/*.distcp"):
        os.truncate(path, path.stat().st_size - 2000)
    for (answer,) in run_ranks(loads_job, 2, [(str(folder), {"parallel.tp": 2}, True)], timeout_s=60.0):
        assert "iter_0000002" in answer and "damaged" in answer


def test_what_does_not_fit_is_refused(saved: tuple[Path, float], tmp_path: Path) -> None:
    plain, missing, lost = tmp_path / "plain", tmp_path / "missing", tmp_path / "lost"
    plain_weights = run_ranks(first_save_job, 1, PLAIN, str(plain))[0]
    missing.mkdir()
    shutil.copytree(saved[0], lost)
    (lost / "latest_checkpointed_iteration.txt").write_text("77")
    folder, weights = str(saved[0]), saved[1]
    answers = run_ranks(
        loads_job,
        1,
        [
            (folder, {}, True),
            (str(lost), {}, True),
            (str(missing), {}, True),
            (f"{folder}/iter_0000005", {}, True),
            (str(plain), {}, True),
            (str(plain), {}, False),
            (folder, PLAIN, True),
            (folder, PLAIN, False),
            (folder, {"model.hidden_size": 128, "model.num_query_groups": 4}, True),
        ],
    )[0]
    whole, newest, none, absent, plain_here, plain_weights_only, sharded_here, weights_only, other = answers
    assert whole == newest == f"loaded step 2, weights {weights!r}"
    assert "holds no checkpoint" in none and str(missing) in none
    assert "iter_0000005 is not a complete checkpoint" in absent
    assert "parallel.distributed_optimizer was false" in plain_here and "is true now" in plain_here
    assert "parallel.distributed_optimizer was true" in sharded_here and "is false now" in sharded_here
    assert weights_only == f"loaded step 0, weights {weights!r}"
    assert plain_weights_only == f"loaded step 0, weights {plain_weights!r}"
    assert "model.hidden_size is 64 there and 128 here" in other and "model.num_query_groups is 2 there" in other
    assert "num_layers" not in other


def test_weights_alone_start_anew(saved: tuple[Path, float]) -> None:
    is_new_state, has_no_moments, weights = run_ranks(weights_only_job, 1, str(saved[0]))[0]
    assert is_new_state and has_no_moments
    assert weights == saved[1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MiB."""
    with small_disk_at(tmp_path / "disk", "16m") as folder:
        yield folder


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
def test_a_full_disk_keeps_the_checkpoint_before(asynchronous: bool, small_disk: Path) -> None:
    first, second = run_ranks(full_disk_job, 2, str(small_disk), asynchronous, timeout_s=60.0)
    kept = ["iter_0000002", "latest_checkpointed_iteration.txt"]
    size_mib = sum(path.stat().st_size for path in small_disk.glob("iter_0000002/*")) / 2**20
    assert first.pop("never")[0] == second.pop("never")[0] == "saved"
    for case, (said, names, step) in first.items():
        print(case, "|", said, "|", second[case][0])
        assert step == 2, case
        assert names == (["iter_0000002", "iter_0000008", kept[1]] if case == "before latest" else kept), case
        assert second[case][0].startswith("UserError"), case
        if case == "from the start":
            needed, free = re.search(
                r"^UserError: a checkpoint needs ([0-9.]+) MiB and .* has ([0-9.]+) MiB free", said
            ).groups()
            assert size_mib < float(needed) < size_mib + 2 and float(free) == 2.0
        else:
            assert said.startswith("UserError: the disk of") and "became full while a checkpoint was saved" in said, (
                case
            )
