"""Whether there is room for checkpoints and copies is said before a run starts, and what SLURM would get in vain."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml

from llm_parallel.config.presets import MODEL_PRESETS
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError
from llm_parallel.train import room
from llm_parallel.train.preflight import preflight_job
from tests.support.data_helpers import numbered_documents, write_token_file
from tests.support.disks import grow, small_disk_at
from tests.support.in_process import in_process

MODEL = {**MODEL_PRESETS["debug"], "vocab_size": 2000}


def config_of(run_dir: Path, **sections: object) -> RunConfig:
    return RunConfig.model_validate({"run_dir": str(run_dir), "model": MODEL, "device": "cpu", **sections})


def said(config: RunConfig, runs: int = 1) -> list[str]:
    found: list[str] = []
    room.check_room(config, found.append, runs)
    return found


def test_published_models_take_what_their_parameters_say(tmp_path: Path) -> None:
    """Llama-2 7B has 6,738,415,616 parameters: 14 bytes each in bf16 (weights 2, master 4, moments 8)."""
    config = config_of(tmp_path, model={**MODEL_PRESETS["llama2-7b"], "vocab_size": 32000}, train={"precision": "bf16"})
    assert room.checkpoint_bytes(config) == pytest.approx(14 * 6_738_415_616, rel=1e-4)


@pytest.mark.parametrize(
    ("steps", "checkpoint", "expected"),
    [
        (100, {}, 1),
        (100, {"interval_steps": 50}, 2),
        (100, {"interval_steps": 10}, 4),
        (95, {"interval_steps": 10, "keep_last": 20}, 10),
        (100, {"interval_steps": 10, "keep_last": 1, "keep_every_steps": 50}, 4),
    ],
)
def test_checkpoints_at_once(tmp_path: Path, steps: int, checkpoint: dict[str, int], expected: int) -> None:
    config = config_of(tmp_path, train={"steps": steps}, checkpoint=checkpoint)
    assert room.checkpoints_at_once(config) == expected


@pytest.mark.processes
def test_a_small_disk_is_found_before_the_run(tmp_path: Path) -> None:
    """A checkpoint of this model takes 5.5 MiB."""
    every = {"checkpoint": {"interval_steps": 10, "keep_every_steps": 50}}
    with small_disk_at(tmp_path / "disk", "16m") as disk:
        run_dir = disk / "deep" / "run"
        assert said(config_of(run_dir)) == []
        (text,) = said(config_of(run_dir, **every))
        assert "room for 2" in text and "checkpoint.keep_last=3 and checkpoint.keep_every_steps=50 want 6 more" in text
        with pytest.raises(
            UserError, match=r"16.0 MiB of free disk, and one checkpoint of each of the 3 runs takes 16"
        ):
            said(config_of(run_dir), runs=3)
        (disk / "filler").write_bytes(bytes(12 << 20))
        with pytest.raises(UserError, match=r"run_dir = .*/run has 4.0 MiB of free disk, and a checkpoint .* 5.5 MiB"):
            said(config_of(run_dir))
        assert not run_dir.parent.exists()


def test_checkpoints_that_are_there_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, checkpoint={"interval_steps": 10})
    monkeypatch.setattr(room, "free_bytes", lambda _: 2 * room.checkpoint_bytes(config))
    assert len(said(config)) == 1
    monkeypatch.setattr(room, "complete_checkpoints", lambda _: [tmp_path] * 3)
    assert said(config) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run_dir = .*/file/run cannot be written, since .*/file is no folder"):
        said(config_of(tmp_path / "file" / "run"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"cannot be written, since .* is read-only"):
        said(config_of(tmp_path / "run"))


@pytest.mark.processes
def test_copies_in_memory_need_room(tmp_path: Path) -> None:
    """Two slots of 12 bytes for 354,624 parameters and 1 MiB for counters are 10.1 MiB; twice with a partner."""
    assert room.num_parameters(config_of(tmp_path)) == 354_624
    with small_disk_at(tmp_path / "memory", "16m") as disk:
        config = config_of(tmp_path / "run", elastic={"replica_dir": str(disk)})
        told: list[str] = []
        room.check_copies(config, 1, 1, disk / "none", told.append)
        assert "a recovery needs 20.2 MiB" in told[0], "the copies that it starts from, and as much for new ones"
        room.check_copies(config, 2, 1, disk / "none")
        with pytest.raises(UserError, match=r"elastic.replica_dir = .* has room for 16.0 MiB, and .* take 20.2 MiB"):
            room.check_copies(config, 2, 2, disk / "none")
        room.check_copies(config_of(tmp_path, elastic={"replicate_every_steps": 0}), 2, 2, disk / "none")
        (disk / "own").mkdir()
        (disk / "own" / "old").write_bytes(bytes(8 << 20))
        room.check_copies(config, 1, 1, disk / "own")
        with pytest.raises(UserError, match=r"room for 8.0 MiB"):
            room.check_copies(config, 1, 1, disk / "none")
        shutil.rmtree(disk / "own")
        grow(disk, "24m")
        room.check_copies(config, 1, 1, disk / "none", lambda text: pytest.fail(text))


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run of two processes on a small corpus."""
    data = {"train": [{"path": write_token_file(tmp_path / "x", numbered_documents([1500]))}], "eval_fraction": 0.0}
    tree = {"run_dir": str(tmp_path / "run"), "model": MODEL, "data": data, "parallel": {"tp": 2}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


REFUSED = {
    "no data": (["data.train=[]"], ["data.train is empty"]),
    "missing file": (["data.train=[{path: nowhere}]"], ["nowhere"]),
    "too short": (["data.seq_length_tokens=2000", "model.max_seq_length_tokens=2048"], ["1500 tokens to use"]),
    "layout": (["parallel.tp=3"], ["parallel.tp"]),
    "tokenizer": (["data.tokenizer=nowhere"], ["nowhere"]),
    "vocabulary": (["model.vocab_size=100"], ["model.vocab_size=100"]),
    "no room": (["model.preset=llama2-70b", "parallel.tp=1", "run_dir={disk}/run"], ["of free disk"]),
    "kernels": (["--gpus-per-node=0", "parallel.tp=1", "kernels.rms_norm=triton"], ["kernels.rms_norm is triton"]),
    "device": (["--gpus-per-node=0", "device=cuda"], ["--gpus-per-node 0"]),
    "no checkpoint": (["checkpoint.load=nowhere"], ["checkpoint.load = nowhere"]),
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A small disk for all cases."""
    with small_disk_at(tmp_path_factory.mktemp("room") / "disk", "1m") as folder:
        yield folder


@pytest.mark.processes
@pytest.mark.parametrize("name", REFUSED)
def test_submit_refuses_what_must_fail_before_anything_is_written(name: str, run_file: Path, disk: Path) -> None:
    arguments, words = REFUSED[name]
    given = [argument.format(disk=disk) if "disk" in argument else argument for argument in arguments]
    (run_file.parent / "sbatch").write_text(f"#!/bin/sh\ntouch {run_file.parent}/called; echo 7\n")
    (run_file.parent / "sbatch").chmod(0o755)
    path = {"PATH": f"{run_file.parent}:{os.environ['PATH']}"}
    result = in_process("submit", run_file, "--nodes=1", "--gpus-per-node=2", *given, env=path)
    assert result.returncode == 2 and all(word in result.stderr for word in words), (result.stdout, result.stderr)
    assert not (run_file.parent / "called").exists() and not (run_file.parent / "run").exists()
    if name == "no data":
        result = in_process("submit", run_file, "--nodes=1", "--gpus-per-node=2", env=path)
        assert result.returncode == 0, (result.stdout, result.stderr)
        assert (run_file.parent / "called").exists(), "a login node without a GPU refuses nothing for that"


def test_gpus_that_the_run_does_not_use_are_said(run_file: Path) -> None:
    from llm_parallel.config.load import load_config

    found: list[str] = []
    config = load_config(str(run_file), ["device=cpu", "parallel.tp=1"], notice=lambda _: None)
    preflight_job(config, 8, 8, found.append)
    assert found[0] == "device = cpu: the 8 GPUs of each node that --gpus-per-node asks for are not used"
