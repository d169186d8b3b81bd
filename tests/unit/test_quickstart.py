"""The quickstart's run files are valid on every machine, its conversations are right, the same for the same seed, and
divided so that held-out questions are new, and what it says about the answers is counted rightly."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from llm_parallel.checkpoint.folders import COMPLETE
from llm_parallel.command_help import COMMANDS
from llm_parallel.config.load import load_config
from llm_parallel.config.rules import num_processes
from llm_parallel.quickstart import next_commands, run_tree
from llm_parallel.quickstart_assistant import Asked, begin_from, chat_tree, report_answers
from llm_parallel.quickstart_chat import (
    HELP,
    KINDS,
    MODULES,
    NUMBERS,
    THANKS,
    Conversation,
    divided,
    write_conversations,
)


@pytest.mark.parametrize(
    ("gpus", "processes", "layout"), [(0, 4, (2, 2)), (1, 1, (1, 1)), (2, 2, (2, 1)), (4, 4, (2, 2)), (8, 8, (2, 2))]
)
def test_the_run_file_fits_the_machine(tmp_path: Path, gpus: int, processes: int, layout: tuple[int, int]) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(run_tree(tmp_path, gpus)))
    config = load_config(run_file, [])
    assert num_processes(config) == processes and (config.parallel.tp, config.parallel.pp) == layout
    assert config.train.precision == ("bf16" if gpus else "fp32")
    replica = config.train.micro_batch_size * (config.parallel.dp or 1)
    assert config.train.global_batch_size % replica == 0
    chat_file = tmp_path / "chat.yaml"
    chat_file.write_text(yaml.safe_dump(chat_tree(tmp_path, config, steps=3)))
    chat = load_config(chat_file, [])
    assert chat.trains == "sft" and chat.checkpoint.load == config.run_dir and chat.run_dir != config.run_dir
    assert (chat.parallel, chat.train.precision) == (config.parallel, config.train.precision)
    assert chat.train.global_batch_size == config.train.global_batch_size
    assert chat.train.eval_interval_steps == 3 and chat.optim.warmup_steps < 3


def test_the_fine_tuning_follows_overrides_of_the_pretraining(tmp_path: Path) -> None:
    run_file, chat_file = tmp_path / "run.yaml", tmp_path / "chat.yaml"
    run_file.write_text(yaml.safe_dump(run_tree(tmp_path, 0)))
    overrides = [
        "parallel.pp=1",
        "parallel.cp=2",
        "train.micro_batch_size=2",
        "device=cpu",
        f"run_dir={tmp_path}/other",
    ]
    chat_file.write_text(yaml.safe_dump(chat_tree(tmp_path, load_config(run_file, overrides), steps=400)))
    chat = load_config(chat_file, [])
    assert (chat.parallel.tp, chat.parallel.pp, chat.parallel.cp, chat.device) == (2, 1, 2, "cpu")
    assert (chat.train.micro_batch_size, chat.checkpoint.load) == (2, f"{tmp_path}/other")


@pytest.mark.parametrize("chat", [True, False])
def test_the_next_commands_stand_under_what_they_do(tmp_path: Path, chat: bool) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(run_tree(tmp_path, 0)))
    lines = next_commands(tmp_path, run_file, tmp_path / "run", chat).splitlines()
    titles, commands = lines[::2], lines[1::2]
    assert len(titles) == len(commands) == (7 if chat else 5)
    assert all(line.startswith("  # ") for line in titles)
    assert all(line.split()[0].endswith("llm-parallel") and line.split()[1] in COMMANDS for line in commands)
    assert any(f"train.steps={2 * load_config(run_file, []).train.steps}" in line for line in commands)
    assert any("--chat --prompt" in line for line in commands) == chat


def test_the_next_commands_can_be_typed_whatever_the_folder_is_called(tmp_path: Path) -> None:
    folder = tmp_path / "my runs; echo"
    folder.mkdir()
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(run_tree(folder, 0)))
    commands = [shlex.split(line) for line in next_commands(folder, run_file, folder / "run", True).splitlines()[1::2]]
    assert sum(str(run_file) in words for words in commands) == 2
    assert str(folder / "chat") in commands[0] and str(folder / "hf") in commands[-2]
    assert f"run_dir={tmp_path / 'mine'}-run" in commands[3]


def test_right_answers_are_counted_to_the_letter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        Asked("count", "How many?", "Two.", "Two.", True),
        Asked("count", "How many now?", "Two.", "Two.", False),
        Asked("sort", "Sort!", "1, 2", "1, 2, 3", True),
        Asked("module", "What?", "It does.", " It does.", True),
    ]
    assert report_answers(tmp_path, asked) == "2 of 4 held-out questions right (50.0%)"
    said = capsys.readouterr().out
    assert "3 of 4 answers ended" in said and "count 1/2, module 1/1, sort 0/1" in said
    assert "Sort!\n    1, 2, 3   (right would be: 1, 2)" in said and "How many now?" not in said
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["right"], summary["stopped"], len(summary["answers"])) == (2, 3, 4)


def test_an_assistant_of_an_older_model_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin_from(tmp_path, 600)
    folder = tmp_path / "checkpoints" / "iter_0000400"
    folder.mkdir(parents=True)
    for name in COMPLETE:
        (folder / name).write_text("")
    begin_from(tmp_path, 600)
    assert capsys.readouterr().err == ""
    begin_from(tmp_path, 1200)
    begin_from(tmp_path, 1200)
    said = capsys.readouterr().err
    assert said.count("step 600") == 2 and "step 1200" in said and f"remove {tmp_path}" in said


def right(question: str, answer: str) -> bool:
    """Whether an answer is right, worked out from the question's text."""
    asked, _, rest = question.partition(": ") if ": " in question else question.partition("? ")
    items = re.findall(r"\w+", rest)
    if question in dict(THANKS):
        return answer == dict(THANKS)[question]
    if asked in ("Repeat", "Say this again", "Copy these words"):
        return answer == rest
    if asked in ("How many words are there", "Count the words", "How long is this list"):
        return NUMBERS.index(answer.rstrip(".").lower()) == len(items)
    if "first" in asked or "last" in asked:
        return answer.split()[-1] == f"{items[0 if 'first' in asked else -1]}."
    if asked in ("Sort these numbers", "Put in order"):
        return answer.split(", ") == sorted(items)
    if "after" in question or "follows" in question:
        return int(answer.rstrip(".")) == int(re.findall(r"\d+", question)[-1]) + 1
    if answer.startswith("Hello! "):
        return HELP in answer or "small model" in answer
    named = re.search(r"(?:The module|import) (\w+)", answer)
    assert named is not None, (question, answer)
    return named[1] in question or MODULES[named[1]] in question


