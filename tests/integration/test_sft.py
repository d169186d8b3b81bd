"""Supervised fine-tuning from a file of conversations to a model that answers and stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import four_digits
from tests.support.commands import assert_refused, events, llm_parallel, losses, read_records, train_in_ranks
from tests.support.harness import run_ranks

HELD_OUT = 200


def write_run(folder: Path, **sections: dict[str, Any]) -> Path:
    """A run file of the four-digit task."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = four_digits.write_tokenizer(folder / "tokenizer")
    tree: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "device": "cpu",
        "method": {"kind": "sft"},
        "model": four_digits.MODEL,
        "data": {"tokenizer": str(tokenizer), "seq_length_tokens": 208},
        "chat": {"train": [str(folder / "train.jsonl")], "eval_fraction": 0.02, "answer_tokens": 6, "show_answers": 2},
        "train": {
            "global_batch_size": 16, "micro_batch_size": 8, "steps": 6, "eval_samples": 8, "threads_per_process": 1
        },
        "optim": {"lr": 5e-3, "min_lr": 5e-4, "schedule": "linear", "warmup_steps": 2, "weight_decay": 0.0},
        "log": {"tensorboard": False, "plots": False},
    }  # fmt: skip
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., Path]:
    """Writes so many conversations and a run file over them."""

    def write(count: int, **sections: dict[str, Any]) -> Path:
        four_digits.write_conversations(tmp_path / "train.jsonl", count)
        return write_run(tmp_path, **sections)

    return write


def answered(rank: int, world_size: int, run_dir: str) -> tuple[float, float]:
    """Shares of held-out questions whose sampled answer stops in time, and is right."""
    from llm_parallel.generate.decode import generate
    from llm_parallel.generate.load import load_model
    from llm_parallel.generate.sampling import Sampling

    asked = list(islice(four_digits.problems(99, held_out=True), HELD_OUT))
    prompts = [four_digits.prompt_tokens(a, b) for a, b in asked]
    sampling = Sampling(max_new_tokens=four_digits.ANSWER_TOKENS, temperature=1.0, seed=5)
    loaded = load_model(run_dir, device="cpu")
    found = generate(loaded.network, prompts, sampling, {four_digits.END})
    assert loaded.tokenizer is not None
    texts = [loaded.tokenizer.decode(tokens) for tokens in found]
    right = [text == four_digits.right_answer(a, b) for text, (a, b) in zip(texts, asked)]
    stopped = [len(tokens) < four_digits.ANSWER_TOKENS for tokens in found]
    return sum(stopped) / HELD_OUT, sum(right) / HELD_OUT


