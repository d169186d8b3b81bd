"""What a run takes from the model that it starts from, and how long it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_parallel.checkpoint.folders import COMPLETE
from llm_parallel.checkpoint.run_file import write_config
from llm_parallel.checkpoint.state import TrainState
from llm_parallel.config.load import load_config
from llm_parallel.config.tree import RampUp, TrainConfig
from llm_parallel.data.tokenizer import load_tokenizer
from llm_parallel.errors import UserError
from llm_parallel.train.inherit import inherited, other_tokenizer, with_own_tokenizer
from llm_parallel.train.leftovers import unused_conversations
from llm_parallel.train.step_settings import global_batch_size, steps_for, total_samples
from tests.support import four_digits
from tests.support.folders import NO_TENSORS

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3, "hidden_size": 48,
    "intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 300,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 5000.0, "hidden_act": "silu",
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder, as far as it is looked at before a run starts."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors").write_bytes(NO_TENSORS)
    (tmp_path / "tokenizer.json").touch()
    return tmp_path


def resolved(folder: Path, *overrides: str) -> tuple[Any, list[str]]:
    said: list[str] = []
    return inherited(load_config(None, [f"checkpoint.load={folder}", *overrides]), said.append), said


def test_model_and_tokenizer_come_from_the_folder_and_are_said(folder: Path) -> None:
    config, said = resolved(folder)
    model = config.model
    assert (model.num_layers, model.hidden_size, model.num_query_groups, model.vocab_size) == (3, 48, 2, 300)
    assert model.rope_base == 5000.0 and model.tie_embeddings and config.data.tokenizer == str(folder)
    assert said == [f"model: as in {folder}", f"data.tokenizer: {folder}"]


def test_what_the_run_file_gives_counts(folder: Path) -> None:
    config, said = resolved(folder, "model.max_seq_length_tokens=64", "data.tokenizer=other.json")
    assert (config.model.max_seq_length_tokens, config.model.num_layers) == (64, 3)
    assert config.data.tokenizer == "other.json"
    assert said == [f"model: as in {folder} but for max_seq_length_tokens, which the run file gives"]
    config, said = resolved(folder, "model.preset=debug")
    assert config.model == load_config(None, ["model.preset=debug"]).model and len(said) == 1


def test_a_model_that_is_not_here_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint.load = some/Llama does not exist; .* not downloaded"):
        inherited(load_config(None, ["model_name_or_path=some/Llama"]), pytest.fail)


def test_without_a_folder_nothing_changes() -> None:
    config = load_config(None, [])
    assert inherited(config, pytest.fail) is config


@given(st.integers(1, 40), st.floats(0.1, 400.0), st.booleans())
def test_steps_are_the_fewest_that_consume_the_samples(size: int, samples: float, grows: bool) -> None:
    ramp = RampUp(start=size, increment=size, samples=50) if grows else None
    train = TrainConfig(global_batch_size=4 * size, rampup=ramp)
    steps = steps_for(train, samples)
    taken = total_samples(train.model_copy(update={"steps": steps}))
    last = global_batch_size(train, taken - 4 * size) if not grows else 4 * size
    assert taken >= samples - 1e-6 and (steps == 1 or taken - last < samples)


def test_a_run_ends_when_evaluations_find_no_lower_loss() -> None:
    state = TrainState(step=10)
    for loss, since in ((3.0, 0), (2.5, 0), (2.6, 1), (float("nan"), 2), (2.4, 0), (2.4, 1), (2.5, 2)):
        state.evaluated(loss, 3)
        assert state.evaluations_since_best == since and not state.finished(100)
    state.evaluated(2.4, 3)
    assert state.stopped_early and state.finished(100) and state.best_eval_loss == 2.4
    assert not TrainState(step=10, evaluations_since_best=9).finished(11) and TrainState(step=11).finished(11)


def test_states_of_before_early_stops_are_read(tmp_path: Path) -> None:
    old = {"step": 7, "consumed_samples": 56, "consumed_tokens": 1, "num_skipped": 0, "consecutive_skips": 0}
    (tmp_path / "train_state.json").write_text(json.dumps({**old, "guard": {}, "elapsed_s": 1.5}))
    state = TrainState.read(tmp_path)
    assert state == TrainState(7, 56, 1, elapsed_s=1.5)
    state.evaluated(2.0, 1)
    state.write(tmp_path)
    assert TrainState.read(tmp_path) == state


def test_tokens_that_the_model_knows_as_others_are_counted(tmp_path: Path) -> None:
    """Two of 16 change places; the same file elsewhere is the same tokenizer."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": 16}))
    (tmp_path / "model.safetensors").write_bytes(NO_TENSORS)
    four_digits.write_tokenizer(tmp_path)
    for name, places, said in (("same", (3, 4), None), ("other", (4, 3), "2 of its 16 tokens are other texts there")):
        path = four_digits.write_tokenizer(tmp_path / name) / "tokenizer.json"
        tree = json.loads(path.read_text())
        tree["model"]["vocab"].update(zip("34", places))
        path.write_text(json.dumps(tree))
        config, _ = resolved(tmp_path, f"data.tokenizer={path}")
        found = other_tokenizer(config, load_tokenizer(path))
        assert found is None if said is None else said in str(found)


