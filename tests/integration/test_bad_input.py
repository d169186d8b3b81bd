"""What a user can get wrong: one sentence, exit status 2, in time, and nothing touched."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.support.commands import (
    COMMAND,
    TIMEOUT_S,
    Corpus,
    assert_refused,
    environment,
    events,
    llm_parallel,
    losses,
    train_in_ranks,
    write_run_file,
)
from tests.support.in_process import in_process

pytestmark = pytest.mark.gloo


@pytest.fixture
def run_file(corpus: Corpus, tmp_path: Path) -> Path:
    """A run file that would work."""
    return write_run_file(corpus, tmp_path)


@pytest.fixture
def tokens(corpus: Corpus, tmp_path: Path) -> Path:
    """Prefix of token files to damage."""
    for ending in (".bin", ".idx", ".report.json"):
        shutil.copy(f"{corpus.prefix}{ending}", tmp_path / f"damaged{ending}")
    return tmp_path / "damaged"


@pytest.fixture(scope="module")
def saved(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder with a checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    train_in_ranks(write_run_file(corpus, folder), 1, "train.steps=3")
    return folder / "run"


@contextlib.contextmanager
def listening() -> Iterator[int]:
    """A port that somebody else uses."""
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


def torchrun(rank: int, world_size: int, port: int = 29511) -> dict[str, str]:
    """What torchrun tells a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


CONFIGURATIONS = {
    "unknown key": (["train.stepz=3"], ["train.stepz", "train.steps"]),
    "triton without a GPU": (["kernels.rope=triton"], ["kernels.rope", "TRITON_INTERPRET"]),
    "our AdamW without a GPU": (["optim.implementation=triton"], ["optim.implementation", "TRITON_INTERPRET"]),
    "unknown section": (["optima.lr=1"], ["optima", "optim"]),
    "wrong type": (["train.steps=many"], ["train.steps", "many"]),
    "heads and tp": (
        ["parallel.tp=4", "model.num_query_groups=1", "model.num_attention_heads=2"],
        ["parallel.tp = 4", "model.num_attention_heads = 2", "parallel.tp=2"],
    ),
    "layers and pp": (["parallel.pp=3"], ["parallel.pp = 3", "model.num_layers = 2"]),
    "vpp without pp": (["parallel.vpp=2"], ["parallel.vpp", "parallel.pp = 1"]),
    "batch and dp": (
        ["parallel.dp=3"],
        ["train.global_batch_size = 4", "parallel.dp = 3", "train.global_batch_size=6"],
    ),
    "sequence and cp": (["parallel.cp=3"], ["data.seq_length_tokens = 32", "parallel.cp = 3"]),
    "no such preset": (["model.preset=debugg"], ["debugg", "debug"]),
    "no CUDA": (["device=cuda"], ["device = cuda", "device=auto"]),
    "vocabulary too small": (["model.vocab_size=300"], ["model.vocab_size=300", "400"]),
    "no tokenizer file": (["data.tokenizer=nowhere.model"], ["data.tokenizer = nowhere.model", "does not exist"]),
    "no checkpoint": (["checkpoint.load=nowhere"], ["checkpoint.load = nowhere", "does not exist"]),
    "sequence over all data": (
        ["model.max_seq_length_tokens=4000000", "data.seq_length_tokens=4000000"],
        ["data.seq_length_tokens + 1 = 4000001", "at most"],
    ),
}


