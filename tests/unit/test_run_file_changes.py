"""What a run that goes on does with each change of its run file: refused, noticed, or truly without effect.

``python -m tests.unit.test_run_file_changes FILE`` writes the table.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from llm_parallel.config.load import describe_fields, load_config
from llm_parallel.config.tree import RunConfig
from llm_parallel.data.indexed import TokenFile
from llm_parallel.errors import UserError
from llm_parallel.train.changes import MEANINGS, RATE, WITHOUT_EFFECT, changed_fields
from llm_parallel.train.loop import run_training
from llm_parallel.train.preflight import preflight
from llm_parallel.train.run import Place
from llm_parallel.worker.command import is_finished
from tests.support.data_helpers import write_token_file
from tests.support.harness import run_ranks

pytestmark = pytest.mark.gloo
STOPPED_AT = 2
RUN = """\
run_dir: {folder}/run
device: cpu
model: {{num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, num_query_groups: 1, \
vocab_size: 64}}
data:
  train: [{folder}/a, {folder}/b]
  tokenizer: {folder}/one/tokenizer.json
  seq_length_tokens: 16
  eval_fraction: 0.2
train: {{global_batch_size: 4, steps: 4, eval_samples: 4, threads_per_process: 1}}
optim: {{lr: 3.0e-3, min_lr: 3.0e-4, warmup_steps: 1}}
log: {{tensorboard: false, plots: false, comm_time: false}}
checkpoint: {{asynchronous: false}}
"""

REFUSED = {
    "train.early_stop_evaluations": "5",
    "model.num_layers": "3",
    "model.hidden_size": "64",
    "model.ffn_hidden_size": "96",
    "model.num_attention_heads": "4",
    "model.num_query_groups": "2",
    "model.head_dim": "32",
    "model.vocab_size": "128",
    "model.qkv_bias": "true",
    "model.attention_output_bias": "true",
    "model.mlp_bias": "true",
    "model.qk_norm": "true",
    "model.qk_norm_over_heads": "true",
    "model.norm_outputs": "true",
    "model.tie_embeddings": "true",
    "model.value_head": "true",
    "train.epochs": "2",
    "train.steps": "2",
    "parallel.distributed_optimizer": "false",
    "adapter.rank": "4",
}
NOTICED = {
    "seed": "7",
    "model.norm_epsilon": "1e-6",
    "model.rope_base": "5e5",
    "model.rope_scaling": "{factor: 4.0}",
    "model.window_tokens": "8",
    "model.layers_without_rope": "[1]",
    "model.attention_softcap": "50",
    "model.output_softcap": "30",
    "model.init_std": "0.5",
    "data.train": "[{path: FOLDER/a, weight: 3}, FOLDER/b]",
    "data.eval": "[FOLDER/b]",
    "data.eval_fraction": "0.3",
    "data.tokenizer": "FOLDER/two/tokenizer.json",
    "data.seq_length_tokens": "8",
    "data.packing": "isolate",
    "train.global_batch_size": "8",
    "train.steps": "5",
    "train.rampup": "{start: 4, increment: 4, samples: 8}",
    "train.precision": "bf16",
    "train.label_smoothing": "0.1",
    "train.z_loss": "1e-4",
    "train.eval_samples": "8",
    "optim.lr": "1e-3",
    "optim.min_lr": "1e-4",
    "optim.schedule": "linear",
    "optim.warmup_steps": "2",
    "optim.decay_steps": "3",
    "optim.beta1": "0.8",
    "optim.beta2": "0.99",
    "optim.epsilon": "1e-6",
    "optim.weight_decay": "1.0",
    "optim.clip_grad": "0.5",
    "optim.moment_bits": "8",
    "checkpoint.load": "FOLDER/run/checkpoints",
    "checkpoint.load_optimizer": "false",
}
ONE_RESULT = {
    "model.max_seq_length_tokens": "64",
    "data.prefetch_batches": "1",
    "train.micro_batch_size": "2",
    "train.eval_interval_steps": "1",
    "train.deterministic": "true",
    "train.time_limit_s": "9999",
    "train.guard": "{spike_zscore: 5.0, spike_window_steps: 64}",
    "optim.implementation": "torch",
    "parallel.recompute": "full",
    "log.interval_steps": "2",
    "checkpoint.keep_last": "1",
}
"""Changes that must leave every loss as it is, but for the rounding of a sum in another order."""
SCORED = {
    "evaluate.data_dir": "sets",
    "evaluate.samples": "7",
    "evaluate.seed": "1",
    "evaluate.shots": "2",
    "evaluate.new_tokens": "9",
    "evaluate.chat": "true",
}
"""Noticed by a run that scores tasks."""
SCORED_ALIKE = {"evaluate.tasks", "evaluate.interval_steps", "evaluate.max_running", "evaluate.sandbox"}
"""No loss depends on them, as tests/integration/test_training_tasks.py shows."""
NOT_TRIED = {"model.preset", "train.threads_per_process", "optim.warmup_fraction"}
"""The first only fills in other fields; the second is speed alone, and costs more threads than a test may have; the
third takes the place of another field and has a test of its own."""


@dataclass(frozen=True)
class Outcome:
    """What a resumed run said of its settings, and its last training and held-out losses; or its refusal."""

    said: tuple[str, ...] = ()
    losses: tuple[float, float] = (0.0, 0.0)
    refusal: str = ""


def write_tokenizer(folder: Path, order: list[int]) -> None:
    """A tokenizer of 64 single letters, in an order."""
    folder.mkdir()
    vocabulary = {chr(0x4E00 + letter): number for number, letter in enumerate(order)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": chr(0x4E00)}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": chr(0x4E00)}))


def trained(rank: int, world_size: int, folder: Path, overrides: tuple[str, ...], stop_at: int | None) -> str:
    """Trains as ``pretrain`` does in a worker; what ``pretrain`` refuses, if it does."""
    try:
        config = preflight(load_config(folder / "run.yaml", overrides, notice=lambda _: None), 1)
        if is_finished(config):
            return "the run is finished"
        steps = iter(range(1, 1000))
        run_training(config, Place(0, 1, 0), lambda: next(steps) == stop_at)
    except UserError as refusal:
        return str(refusal)
    return ""


def train(folder: Path, *overrides: str, stop_at: int | None = None) -> str:
    """The same in a process of its own, which may change torch as training on a CPU does."""
    return run_ranks(trained, 1, folder, overrides, stop_at)[0]


def make_run(folder: Path) -> None:
    """A run of four steps that was stopped after two."""
    rng = np.random.default_rng(3)
    for name in "ab":
        write_token_file(folder / name, [rng.integers(1, 64, size).tolist() for size in rng.integers(5, 40, 30)])
    write_tokenizer(folder / "one", list(range(64)))
    write_tokenizer(folder / "two", list(range(63, -1, -1)))
    (folder / "run.yaml").write_text(RUN.format(folder=folder))
    assert train(folder, stop_at=STOPPED_AT) == ""
    assert (folder / "run/checkpoints/latest_checkpointed_iteration.txt").read_text().strip() == str(STOPPED_AT)


def go_on(folder: Path, *overrides: str) -> Outcome:
    """A copy of the run, gone on with."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / "run/checkpoints", copy / "checkpoints")
    refusal = train(folder, *(text.replace("FOLDER", str(folder)) for text in overrides), f"run_dir={copy}")
    if refusal:
        return Outcome(refusal=refusal)
    records = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (copy / "events.jsonl").read_text().splitlines()]
    said = [text for event in events if event["event"] == "settings_changed" for text in event["changed"]]
    last = [next(r[name] for r in reversed(records) if name in r) for name in ("train/loss", "eval/loss")]
    return Outcome(tuple(said), (last[0], last[1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("changes")
    make_run(made)
    return made


@pytest.fixture(scope="module")
def unchanged(folder: Path) -> Outcome:
    return go_on(folder)


def test_an_unchanged_run_file_says_nothing(unchanged: Outcome) -> None:
    assert unchanged.said == () and not unchanged.refusal


REFUSED_BY_ITSELF = ("model.qk_norm", "model.qk_norm_over_heads", "model.value_head")
"""Fields that exclude each other, or that are refused before a run is looked at."""
ALONE = ("optim.schedule", "optim.warmup_steps")
TOGETHER = (
    [name for name in REFUSED if name.startswith("model.") and name not in REFUSED_BY_ITSELF],
    [name for name in NOTICED if name.startswith("model.")],
    ["seed", "data.train", "data.tokenizer", "data.seq_length_tokens", "data.packing", "data.eval_fraction"],
    ["data.eval", "train.eval_samples", "train.rampup", "train.precision", *WITHOUT_EFFECT.keys() - {"adapter.load"}],
    [name for name in NOTICED if name.startswith("optim.") and name not in ALONE],
    ["train.global_batch_size", "train.steps", "train.label_smoothing", "train.z_loss"],
    *([name] for name in ALONE),
)
"""Changes that are made together by default; ``make test-all`` makes each alone."""


@pytest.mark.parametrize("names", TOGETHER, ids=lambda names: names[0])
def test_every_change_is_named(folder: Path, names: list[str]) -> None:
    """A refusal says "model.x is 3 there and 2 here", a notice "x 2 → 3"."""
    changes = REFUSED | NOTICED
    outcome = go_on(folder, *(f"{name}={changes[name]}" for name in names))
    text = outcome.refusal or "\n".join(outcome.said)
    assert bool(outcome.refusal) == (names[0] in REFUSED)
    for name in names:
        name = name.replace("head_dim", "kv_channels")
        assert f"{name} is " in text if outcome.refusal else f"{name} " in text, (name, text)


def test_warm_up_as_a_share_is_named(folder: Path) -> None:
    outcome = go_on(folder, "optim.warmup_steps=0", "optim.warmup_fraction=0.5")
    assert any("optim.warmup_fraction none → 0.5" in text for text in outcome.said), outcome


def test_changes_that_are_not_said_change_no_loss(folder: Path, unchanged: Outcome) -> None:
    outcome = go_on(folder, *(f"{name}={value}" for name, value in ONE_RESULT.items()))
    assert outcome.said == () and not outcome.refusal
    assert outcome.losses == pytest.approx(unchanged.losses, abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_a_change_that_cannot_be_followed_is_refused(folder: Path, name: str) -> None:
    assert go_on(folder, f"{name}={REFUSED[name]}").refusal


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTICED)
def test_a_change_that_matters_is_said(folder: Path, name: str) -> None:
    outcome = go_on(folder, f"{name}={NOTICED[name]}")
    assert not outcome.refusal
    assert any(f"{name} " in text and "→" in text for text in outcome.said), outcome.said


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_RESULT)
def test_a_change_that_is_not_said_changes_no_loss(folder: Path, unchanged: Outcome, name: str) -> None:
    outcome = go_on(folder, f"{name}={ONE_RESULT[name]}")
    assert outcome.said == () and not outcome.refusal
    assert outcome.losses == pytest.approx(unchanged.losses, abs=2e-6)


def test_a_replaced_token_file_is_said(folder: Path, tmp_path: Path) -> None:
    other = write_token_file(tmp_path / "a", [[5] * 40] * 30)
    kept = {ending: (folder / f"a{ending}").read_bytes() for ending in (".bin", ".idx")}
    try:
        for ending in kept:
            shutil.copy(f"{other}{ending}", folder / f"a{ending}")
        assert TokenFile(str(folder / "a")).num_tokens == 1200
        outcome = go_on(folder)
    finally:
        for ending, content in kept.items():
            (folder / f"a{ending}").write_bytes(content)
    assert any("its file was replaced" in text for text in outcome.said), outcome.said


def test_the_runs_own_folder_as_the_place_to_load_from(folder: Path, unchanged: Outcome) -> None:
    """Megatron-LM's ``--save RUN --load RUN``, where the first start finds nothing."""
    load = f"checkpoint.load={folder / 'copy'}"
    assert go_on(folder, load) == unchanged
    notices: list[str] = []
    config = load_config(folder / "run.yaml", [f"run_dir={folder}/absent", f"checkpoint.load={folder}/absent"])
    assert preflight(config, 1, notices.append).checkpoint.load is None
    assert any("a run goes on by itself" in text for text in notices)


def test_what_is_scored_otherwise_is_said_by_a_run_that_scores(folder: Path) -> None:
    def config(*overrides: str) -> RunConfig:
        return load_config(folder / "run.yaml", overrides, notice=lambda _: None)

    for name, value in SCORED.items():
        tasks = "evaluate.tasks=[boolq]"
        (said,) = changed_fields(config(tasks), config(tasks, f"{name}={value}"), STOPPED_AT)
        assert said.startswith(f"{name} ") and "scores of tasks" in said
        assert changed_fields(config(), config(f"{name}={value}"), STOPPED_AT) == []
    assert changed_fields(config(), config("evaluate.tasks=[boolq]", "evaluate.interval_steps=1"), STOPPED_AT) == []


def test_every_field_of_data_model_optim_train_and_evaluate_is_tried() -> None:
    fields = {
        ".".join(doc.name.split(".")[:2])
        for doc in describe_fields()
        if doc.name.split(".")[0] in ("data", "model", "optim", "train", "evaluate") and "." in doc.name
    }
    assert fields <= {*REFUSED, *NOTICED, *ONE_RESULT, *SCORED, *SCORED_ALIKE, *NOT_TRIED}
    said = {name for name in (*MEANINGS, *RATE, *WITHOUT_EFFECT) if name.split(".")[0] not in ("chat", "adapter")}
    assert said <= {*NOTICED, *SCORED, *NOT_TRIED}


def rows(folder: Path) -> Iterator[str]:
    """One line of the table for each change."""
    unchanged = go_on(folder)
    for kind, changes in (("refused", REFUSED), ("noticed", NOTICED), ("no effect", ONE_RESULT)):
        for name, value in changes.items():
            outcome = go_on(folder, f"{name}={value}")
            found = "refused" if outcome.refusal else "noticed" if outcome.said else "no effect"
            assert found == kind, (name, outcome)
            text = outcome.refusal or "; ".join(outcome.said)
            if found == "no effect":
                worst = max(abs(a - b) for a, b in zip(outcome.losses, unchanged.losses))
                text = f"losses differ by {worst:.0e}" if worst else "losses equal to the last digit"
            shown = text.replace(str(folder), "FOLDER").replace("\n", " ").replace("|", "/")
            yield f"| `{name}={value}` | {found} | {shown} |"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        make_run(Path(made))
        head = "# Changes of a run file at resume\n\n| change | result | what is said |\n| --- | --- | --- |\n"
        Path(sys.argv[1]).write_text(head + "\n".join(rows(Path(made))) + "\n", encoding="utf-8")