def test_adapters_of_another_model_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from llm_parallel.train import open as opening

    class Named:
        base: str | None = str(tmp_path / "llama")

        def __init__(self, path: str) -> None:
            assert path == "lora"

    monkeypatch.setattr(opening, "PeftFolder", Named)
    monkeypatch.setattr(opening, "is_peft_folder", lambda path: path == "lora")
    assert opening.made_for_another("lora", f"{tmp_path}/x/../llama") == []
    (said,) = opening.made_for_another("lora", "qwen")
    assert "llama" in said and "checkpoint.load is qwen" in said
    assert opening.made_for_another("runs/lora", "qwen") == [], "our checkpoints know their base by its content"
    Named.base = None
    assert opening.made_for_another("lora", "qwen") == []


def test_a_tokenizer_in_a_checkpoint_is_copied_to_the_run(tmp_path: Path) -> None:
    """The run that the checkpoint belongs to removes it when it has newer ones (checkpoint.keep_last)."""
    inside = tmp_path / "other" / "checkpoints" / "iter_0000020" / "tokenizer"
    inside.mkdir(parents=True)
    (inside / "tokenizer.json").write_text("{}")
    (inside / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (inside / "model.safetensors").write_bytes(NO_TENSORS)
    config, said = load_config(None, [f"run_dir={tmp_path / 'run'}", f"data.tokenizer={inside}"]), list[str]()
    own = with_own_tokenizer(config, said.append)
    shutil.rmtree(tmp_path / "other")
    assert own.data.tokenizer is not None
    copied = Path(own.data.tokenizer)
    assert copied.parent == tmp_path / "run"
    assert sorted(path.name for path in copied.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert len(said) == 1 and str(copied) in said[0] and str(inside) in said[0]
    assert with_own_tokenizer(own, said.append) == own and len(said) == 1, "the copy stays where it is"


def test_a_tokenizer_that_is_removed_or_replaced_later_is_the_one_that_the_run_began_with(tmp_path: Path) -> None:
    for name in ("mine.model", "tokenizer.json"):
        source, run = tmp_path / name, tmp_path / f"run-{name}"
        source.write_text("as the run began")
        config = load_config(None, [f"run_dir={run}", f"data.tokenizer={source}"])
        own = with_own_tokenizer(config, pytest.fail)
        source.write_text("of another corpus")
        checkpoint = run / "iter_0000001"
        checkpoint.mkdir()
        assert write_config(checkpoint, own) is None
        (written,) = (checkpoint / "tokenizer").iterdir()
        assert written.read_text() == "as the run began"
        assert with_own_tokenizer(own, pytest.fail) == own


def test_conversations_of_earlier_settings_are_named_with_their_size(tmp_path: Path) -> None:
    names = current, saved, old = [letter * 16 for letter in "abc"]
    for name in names:
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "report.json").write_text("{}")
        (tmp_path / "data" / name / "tokens.bin").write_bytes(bytes(3 << 20))
    (tmp_path / "data" / "mine").mkdir()
    checkpoint = tmp_path / "checkpoints" / "iter_0000005"
    checkpoint.mkdir(parents=True)
    for name in COMPLETE:
        (checkpoint / name).touch()
    write_config(checkpoint, load_config(None, [f"chat.prepared={tmp_path / 'data' / saved}"]))
    said = unused_conversations(tmp_path, tmp_path / "data" / current)
    assert said is not None and f"needs: {old} (3.0 MiB);" in said
    assert all((tmp_path / "data" / name).is_dir() for name in names), "nothing is removed"
    (tmp_path / "data" / old / "report.json").unlink()
    assert unused_conversations(tmp_path, tmp_path / "data" / current) is None