@pytest.mark.parametrize(("overrides", "words"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_configuration_that_cannot_run_is_refused(run_file: Path, overrides: list[str], words: list[str]) -> None:
    if "device=cuda" in overrides and Path("/dev/nvidia0").exists():
        pytest.skip("device=cuda is refused only where there is no GPU")
    assert_refused(in_process("pretrain", run_file, *overrides), *words)
    assert not (run_file.parent / "run").exists()


def test_every_broken_rule_has_its_sentence(run_file: Path) -> None:
    result = in_process("pretrain", run_file, "parallel.tp=3")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    for field in ("num_attention_heads = 4", "num_query_groups = 2", "ffn_hidden_size = 176", "seq_length_tokens = 32"):
        assert sum(field in line and "parallel.tp = 3" in line and "; use " in line for line in lines) == 1
    assert not (run_file.parent / "run").exists()


def test_a_missing_run_file_is_named(tmp_path: Path) -> None:
    """By a real process, whose exit status the shell sees; the other refusals come from the same way in."""
    assert_refused(llm_parallel("pretrain", tmp_path / "missing.yaml"), "missing.yaml", "does not exist")


def test_a_run_file_that_is_not_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("train: {steps: [")
    assert_refused(in_process("pretrain", tmp_path / "run.yaml"), "run.yaml", "YAML")


def damage_bin_missing(prefix: Path) -> None:
    Path(f"{prefix}.bin").unlink()


def damage_bin_truncated(prefix: Path) -> None:
    os.truncate(f"{prefix}.bin", Path(f"{prefix}.bin").stat().st_size // 2)


def damage_idx_truncated(prefix: Path) -> None:
    os.truncate(f"{prefix}.idx", 100)


def damage_idx_garbage(prefix: Path) -> None:
    Path(f"{prefix}.idx").write_bytes(os.urandom(500))


def damage_idx_flipped(prefix: Path) -> None:
    """One document's length is another's, so that the documents no longer follow each other."""
    index = np.memmap(f"{prefix}.idx", np.uint8, "r+")
    index[34 + 4 * 3] ^= 0x40


def damage_no_documents(prefix: Path) -> None:
    """What an index of nothing looks like: a header, no lengths, one document boundary."""
    header = bytearray(Path(f"{prefix}.idx").read_bytes()[:34])
    header[18:34] = (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    Path(f"{prefix}.idx").write_bytes(bytes(header) + bytes(8))
    Path(f"{prefix}.bin").write_bytes(b"")


DAMAGES = {
    damage_bin_missing: (".bin does not exist",),
    damage_bin_truncated: (".bin", "truncated"),
    damage_idx_truncated: (".idx", "truncated"),
    damage_idx_garbage: (".idx", "MMIDIDX"),
    damage_idx_flipped: ("damaged",),
    damage_no_documents: ("no documents",),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_token_files_are_named(run_file: Path, tokens: Path, damage: object) -> None:
    damage(tokens)  # type: ignore[operator]
    result = in_process("pretrain", run_file, f"data.train=[{{path: {tokens}}}]")
    assert_refused(result, str(tokens), *DAMAGES[damage])  # type: ignore[index]
    assert not (run_file.parent / "run").exists()


def test_prepare_refuses_input_without_text(tmp_path: Path, corpus: Corpus) -> None:
    (tmp_path / "empty.txt").write_text("")
    result = in_process("prepare", tmp_path / "empty.txt", "--out", tmp_path / "out", "--tokenizer", corpus.tokenizer)
    assert_refused(result, "none of the files given can be read", "empty.txt is empty")
    assert not list(tmp_path.glob("out*"))


def test_a_started_world_that_does_not_fit_is_refused(run_file: Path) -> None:
    env = torchrun(0, 3)
    refused = partial(in_process, "pretrain", run_file)
    assert_refused(refused("parallel.tp=2", env=env), "parallel.tp = 2", "3 processes")
    assert_refused(refused("parallel.dp=4", env=env), "parallel.dp = 4", "3 processes")
    assert_refused(refused(env={"RANK": "0", "WORLD_SIZE": "two"}), "WORLD_SIZE", "two")


def test_a_port_in_use_is_named(run_file: Path) -> None:
    with listening() as port:
        result = in_process("pretrain", run_file, env={"MASTER_PORT": str(port)})
        assert_refused(result, f"MASTER_PORT = {port}")
        result = llm_parallel("pretrain", run_file, "parallel.tp=2", env=torchrun(0, 2, port))
        assert_refused(result, f"MASTER_PORT = {port}", "in use")


@pytest.mark.parametrize("place", ["{folder}/file", "{folder}/file/run", "/proc/run"])
def test_a_run_folder_that_cannot_be_made_is_named(run_file: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    run_dir = place.format(folder=tmp_path)
    assert_refused(in_process("pretrain", run_file, f"run_dir={run_dir}"), f"run_dir = {run_dir}")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_checkpoint_of_another_model_is_refused_by_every_rank(run_file: Path, saved: Path) -> None:
    """As torchrun starts them: no launcher of ours speaks for the ranks or ends them."""
    with listening() as port:
        pass
    arguments = ["pretrain", str(run_file), "parallel.dp=2", "model.hidden_size=128", f"checkpoint.load={saved}"]
    ranks = [
        subprocess.Popen(
            [*COMMAND, *arguments],
            env=environment(torchrun(rank, 2, port)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            output, errors = rank.communicate(timeout=TIMEOUT_S)
            result = subprocess.CompletedProcess(arguments, rank.returncode, output, errors)
            assert_refused(result, "hidden_size", "64", "128")
    finally:
        for rank in ranks:
            rank.kill()


def test_a_run_folder_of_another_model_is_refused_and_kept(run_file: Path, saved: Path) -> None:
    shutil.copytree(saved, run_file.parent / "run")
    result = llm_parallel("pretrain", run_file, "parallel.pp=2", "model.ffn_hidden_size=64")
    assert_refused(result, "ffn_hidden_size", "176", "64")
    latest = run_file.parent / "run" / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert latest.read_text().strip() == "3"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 6 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_all_ranks_and_keeps_the_last_checkpoint(
    corpus: Corpus, run_file: Path, small_disk: Path
) -> None:
    """One checkpoint of 2.6 MB fits, a second or third does not, which is said at the start."""
    every = ["checkpoint.interval_steps=2", "checkpoint.keep_last=9", "train.steps=20"]
    run_dir = small_disk / "run"
    result = llm_parallel("pretrain", run_file, f"run_dir={run_dir}", "parallel.tp=2", *every)
    first, _, result.stderr = result.stderr.partition("\n")
    assert first.startswith(f"run_dir = {run_dir} has ") and "checkpoint.keep_last=9 want 10 more at a time" in first
    assert_refused(result, "checkpoint", str(run_dir), "make room")
    latest = int((run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert latest in (2, 4)
    assert not list((run_dir / "checkpoints").glob(".*"))
    copied = run_file.parent / "run"
    shutil.copytree(run_dir, copied)
    assert train_in_ranks(run_file, 1, "train.steps=8") == [8]
    assert events(copied, "end")
    assert sorted(losses(copied)) == list(range(1, 9))
