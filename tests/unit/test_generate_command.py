"""What stands around the model in ``generate``: begin and end tokens, and the text that is printed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from llm_parallel.data.tokenizer import load_tokenizer, train_sentencepiece
from llm_parallel.generate import command

WORDS = ["<s>", "</s>", "<|end|>", "a", "hello", "world"]


def json_tokenizer(folder: Path, template: bool) -> Path:
    """A tokenizer.json whose template puts ``<s>`` before a text, or that has none."""
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(WORDS[:3])
    if template:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


@pytest.mark.parametrize(
    ("template", "add_bos", "expected"), [(True, None, [0]), (False, True, [0]), (False, False, []), (False, None, [])]
)
def test_the_begin_token_is_the_templates_or_the_configurations(
    template: bool, add_bos: bool | None, expected: list[int], tmp_path: Path
) -> None:
    folder = json_tokenizer(tmp_path, template)
    if add_bos is not None:
        config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": add_bos}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert command.prompt_prefix(load_tokenizer(folder), [folder]) == expected


@pytest.mark.parametrize(("named", "expected"), [([1, 2], {1, 2}), (2, {1, 2}), (None, {1}), ("2", {1})])
def test_all_end_tokens_end_an_answer(named: object, expected: set[int], tmp_path: Path) -> None:
    folder = json_tokenizer(tmp_path, False)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    assert command.end_tokens(load_tokenizer(folder), [folder]) == expected


def printed(monkeypatch: pytest.MonkeyPatch, capsys: Any, tokenizer: Any, prompts: list[str], answer: str) -> str:
    """What the command prints if the model goes on with the tokens that ``answer`` has behind each prompt."""
    config = SimpleNamespace(data=SimpleNamespace(tokenizer=tokenizer.name))
    groups = SimpleNamespace(platform=SimpleNamespace(device_name="CPU"))
    loaded = SimpleNamespace(models=[SimpleNamespace(groups=groups)], config=config, tokenizer=tokenizer)
    monkeypatch.setattr(command, "load_model", lambda *_: loaded)

    def generate(models: Any, numbers: list[list[int]], *_: Any) -> list[list[int]]:
        return [tokenizer.encode(prompt + answer)[len(tokenizer.encode(prompt)) :] for prompt in prompts]

    monkeypatch.setattr(command, "generate", generate)
    command.generate_command("folder", prompts)
    return capsys.readouterr().out


def test_the_space_between_prompt_and_answer_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    texts = ["the cat sat on the mat and the dog ran to the cat " * 20]
    tokenizer = load_tokenizer(train_sentencepiece(texts, 290, tmp_path))
    assert printed(monkeypatch, capsys, tokenizer, ["the cat"], " sat on the mat") == "the cat sat on the mat\n"


def test_answers_to_several_prompts_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    texts = ["the cat sat on the mat and the dog ran to the cat " * 20]
    tokenizer = load_tokenizer(train_sentencepiece(texts, 290, tmp_path))
    assert printed(monkeypatch, capsys, tokenizer, ["the cat", "the dog"], " ran") == (
        "--- prompt 1 of 2 ---\nthe cat ran\n\n--- prompt 2 of 2 ---\nthe dog ran\n"
    )
