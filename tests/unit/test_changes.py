"""What a resumed run says about a run file that changed."""

from __future__ import annotations

import pytest

from llm_parallel.config.tree import ModelConfig, RunConfig
from llm_parallel.model.architecture import ARCHITECTURE
from llm_parallel.train.changes import MEANINGS, changed_fields

SAVED = RunConfig.model_validate(
    {
        "model": {"vocab_size": 100},
        "data": {"train": [{"path": "a"}, {"path": "b", "weight": 2.0}], "tokenizer": "t"},
        "train": {"steps": 40},
        "optim": {"lr": 1e-3, "min_lr": 1e-4},
        "adapter": {"rank": 8},
        "evaluate": {"tasks": ["boolq"]},
    }
)

CHANGES = {
    "seed": 7,
    "data.train": [{"path": "a"}],
    "data.seq_length_tokens": 512,
    "data.packing": "isolate",
    "data.eval": [{"path": "c"}],
    "data.eval_fraction": 0.2,
    "model.rope_base": 5e5,
    "model.rope_scaling": {"factor": 4.0},
    "model.norm_epsilon": 1e-6,
    "model.window_tokens": 64,
    "model.layers_without_rope": [3],
    "model.attention_softcap": 50.0,
    "model.output_softcap": 30.0,
    "train.global_batch_size": 16,
    "train.rampup": {"start": 4, "increment": 4, "samples": 100},
    "train.precision": "bf16",
    "optim.clip_grad": 0.5,
    "adapter.alpha": 8.0,
    "adapter.rank_stabilized": True,
    "adapter.dropout": 0.1,
    "adapter.base": "nf4",
    "train.eval_samples": 16,
    "train.label_smoothing": 0.1,
    "train.z_loss": 1e-4,
    "chat.prepared": "data/0123456789abcdef",
    "chat.neftune_alpha": 5.0,
    "evaluate.data_dir": "sets",
    "evaluate.samples": 7,
    "evaluate.seed": 1,
    "evaluate.shots": 2,
    "evaluate.new_tokens": 9,
    "evaluate.chat": True,
}


def with_field(name: str, value: object) -> RunConfig:
    tree = SAVED.model_dump()
    *sections, key = name.split(".")
    node = tree
    for section in sections:
        node = node[section]
    node[key] = value
    return RunConfig.model_validate(tree)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_field_is_named_with_its_meaning(name: str) -> None:
    (said,) = changed_fields(SAVED, with_field(name, CHANGES[name]), 20)
    assert said.startswith(f"{name} ") and "→" in said and said.endswith(f"({MEANINGS[name]})")


def test_every_field_of_the_model_is_decided() -> None:
    """A field of ``model`` must be the same (``ARCHITECTURE``), or its change is said, or it changes no number."""
    free = {"preset", "max_seq_length_tokens", "init_std"}
    same = {"head_dim" if name == "kv_channels" else name for name in ARCHITECTURE}
    said = {name.removeprefix("model.") for name in MEANINGS if name.startswith("model.")}
    assert set(ModelConfig.model_fields) == free | same | said
    assert len(free) + len(same) + len(said) == len(ModelConfig.model_fields), "none is decided twice"


def test_every_field_with_a_meaning_is_tried() -> None:
    assert set(CHANGES) == set(MEANINGS)


@pytest.mark.parametrize(
    ("name", "value"),
    [("run_dir", "elsewhere"), ("parallel.tp", 2), ("log.interval_steps", 5), ("checkpoint.keep_last", 9)],
)
def test_what_changes_no_number_is_not_said(name: str, value: object) -> None:
    assert changed_fields(SAVED, with_field(name, value), 20) == []


def test_a_moved_end_of_the_cosine_says_both_learning_rates() -> None:
    """At step 41 the saved schedule has reached its end, 1e-4; over 400 steps it is still near the peak of 1e-3."""
    (said,) = changed_fields(SAVED, with_field("train.steps", 400), 40)
    assert said.startswith("train.steps 40 → 400 (the learning rate of step 41 is 0.000977 instead of 0.0001)")


def test_a_decay_that_is_moved_before_it_begins_is_said() -> None:
    """The next step has the peak rate either way, and step 37 does not."""
    wsd = SAVED.model_copy(update={"optim": SAVED.optim.model_copy(update={"schedule": "wsd", "decay_steps": 4})})
    longer = wsd.model_copy(update={"optim": wsd.optim.model_copy(update={"decay_steps": 10})})
    (said,) = changed_fields(wsd, longer, 20)
    assert said.startswith("optim.decay_steps 4 → 10 (the learning rate of step 31 is ")


def test_a_schedule_that_gives_the_same_rate_is_not_said() -> None:
    constant = SAVED.model_copy(update={"optim": SAVED.optim.model_copy(update={"schedule": "constant"})})
    longer = constant.model_copy(update={"train": constant.train.model_copy(update={"steps": 400})})
    assert changed_fields(constant, longer, 40) == []
