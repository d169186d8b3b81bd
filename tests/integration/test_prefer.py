"""Training by preferences: the same losses in every layout and after a restart, references, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import four_digits
from tests.support.commands import events, losses, read_records, train_in_ranks
from tests.support.harness import run_ranks
from tests.support.in_process import in_process

pytestmark = pytest.mark.gloo
LENGTH, PAIRS = 96, 60


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of fine-tuning of a few steps, and preferences."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = four_digits.write_tokenizer(folder / "tokenizer")
    four_digits.write_conversations(folder / "train.jsonl", 200)
    four_digits.write_preferences(folder / "pairs.jsonl", PAIRS)
    tree = {
        "run_dir": str(folder / "run"), "device": "cpu", "method": {"kind": "sft"},
        "model": {**four_digits.MODEL, "num_layers": 4},
        "data": {"tokenizer": str(tokenizer), "seq_length_tokens": LENGTH},
        "chat": {"train": [str(folder / "train.jsonl")], "show_answers": 0},
        "train": {"global_batch_size": 8, "micro_batch_size": 8, "steps": 12, "eval_samples": 2,
                  "threads_per_process": 1},
        "optim": {"lr": 5e-3, "schedule": "constant", "weight_decay": 0.0},
        "log": {"tensorboard": False, "plots": False},
    }  # fmt: skip
    (folder / "sft.yaml").write_text(yaml.safe_dump(tree))
    train_in_ranks(folder / "sft.yaml", 1)
    return folder


@pytest.fixture
def task(start: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a run file of a method over the preferences."""
    return partial(write_run, start, tmp_path)


def write_run(start: Path, folder: Path, kind: str, name: str = "run", **sections: dict[str, Any]) -> Path:
    tree: dict[str, Any] = {
        "run_dir": str(folder / name), "device": "cpu", "method": {"kind": kind},
        "checkpoint": {"load": str(start / "run")},
        "data": {"seq_length_tokens": LENGTH},
        "chat": {"train": [str(start / "pairs.jsonl")], "eval_fraction": 0.1},
        "train": {"global_batch_size": 8, "micro_batch_size": 2, "steps": 4, "eval_interval_steps": 2,
                  "eval_samples": 4, "threads_per_process": 1},
        "optim": {"lr": 1e-3, "schedule": "constant", "weight_decay": 0.0},
        "log": {"tensorboard": False, "plots": False},
    }  # fmt: skip
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def held_out(run_dir: Path) -> list[dict[str, float]]:
    return [record for record in read_records(run_dir / "metrics.jsonl") if "eval/loss" in record]


LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "dpo": ("dpo", 4, {"tp": 2, "pp": 2}),
    "kto": ("kto", 4, {"cp": 2, "dp": 2}),
    "rrhf": ("rrhf", 2, {"pp": 2, "vpp": 2}),
    "reward": ("reward", 4, {"tp": 2, "pp": 2}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "kto" else [pytest.mark.slow]) for name in LAYOUTS]
)
def test_a_layout_and_a_restart_give_the_losses_of_one_process(
    name: str, task: Callable[..., Path], tmp_path: Path
) -> None:
    kind, processes, layout = LAYOUTS[name]
    assert train_in_ranks(task(kind, "alone"), 1) == [4]
    run_file = task(kind, "many", parallel=layout)
    assert train_in_ranks(run_file, processes, stop_at=2) == [2] * processes
    assert train_in_ranks(run_file, processes) == [4] * processes
    alone, many = tmp_path / "alone", tmp_path / "many"
    assert losses(many) == pytest.approx(losses(alone), abs=1e-5)
    first, last = losses(alone)[1], losses(alone)[4]
    assert last < first
    records = [record for record in read_records(alone / "metrics.jsonl") if "train/loss" in record]
    wanted = {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"}
    assert wanted <= {key.removeprefix("train/") for key in records[0]} or kind in ("rrhf", "reward")
    if kind == "dpo":
        assert first == pytest.approx(math.log(2), abs=1e-5)
        assert records[0]["train/rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    if kind == "kto":
        assert first == pytest.approx(0.5, abs=1e-5) and records[-1]["train/kl"] >= 0
    else:
        assert records[-1]["train/rewards/margins"] > records[0]["train/rewards/margins"]
    unit = {"dpo": "pairs", "reward": "pairs", "kto": "documents", "rrhf": "groups"}[kind]
    (*_, one), (*_, other) = held_out(alone), held_out(many)
    assert one[f"eval/{unit}"] == other[f"eval/{unit}"] == (12 if kind == "kto" else 6)
    assert one["eval/loss"] == pytest.approx(other["eval/loss"], abs=1e-5) and "eval/ppl" not in one
    if kind in ("dpo", "kto"):
        assert len(events(many, "scored")) == 1, "a run that goes on uses what it computed"


@pytest.mark.slow
def test_log_probabilities_are_computed_once_for_all_runs(task: Callable[..., Path], tmp_path: Path) -> None:
    """Another run over the same data finds the file, in another layout too; one in memory has the same losses; a file
    that is damaged is computed anew, and one of another model is not taken."""
    shared = {"reference": {"folder": str(tmp_path / "scores")}}
    for name, processes, parallel in (("first", 1, {}), ("second", 2, {"tp": 2})):
        train_in_ranks(task("dpo", name, method={"kind": "dpo"} | shared, parallel=parallel), processes)
    assert [len(events(tmp_path / name, "scored")) for name in ("first", "second")] == [1, 0]
    assert losses(tmp_path / "second") == pytest.approx(losses(tmp_path / "first"), abs=1e-5)
    memory = {"kind": "dpo", "reference": {"keep": "memory"}}
    train_in_ranks(task("dpo", "memory", method=memory, parallel={"pp": 2}), 2)
    assert losses(tmp_path / "memory") == pytest.approx(losses(tmp_path / "first"), abs=1e-5)
    assert not (tmp_path / "memory" / "reference.json").exists()
    (scores,) = (tmp_path / "scores").glob("*.logps")
    whole = scores.read_bytes()
    scores.write_bytes(whole[:-4] + b"\0\0\0\0")
    other = {"kind": "dpo", "reference": {**shared["reference"], "load": str(tmp_path / "second")}}
    train_in_ranks(task("dpo", "third", method={"kind": "dpo"} | shared), 1)
    train_in_ranks(task("dpo", "fourth", method=other), 1)
    assert [len(events(tmp_path / name, "scored")) for name in ("third", "fourth")] == [1, 1]
    assert scores.read_bytes() == whole and len(list((tmp_path / "scores").glob("*.logps"))) == 2
    assert losses(tmp_path / "fourth")[1] > losses(tmp_path / "first")[1], "the better model is the reference"


@pytest.mark.slow
def test_the_reference_of_adapters_is_the_model_without_them(task: Callable[..., Path], tmp_path: Path) -> None:
    adapter: dict[str, Any] = {"adapter": {"rank": 4}}
    for kind, processes, parallel in (("dpo", 1, {}), ("kto", 2, {"tp": 2})):
        for keep in ("file", "memory"):
            method = {"kind": kind, "reference": {"keep": keep}}
            run_file = task(kind, f"{kind}-{keep}", method=method, parallel=parallel, **adapter)
            assert train_in_ranks(run_file, processes) == [4] * processes
        found = losses(tmp_path / f"{kind}-memory")
        assert found == pytest.approx(losses(tmp_path / f"{kind}-file"), abs=1e-5)
        assert found[1] == pytest.approx(math.log(2) if kind == "dpo" else 0.5, abs=1e-5) and found[4] < found[1]


def interrupted_scores(rank: int, world_size: int, run_file: str) -> tuple[list[float], list[int]]:
    """The numbers of a scoring that failed half way and went on, and the micro batches of each attempt."""
    from llm_parallel.config.load import load_config
    from llm_parallel.train import open as opening
    from llm_parallel.train.preflight import preflight
    from llm_parallel.train.run import Place
    from llm_parallel.train.watch import Watch
    from llm_parallel.tune import prefer, score

    score.BLOCK = 1
    config = preflight(load_config(run_file, [], notice=lambda _: None), world_size)
    run = opening.open_run(config, Place(rank, world_size, rank), lambda: False, Watch(), prefer.PREFER)
    data, made = prefer.preferences(config), [0]

    def count() -> None:
        made[-1] += 1
        if len(made) == 1 and made[0] == 4:
            raise ConnectionError("a process died")

    run.engine.network.before_micro_batch.append(count)
    try:
        prefer.scored(run, data)
    except ConnectionError:
        made.append(0)
    found = prefer.scored(run, data).reference
    assert found is not None
    return found.tolist(), made


def test_a_scoring_that_was_interrupted_goes_on(task: Callable[..., Path], tmp_path: Path) -> None:
    """And rows that are cut to their answers have the numbers of packed ones."""
    run_file = task("kto", "interrupted", chat={"packing": "pad"})
    scores, (first, second) = run_ranks(interrupted_scores, 1, str(run_file))[0]
    train_in_ranks(task("kto", "whole", train={"steps": 1}), 1)
    (whole,) = (tmp_path / "whole" / "data").glob("*.logps")
    import numpy as np

    expected = np.fromfile(whole, np.float32)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    samples = first + second
    assert first == 4 and second < samples - 2, (first, second)
    assert not list((tmp_path / "interrupted" / "data").glob("*.part*"))


def exported_values(rank: int, world_size: int, run_dir: str, folder: str, text: str) -> tuple[float, float]:
    """The value of an answer by transformers' class, from the exported folder, and by ours."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from llm_parallel.convert.export import export_to_hf
    from llm_parallel.generate.load import load_model
    from llm_parallel.parallel.groups import close_groups

    export_to_hf(run_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        wanted = float(theirs(ids).logits)
        found = float(load_model(run_dir, device="cpu", values=True).network.models[0](ids)[0, -1])
        close_groups(world=False)
        again = float(load_model(folder, device="cpu", values=True).network.models[0](ids)[0, -1])
    assert again == found
    return wanted, found


@pytest.mark.slow
def test_a_reward_model_is_a_sequence_classifier_of_transformers(task: Callable[..., Path], tmp_path: Path) -> None:
    train_in_ranks(task("reward", parallel={"tp": 2}), 2)
    text = "<|im_start|>user\n12+34<|im_end|>\n<|im_start|>assistant\n4321<|im_end|>"
    wanted, found = run_ranks(exported_values, 1, str(tmp_path / "run"), str(tmp_path / "hf"), text)[0]
    assert found == pytest.approx(wanted, abs=1e-5) and abs(found) > 1e-3
    result = in_process("generate", tmp_path / "run", "--prompt", "1", "--device", "cpu")
    assert result.returncode == 2 and "values answers" in result.stderr, result.stderr


BAD: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no kind": (["method.kind=null"], ("method.kind is not given", "dpo, kto, rrhf")),
    "another command's kind": (["method.kind=sft"], ("method.kind = sft", "llm-parallel prefer")),
    "no model to begin with": (["checkpoint.load=null", "model.vocab_size=16"], ("checkpoint.load", "is not given")),
    "no data": (["chat.train=[]"], ("chat.train is empty", "preferences")),
    "a file that is not there": (["chat.train=[gone.jsonl]"], ("chat.train.0.path", "file of preferences")),
    "smoothing of the likelihood": (["train.label_smoothing=0.1"], ("train.label_smoothing = 0.1", "method.kind")),
    "a denominator's loss": (["train.z_loss=1e-4"], ("train.z_loss", "method.kind = dpo")),
    "noise": (["chat.neftune_alpha=5"], ("chat.neftune_alpha = 5", "method.kind")),
    "another method's setting": (["method.kto.beta=0.5"], ("method.kto.beta = 0.5", "has no effect")),
    "a setting of another loss": (["method.dpo.gamma=1"], ("method.dpo.gamma = 1", "method.dpo.loss = sigmoid")),
    "smoothing of a hinge": (
        ["method.dpo.loss=hinge", "method.dpo.label_smoothing=0.1"], ("label_smoothing = 0.1", "loss = hinge")
    ),
    "too much smoothing": (["method.dpo.label_smoothing=0.5"], ("method.dpo.label_smoothing", "0.5")),
    "a loss that there is not": (["method.dpo.loss=cpo"], ("method.dpo.loss", "simpo")),
    "no beta": (["method.dpo.beta=0"], ("method.dpo.beta", "0")),
    "a reference of a method without one": (
        ["method.kind=rrhf", "method.reference.keep=memory"], ("method.reference.keep = memory", "rrhf")
    ),
    "a reference of a loss without one": (
        ["method.dpo.loss=orpo", "method.reference.load=x"], ("method.reference.load = x", "orpo has no reference")
    ),
    "a reference that is not there": (["method.reference.load=gone"], ("method.reference.load = gone", "not exist")),
    "files of a reference in memory": (
        ["method.reference.keep=memory", "method.reference.folder=x"], ("method.reference.folder", "keep = memory")
    ),
    "too short samples": (["data.seq_length_tokens=8"], ("60 do not fit data.seq_length_tokens = 8",)),
    "all held out": (["chat.eval_fraction=0.999"], ("holds all preferences out",)),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "words"), BAD.values(), ids=BAD)
def test_a_mistake_is_one_sentence(
    overrides: list[str], words: tuple[str, ...], task: Callable[..., Path], tmp_path: Path
) -> None:
    result = in_process("prefer", task("dpo"), *overrides, "--dry-run")
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(said) == 1, result.stderr
    for word in words:
        assert word in said[0], (word, said[0])
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_answers_that_were_all_liked_are_refused(task: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"prompt": str(n), "chosen": "1", "rejected": "1"} for n in range(4)]
    (tmp_path / "same.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = in_process("prefer", task("kto"), f"chat.train=[{tmp_path / 'same.jsonl'}]", "--dry-run")
    assert result.returncode == 2 and "answers that are all the same" in result.stderr


def test_a_dry_run_shows_what_will_be_compared(task: Callable[..., Path], tmp_path: Path) -> None:
    result = in_process("prefer", task("kto", train={"steps": 5, "epochs": 2}), "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "120 answers of 60 records (60 as preference)" in result.stderr
    assert "54 answers were liked and 54 not" in result.stderr
    assert "Preferences, as answers" in result.stdout and "are 2" in result.stdout
    wrong = in_process("sft", task("kto"), "--dry-run")
    assert wrong.returncode == 2 and "use `llm-parallel prefer`" in wrong.stderr


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    """Judgements of one person: the right answer of two is the best."""
    from llm_parallel.annotate.board import BoardOptions
    from llm_parallel.annotate.items import read_items, text_of
    from tests.support.annotating import board_of

    asked = list(islice(four_digits.problems(3), 24))
    rows = [
        {"prompt": four_digits.question(a, b),
         "responses": [four_digits.right_answer(a, b), four_digits.right_answer(a, b)[::-1] + "0"]}
        for a, b in asked
    ]  # fmt: skip
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = read_items(path)
    board = board_of(items, tmp_path / "answers.annotations.jsonl", BoardOptions("best"))
    right = {row["prompt"]: row["responses"][0] for row in rows}
    while (one := board.next("ann")) is not None:
        answers = [text_of(one.item.answers[place]) for place in board.order("ann", one)]
        board.judge("ann", one.id, [1 if text == right[one.item.prompt[0]["content"]] else 2 for text in answers])
    assert in_process("annotate", path, "--export").returncode == 0
    return tmp_path


TRAINED = {"dpo": "dpo", "reward": "dpo", "kto": "kto", "rrhf": "rrhf", "sft": "sft"}
"""The file that a method reads."""


@pytest.mark.parametrize("kind", TRAINED)
def test_judgements_of_people_are_read_as_they_are(kind: str, task: Callable[..., Path], annotated: Path) -> None:
    data = f"chat.train=[{annotated / f'answers.annotations.{TRAINED[kind]}.jsonl'}]"
    command = "sft" if kind == "sft" else "prefer"
    result = in_process(command, task(kind), data, "--dry-run")
    assert result.returncode == 0, result.stderr
    count, noun = {
        "kto": (48, "answers of 48"),
        "rrhf": (24, "rankings of 24"),
        "sft": (24, "conversations of 24"),
    }.get(kind, (24, "pairs of 24"))
    assert f"{count} {noun} records" in result.stderr, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINED)
def test_judgements_of_people_train(kind: str, task: Callable[..., Path], annotated: Path) -> None:
    path = str(annotated / f"answers.annotations.{TRAINED[kind]}.jsonl")
    run_file = task(kind, chat={"train": [path], "eval_fraction": 0.0}, train={"eval_interval_steps": None})
    assert train_in_ranks(run_file, 1) == [4]
    assert all(math.isfinite(loss) for loss in losses(annotated / "run"))
