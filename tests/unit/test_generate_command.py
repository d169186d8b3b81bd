"""What stands around the model in ``generate``: begin and end tokens, and the text that is printed."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from llm_parallel.config.tree import RunConfig
from llm_parallel.data.tokenizer import load_tokenizer, train_sentencepiece
from llm_parallel.errors import UserError
from llm_parallel.generate import command
from llm_parallel.generate.answer import Answer
from llm_parallel.generate.request import GenerateRequest
from llm_parallel.generate.sampling import Sampling
from llm_parallel.printable import CONTROL, printable
from llm_parallel.worker.command import after_run

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


def printed(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tokenizer: Any, prompts: list[str], answer: str, stop: Any = ()
) -> str:
    """What the command prints if the model goes on with the tokens that ``answer`` has behind each prompt."""
    config = SimpleNamespace(data=SimpleNamespace(tokenizer=tokenizer.name))
    groups = SimpleNamespace(platform=SimpleNamespace(device_name="CPU"))
    loaded = SimpleNamespace(models=[SimpleNamespace(groups=groups)], network=None, config=config, tokenizer=tokenizer)
    monkeypatch.setattr(command, "load_model", lambda *_, **__: loaded)

    def generate(models: Any, numbers: list[list[int]], sampling: Any, ends: Any, on_token: Any, _: Any) -> None:
        for number, prompt in enumerate(prompts):
            for token in tokenizer.encode(prompt + answer)[len(tokenizer.encode(prompt)) :]:
                if on_token(number, token):
                    break

    monkeypatch.setattr(command, "generate", generate)
    command.generate_command("folder", prompts, Sampling(), stop=stop)
    return capsys.readouterr().out


def test_the_space_between_prompt_and_answer_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    texts = ["the cat sat on the mat and the dog ran to the cat " * 20]
    tokenizer = load_tokenizer(train_sentencepiece(texts, 290, tmp_path))
    assert printed(monkeypatch, capsys, tokenizer, ["the cat"], " sat on the mat") == "the cat sat on the mat\n"


def test_a_chats_prompt_is_written_by_the_template_and_ends_where_the_template_does(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(train_sentencepiece(["the cat sat on the mat and ran " * 20], 290, tmp_path))
    config = RunConfig(data={"tokenizer": tokenizer.name}, chat={"system": "sat"})
    groups = SimpleNamespace(platform=SimpleNamespace(device_name="CPU"))
    loaded = SimpleNamespace(models=[SimpleNamespace(groups=groups)], network=None, config=config, tokenizer=tokenizer)
    monkeypatch.setattr(command, "load_model", lambda *_, **__: loaded)
    seen: list[Any] = []

    def generate(models: Any, numbers: Any, sampling: Any, ends: set[int], on_token: Any, _: Any) -> None:
        seen.extend((tokenizer.decode(numbers[0], control=True), ends))
        for token in tokenizer.encode("assistant\nthe mat")[len(tokenizer.encode("assistant\n")) :]:
            on_token(0, token)

    monkeypatch.setattr(command, "generate", generate)
    command.generate_command("folder", ["the cat"], Sampling(), chat=True)
    assert capsys.readouterr().out == "the cat\nthe mat\n"
    turns = ("system\nsat", "user\nthe cat", "assistant\n")
    # SentencePiece begins every piece of text between control tokens with a space.
    assert re.sub("(</?s>) ", r"\1", seen[0]) == "</s>\n".join(f"<s>{turn}" for turn in turns) and seen[1] == {
        tokenizer.eod
    }


def test_answers_to_several_prompts_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    texts = ["the cat sat on the mat and the dog ran to the cat " * 20]
    tokenizer = load_tokenizer(train_sentencepiece(texts, 290, tmp_path))
    assert printed(monkeypatch, capsys, tokenizer, ["the cat", "the dog"], " ran") == (
        "--- prompt 1 of 2 ---\nthe cat ran\n\n--- prompt 2 of 2 ---\nthe dog ran\n"
    )


def byte_tokenizer(folder: Path) -> Any:
    """A tokenizer.json of bytes, with two special tokens."""
    made = Tokenizer(models.BPE({one: n for n, one in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["</s>", "<|end|>"])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", [" two"], "one"),
        ("one two three", ["three", "two"], "one "),
        ("one two", ["twoo", "ones"], "one two"),
        ("one<|end|>two", ["<|end|>"], "one"),
        ("a\n<|end|>b", ["\n<|end|>b"], "a"),
        ("one<|end|>two", ["etw"], "on"),
        ("zwölf böse", ["ö"], "zw"),
        ("aaab", ["aab"], "a"),
        ("stop", ["stop"], ""),
    ],
)
def test_an_answer_ends_before_its_stop_string_and_shows_none_of_it_before(
    text: str, stops: list[str], expected: str, tmp_path: Path
) -> None:
    """``certain`` is what a terminal shows while tokens come: it only grows, and it is always a beginning of the end
    result."""
    tokenizer = byte_tokenizer(tmp_path)
    answer = Answer(tokenizer, tokenizer.encode("prompt stop"), stops)
    shown = ""
    for token in tokenizer.encode(text):
        ended = answer.add(token)
        assert answer.certain().startswith(shown) and expected.startswith(answer.certain())
        shown = answer.certain()
        if ended:
            break
    assert answer.text() == expected
    assert ended == (expected != text)


def test_the_names_of_sentencepieces_control_tokens_are_found(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train_sentencepiece(["the cat sat on the mat and ran " * 20], 290, tmp_path))
    numbers = [*tokenizer.encode("the cat"), 1, *tokenizer.encode("sat")]
    assert tokenizer.decode(numbers) == "the cat sat" and tokenizer.decode(numbers, control=True) == "the cat<s> sat"
    answer = Answer(tokenizer, numbers[:2], ["<s> s"])
    assert [answer.add(number) for number in numbers[2:]][-1]
    assert tokenizer.decode(numbers[:2]) + answer.text() == "the cat"


def test_every_prompt_ends_at_its_stop_string(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    said = printed(monkeypatch, capsys, byte_tokenizer(tmp_path), ["a", "b"], " go. on", stop=[".", "never"])
    assert said == "--- prompt 1 of 2 ---\na go\n\n--- prompt 2 of 2 ---\nb go\n"


def test_a_terminal_shows_nothing_of_a_stop_string(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert printed(monkeypatch, capsys, byte_tokenizer(tmp_path), ["a"], "b<|end|>c", stop=["<|end|>"]) == "ab\n"
    assert printed(monkeypatch, capsys, byte_tokenizer(tmp_path), ["a"], "b<|en", stop=["<|end|>"]) == "ab<|en\n"


@pytest.mark.parametrize("prompts", [["a"], ["a", "b"]])
@pytest.mark.parametrize("terminal", [True, False])
def test_an_answer_does_nothing_on_a_terminal(
    prompts: list[str], terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    """A model writes what the texts of strangers taught it; a pipe gets it as it is."""
    evil = "x\x1b[2J\x1b]52;c;AAAA\x07y"
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    said = printed(monkeypatch, capsys, byte_tokenizer(tmp_path), prompts, evil)
    assert ("a" + (printable(evil) if terminal else evil)) in said and bool(CONTROL.search(said)) != terminal


def test_an_empty_stop_string_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="empty"):
        Answer(byte_tokenizer(tmp_path), [0], ["", "x"])


@pytest.mark.parametrize(("sections", "chat"), [({"chat": {"train": [{"path": "a.jsonl"}]}}, True), ({}, False)])
def test_a_run_that_fine_tuned_suggests_a_chat(sections: dict[str, Any], chat: bool) -> None:
    said = after_run(RunConfig.model_validate({"run_dir": "runs/x", **sections}), 0, "again")
    assert said.startswith("llm-parallel generate runs/x --") and ("--chat " in said) == chat


def test_chat_belongs_to_prompts() -> None:
    with pytest.raises(UserError, match=r"--chat .* --input"):
        GenerateRequest("folder", chat=True, input=Path("in"), output=Path("out"))
    assert GenerateRequest("folder", ["a"], chat=True).chat


def test_text_that_comes_token_by_token_is_the_text_of_all_tokens(tmp_path: Path) -> None:
    parts = ["h\u00e9llo ", "\u65e5\u672c", "\U0001f389", " a b", "x = 3;"]
    pieces = train_sentencepiece(["".join(parts) * 40], 290, tmp_path / "p")
    draw = random.Random(0)
    for tokenizer in (load_tokenizer(pieces), byte_tokenizer(tmp_path)):
        for number in range(30):
            text = "".join(draw.choice(parts) for _ in range(40))
            tokens = [int(token) for token in tokenizer.encode(text)]
            cut = draw.randint(0, len(tokens) // 2)
            if number % 3 == 0:
                tokens[cut:] = [draw.randrange(tokenizer.vocab_size) for _ in range(90)]
            prompt, written = tokens[:cut], tokens[cut:]
            whole = tokenizer.decode(tokens)[len(tokenizer.decode(prompt)) :]
            stop = whole[len(whole) // 2 :][:3]
            assert streamed(Answer(tokenizer, prompt), written) == whole
            if stop and "\ufffd" not in stop:
                assert streamed(Answer(tokenizer, prompt, [stop]), written) == whole[: whole.index(stop)]


def streamed(answer: Answer, tokens: list[int]) -> str:
    """The text of an answer, of which nothing that was certain is taken back."""
    shown = ""
    for token in tokens:
        ended = answer.add(token)
        assert answer.certain().startswith(shown)
        shown = answer.certain()
        if ended:
            break
    return answer.text()