def exported_answers(rank: int, world_size: int, run_dir: str, target: str) -> bool:
    """Whether transformers, with nothing but the exported folder, writes the prompt that the model was trained on, and
    stops by itself with the answers of ``generate``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llm_parallel.convert.export import export_to_hf
    from llm_parallel.generate.decode import generate
    from llm_parallel.generate.load import load_model
    from llm_parallel.generate.sampling import Sampling

    export_to_hf(run_dir, target)
    tokenizer, model = AutoTokenizer.from_pretrained(target), AutoModelForCausalLM.from_pretrained(target)
    loaded = load_model(run_dir, device="cpu")
    for a, b in islice(four_digits.problems(3, held_out=True), 5):
        turn = [{"role": "user", "content": four_digits.question(a, b)}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        assert prompt == four_digits.prompt_tokens(a, b)
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
        ours = generate(loaded.network, [prompt], Sampling(max_new_tokens=20), {four_digits.END})[0]
        assert theirs == [*ours, four_digits.END] or theirs == ours, (theirs, ours)
        assert theirs[-1] == four_digits.END and len(theirs) < 20
    return True


def test_a_small_model_learns_to_stop(task: Callable[..., Path], tmp_path: Path) -> None:
    run_file = task(9000, train={"steps": 130, "eval_interval_steps": 65}, optim={"warmup_steps": 20})
    assert train_in_ranks(run_file, 1) == [130]
    stopped, _ = run_ranks(answered, 1, str(tmp_path / "run"))[0]
    assert stopped >= 0.99
    assert run_ranks(exported_answers, 1, str(tmp_path / "run"), str(tmp_path / "hf"))[0]
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    answers = [record for record in records if record.get("event") == "answer"]
    assert [(record["step"], record["stopped"]) for record in answers[-2:]] == [(130, True)] * 2
    epochs = [record["train/epoch"] for record in records if "train/epoch" in record]
    assert epochs == sorted(epochs) and 2.2 < epochs[-1] < 3.0


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"tp": 2, "pp": 2}], ids=["1 process", "TP2 PP2"])
def test_the_form_is_learned_and_the_annotators_errors_too(
    task: Callable[..., Path], tmp_path: Path, layout: dict[str, int]
) -> None:
    settings = {"steps": 360, "global_batch_size": 13, "micro_batch_size": 13}
    run_file = task(46000, train=settings, optim={"warmup_steps": 20}, parallel=layout)
    train_in_ranks(run_file, 4 if layout else 1)
    stopped, right = run_ranks(answered, 1, str(tmp_path / "run"))[0]
    assert stopped >= 0.99 and 0.2 < right < 0.45, (stopped, right)


def test_layouts_and_restarts_change_no_loss(task: Callable[..., Path], tmp_path: Path) -> None:
    """Two sources with weights, packed; the run stops after step 3 and goes on under another layout."""
    other = four_digits.write_conversations(tmp_path / "other.jsonl", 300, seed=7)
    sources = [{"path": str(tmp_path / "train.jsonl"), "weight": 2}, {"path": str(other), "weight": 0.5}]
    run_file = task(200, chat={"train": sources}, train={"steps": 6, "eval_interval_steps": 3})
    train_in_ranks(run_file, 1, f"run_dir={tmp_path}/alone")
    train_in_ranks(run_file, 4, f"run_dir={tmp_path}/other", "parallel.tp=2", "parallel.cp=2", stop_at=3)
    train_in_ranks(run_file, 2, f"run_dir={tmp_path}/other", "parallel.pp=2", "parallel.vpp=1")
    alone, other_losses = losses(tmp_path / "alone"), losses(tmp_path / "other")
    assert list(alone) == list(other_losses) == list(range(1, 7))
    assert list(other_losses.values()) == pytest.approx(list(alone.values()), abs=2e-6)
    last = [read_records(tmp_path / name / "metrics.jsonl")[-4:] for name in ("alone", "other")]
    by_source = [
        {key: value for record in part for key, value in record.items() if key.startswith("eval/loss/")}
        for part in last
    ]
    assert set(by_source[0]) == {"eval/loss/train", "eval/loss/other"}
    assert by_source[1] == pytest.approx(by_source[0], abs=5e-6)


RESUMED: dict[str, dict[str, dict[str, Any]]] = {
    "padded": {"chat": {"packing": "pad"}},
    "LoRA": {"adapter": {"rank": 4}},
    "LoRA, padded": {"adapter": {"rank": 4}, "chat": {"packing": "pad"}},
    "QLoRA, NF4": {"adapter": {"rank": 4, "base": "nf4"}},
    "DoRA on int8": {"adapter": {"rank": 4, "base": "int8", "dora": True}},
}


@pytest.mark.slow
@pytest.mark.parametrize("sections", RESUMED.values(), ids=RESUMED)
def test_adapters_and_padded_rows_go_on_in_other_layouts(
    sections: dict[str, dict[str, Any]], task: Callable[..., Path], tmp_path: Path
) -> None:
    """One run in three layouts, one after the other, which are those of different axes."""
    short = {"show_answers": 0, "eval_fraction": 0.0}
    first = task(200, chat=short, train={"steps": 2}, optim={"warmup_steps": 0})
    train_in_ranks(first, 1, f"run_dir={tmp_path}/base")
    sections = {**sections, "chat": {**short, **sections.get("chat", {})}}
    run_file = task(200, checkpoint={"load": str(tmp_path / "base")}, **sections)
    train_in_ranks(run_file, 1, f"run_dir={tmp_path}/alone")
    other = f"run_dir={tmp_path}/other"
    train_in_ranks(run_file, 4, other, "parallel.tp=2", "parallel.pp=2", "train.micro_batch_size=2", stop_at=2)
    train_in_ranks(run_file, 4, other, "parallel.cp=2", "parallel.dp=2", "train.micro_batch_size=4", stop_at=4)
    train_in_ranks(run_file, 2, other, "parallel.tp=2", "parallel.sequence_parallel=false")
    alone, found = losses(tmp_path / "alone"), losses(tmp_path / "other")
    assert list(alone) == list(found) == list(range(1, 7))
    assert list(found.values()) == pytest.approx(list(alone.values()), abs=3e-6)


def test_the_command_says_what_it_does(task: Callable[..., Path], tmp_path: Path) -> None:
    run_file = task(300, train={"epochs": 1.5, "steps": 9})
    result = llm_parallel("sft", run_file)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "300 conversations of 300 records (300 as messages)" in result.stderr
    assert "train.steps = 9 is replaced by" in result.stderr
    assert "epochs" in result.stdout and "is answered" in result.stdout
    again = llm_parallel("sft", tmp_path / "run" / "config.yaml")
    assert again.returncode == 0 and "is finished" in again.stdout, again.stderr


def test_held_out_loss_that_no_longer_falls_ends_the_run(task: Callable[..., Path], tmp_path: Path) -> None:
    wanted = {"steps": 40, "eval_interval_steps": 1, "early_stop_evaluations": 2}
    run_file = task(200, train=wanted, optim={"lr": 1.0, "warmup_steps": 0})
    steps = train_in_ranks(run_file, 2, "parallel.dp=2")
    assert steps[0] == steps[1] < 40
    assert [event["step"] for event in events(tmp_path / "run", "early_stop")] == [steps[0]]
    assert train_in_ranks(run_file, 1) == steps[:1], "a run that has ended makes no more steps"


def test_bad_input_is_one_sentence(task: Callable[..., Path], tmp_path: Path) -> None:
    run_file = task(20)
    for words, overrides in (
        (("chat.train.0.path", "does not exist"), ["chat.train=[gone.jsonl]"]),
        (("chat.train is empty",), ["chat.train=[]"]),
        (("data.tokenizer",), ["data.tokenizer=null"]),
        (("chat.template", "cannot be read"), ["chat.template=gone.jinja"]),
        (("data.seq_length_tokens = 3",), ["data.seq_length_tokens=3", "chat.too_long=drop"]),
        (("data.train", "llm-parallel pretrain"), ["data.train=[tokens]"]),
    ):
        assert_refused(llm_parallel("sft", run_file, *overrides, f"run_dir={tmp_path}/x"), *words)
    assert_refused(llm_parallel("pretrain", run_file), "method.kind = sft", "llm-parallel sft")


def test_pretrained_weights_are_taken_without_their_step(task: Callable[..., Path], tmp_path: Path) -> None:
    """Fine-tuning from a checkpoint of a run begins at step 0 with its weights, sizes and tokenizer."""
    run_file = task(100, train={"steps": 2}, optim={"warmup_steps": 0})
    train_in_ranks(run_file, 1)
    tree = yaml.safe_load(run_file.read_text())
    del tree["model"], tree["data"]["tokenizer"]
    second = tmp_path / "second.yaml"
    second.write_text(yaml.safe_dump({**tree, "run_dir": str(tmp_path / "second")}))
    assert train_in_ranks(second, 1, f"checkpoint.load={tmp_path}/run") == [2]
    first, after = losses(tmp_path / "run"), losses(tmp_path / "second")
    assert list(after) == [1, 2] and after[1] < first[2] + 0.05
    saved = yaml.safe_load((tmp_path / "second" / "checkpoints" / "iter_0000002" / "config.yaml").read_text())
    assert saved["model"]["hidden_size"] == 64 and saved["checkpoint"]["load_optimizer"] is False
    assert json.loads((tmp_path / "second/checkpoints/iter_0000002/train_state.json").read_text())["step"] == 2
