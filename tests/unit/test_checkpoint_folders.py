"""Names of checkpoints, which one is the latest, and what lies beside the weights."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_parallel.checkpoint.folders import (
    COMPLETE,
    LATEST_NAME,
    complete_checkpoints,
    find_checkpoint,
    folder_name,
    latest_checkpoint,
    step_of,
)
from llm_parallel.checkpoint.run_file import read_config, write_config
from llm_parallel.checkpoint.state import TrainState
from llm_parallel.config.load import load_config
from llm_parallel.config.tree import DataConfig, ModelConfig, RunConfig
from llm_parallel.errors import UserError
from llm_parallel.train.loop import say_what_is_missing


def _checkpoint(folder: Path, step: int, without: str | None = None) -> Path:
    path = folder / folder_name(step)
    path.mkdir(parents=True)
    for name in COMPLETE:
        if name != without:
            (path / name).touch()
    return path


@given(st.integers(0, 10**12))
def test_a_name_gives_its_step(step: int) -> None:
    name = folder_name(step)
    assert step_of(Path("run") / name) == step and len(name) >= len("iter_0000000")


@pytest.mark.parametrize(
    "name", ["iter_000001", ".iter_0000001.0a.saving", "iter_0000001.bak", "iter_-000001", "release", "iter_"]
)
def test_other_names_are_no_checkpoints(name: str, tmp_path: Path) -> None:
    (tmp_path / "iter_0000001").rename(tmp_path / name) if _checkpoint(tmp_path, 1) else None
    assert step_of(tmp_path / name) is None
    assert complete_checkpoints(tmp_path) == [] and latest_checkpoint(tmp_path) is None


def test_checkpoints_are_sorted_by_step_and_not_by_name(tmp_path: Path) -> None:
    steps = [9_999_999, 10_000_000, 2, 30]
    for step in steps:
        _checkpoint(tmp_path, step)
    assert [step_of(path) for path in complete_checkpoints(tmp_path)] == sorted(steps)


@pytest.mark.parametrize("missing", COMPLETE)
def test_a_checkpoint_without_any_of_its_parts_is_not_taken(missing: str, tmp_path: Path) -> None:
    good, bad = _checkpoint(tmp_path, 5), _checkpoint(tmp_path, 6, without=missing)
    (tmp_path / LATEST_NAME).write_text("6")
    assert complete_checkpoints(tmp_path) == [good] and latest_checkpoint(tmp_path) == good
    with pytest.raises(UserError, match=rf"iter_0000006 .*lacks {missing}"):
        find_checkpoint(bad)


@pytest.mark.parametrize(
    ("text", "step"),
    [("5", 5), ("5\n", 5), ("77", 6), ("", 6), ("release", 6), ("-5", 6), ("\x00\xff", 6), (None, 6)],
)
def test_the_named_checkpoint_else_the_newest(text: str | None, step: int, tmp_path: Path) -> None:
    _checkpoint(tmp_path / "checkpoints", 5)
    _checkpoint(tmp_path / "checkpoints", 6)
    if text is not None:
        (tmp_path / "checkpoints" / LATEST_NAME).write_text(text, encoding="latin-1")
    expected = tmp_path / "checkpoints" / folder_name(step)
    assert latest_checkpoint(tmp_path / "checkpoints") == expected
    assert find_checkpoint(tmp_path) == find_checkpoint(str(tmp_path / "checkpoints")) == expected
    assert find_checkpoint(expected) == expected


@pytest.mark.parametrize("made", [True, False])
def test_no_checkpoint_is_said_with_the_folder(made: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if made:
        folder.mkdir()
    with pytest.raises(UserError, match=f"{folder} holds no checkpoint"):
        find_checkpoint(folder)


COUNTS = st.integers(0, 2**63)
VALUES = st.lists(st.floats(allow_nan=False), max_size=4)


@given(
    st.builds(
        TrainState,
        *[COUNTS] * 5,
        guard=st.dictionaries(st.sampled_from(["losses", "grad_norms"]), VALUES),
        elapsed_s=st.floats(0, 1e12),
    )
)
def test_counters_come_back_exactly(state: TrainState) -> None:
    with tempfile.TemporaryDirectory() as folder:
        state.write(Path(folder))
        assert TrainState.read(Path(folder)) == state


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"step": 1}', "null"])
def test_damaged_counters_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "train_state.json").write_text(text)
    with pytest.raises(UserError, match=r"train_state\.json is missing or damaged"):
        TrainState.read(tmp_path)


def _config(tokenizer: Path | None) -> RunConfig:
    return RunConfig(
        seed=7, model=ModelConfig(num_layers=3), data=DataConfig(tokenizer=str(tokenizer) if tokenizer else None)
    )


@pytest.mark.parametrize("kind", ["folder", "tokenizer.json", "mine.json", "mine.model"])
def test_the_tokenizer_travels_with_the_checkpoint(kind: str, tmp_path: Path) -> None:
    name = "tokenizer.json" if kind == "folder" else kind
    source = tmp_path / "source"
    source.mkdir()
    (source / name).write_text("the tokenizer")
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    (source / "model-00001-of-00002.safetensors").write_text("weights of a Hugging Face folder")
    config = _config(source if kind == "folder" else source / name)
    checkpoint = tmp_path / "iter_0000001"
    checkpoint.mkdir()
    write_config(checkpoint, config)
    shutil.rmtree(source)
    checkpoint = checkpoint.rename(tmp_path / "moved")  # to another machine, say
    read = read_config(checkpoint)
    assert read.data.tokenizer == str(checkpoint / "tokenizer")
    assert read.model_copy(update={"data": config.data}) == config
    found = {path.name: path.read_text() for path in (checkpoint / "tokenizer").iterdir()}
    assert found.pop("tokenizer.model" if kind == "mine.model" else "tokenizer.json") == "the tokenizer"
    if kind != "mine.model":
        assert found.pop("tokenizer_config.json") == json.dumps({"eos_token": "<end>"})
    assert found == {}


@pytest.mark.parametrize("gone", ["tokenizer", "template"])
def test_what_a_checkpoint_cannot_hold_is_said(gone: str, tmp_path: Path) -> None:
    source, prepared = tmp_path / "tokenizer.json", tmp_path / "prepared"
    source.write_text("{}")
    config = load_config(None, [f"data.tokenizer={source}", f"chat.prepared={prepared}", "method.kind=sft"])
    if gone == "tokenizer":
        source.unlink()
    checkpoint = tmp_path / "iter_0000001"
    checkpoint.mkdir()
    missing = write_config(checkpoint, config)
    assert missing is not None and str(source if gone == "tokenizer" else prepared) in missing
    assert (checkpoint / "config.yaml").is_file(), "the weights are worth keeping all the same"
    said, events = [], []
    metrics = SimpleNamespace(message=said.append, event=lambda kind, **fields: events.append((kind, fields)))
    run = SimpleNamespace(store=SimpleNamespace(missing=missing), metrics=metrics, state=SimpleNamespace(step=7))
    say_what_is_missing(run)  # type: ignore[arg-type]
    assert said == [f"the checkpoint of step 7: {missing}"]
    assert events == [("save_incomplete", {"step": 7, "cause": missing})]


def test_a_configuration_without_tokenizer_comes_back(tmp_path: Path) -> None:
    write_config(tmp_path, _config(None))
    assert read_config(tmp_path) == _config(None)


@given(st.data())
def test_a_configuration_cut_short_anywhere_is_refused(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_config(folder, _config(None))
        whole = (folder / "config.yaml").read_bytes()
        (folder / "config.yaml").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(UserError, match=r"config\.yaml is cut short"):
            read_config(folder)


def test_a_folder_without_configuration_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.yaml"):
        read_config(tmp_path)