def turns(part: list[Conversation]) -> list[tuple[str, str]]:
    return [(one.turns[n], one.turns[n + 1]) for one in part for n in range(0, len(one.turns), 2)]


def test_every_answer_is_right_and_held_out_questions_are_new() -> None:
    train, held_out = divided(2000, 150, seed=3)
    assert (len(train), len(held_out)) == (2000, 150)
    assert {one.kind for one in train} == {one.kind for one in held_out} == set(KINDS)
    assert [pair for pair in turns(train + held_out) if not right(*pair)] == []
    asked = {question for question, _ in turns(train)}
    assert not asked & {one.turns[0] for one in held_out}
    assert len({one.turns[0] for one in held_out}) == 150
    assert max(len(text) for one in train for text in one.turns) < 130
    assert 0.1 < sum(len(one.turns) > 2 for one in train) / len(train) < 0.3


def test_a_seed_says_which_conversations(tmp_path: Path) -> None:
    first, second = divided(50, 10, seed=1), divided(50, 10, seed=1)
    assert first == second and divided(50, 10, seed=2) != first
    train, held_out = write_conversations(tmp_path, 50, 10, seed=1)
    for path, part in ((train, first[0]), (held_out, first[1])):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [list(line) for line in lines] == [["messages"]] * len(part)
        assert [message["content"] for line in lines for message in line["messages"]] == [
            text for one in part for text in one.turns
        ]
        assert [message["role"] for message in lines[0]["messages"]][:2] == ["user", "assistant"]
