"""Files of prompts: the real command on a small folder, killed and resumed, and lines that cannot be answered."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llm_parallel.parallel.groups import close_groups
from tests.support.in_process import in_process
from tests.support.parity_models import load_hf, random_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer of bytes and ChatML's tokens."""
    return byte_folder(tmp_path_factory.mktemp("model"))


def byte_folder(path: Path) -> Path:
    """The same in a folder."""
    made = random_folder("llama-2", path)
    tokenizer = Tokenizer(models.BPE({one: n for n, one in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "</s>"])
    tokenizer.save(str(made / "tokenizer.json"))
    (made / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return made


RECORDS: list[dict[str, Any]] = [
    {"prompt": "one two", "id": "a"},
    {"prompt_tokens": [5, 6, 7, 8]},
    {"messages": [{"role": "user", "content": "Who is it?"}]},
    {"prompt": "a longer text to go on from"},
]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.gloo
def test_a_file_is_answered_and_a_killed_command_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text("\n".join(map(json.dumps, RECORDS)) + "\n\n")
    arguments = ("generate", str(folder), "--input", source, "--output", target, "--max-new-tokens", "9",
                 "--samples", "2", "--temperature", "1", "--device", "cpu")  # fmt: skip
    whole = in_process(*arguments)
    assert whole.returncode == 0, whole.stderr
    expected = {(line["number"], line["sample"]): line for line in lines_of(target)}
    assert sorted(expected) == [(number, sample) for number in range(4) for sample in range(2)]
    assert expected[0, 1]["id"] == "a" and "8 of 8 answers" in whole.stderr

    hf = load_hf(folder, torch.float64).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    asked = "<|im_start|>user\nWho is it?<|im_end|>\n<|im_start|>assistant\n"
    prompts = [tokenizer.encode("one two").ids, [5, 6, 7, 8], tokenizer.encode(asked).ids]
    for number, prompt in enumerate(prompts):
        line = expected[number, 1]
        with torch.no_grad():
            logits = hf(torch.tensor([[*prompt, *line["tokens"]]])).logits[0, len(prompt) - 1 : -1]
        log_probs = logits.log_softmax(-1).gather(1, torch.tensor(line["tokens"])[:, None])[:, 0]
        assert line["log_probs"] == pytest.approx(log_probs.tolist(), abs=2e-5)
        assert line["truncated"] == (line["reason"] == "length")

    # Killed after three answers, in the middle of the fourth line. Older versions wrote into the output itself.
    written = target.read_text().splitlines()
    parts = tmp_path / "answers.jsonl.parts"
    assert not parts.exists()
    for torn in (parts / "part-3.jsonl", target):
        target.unlink()
        torn.parent.mkdir(exist_ok=True)
        torn.write_text("\n".join([written[6], *written[:2]]) + "\n" + written[3][:40])
        again = in_process(*arguments)
        assert again.returncode == 0 and "3 answers already; 5 are left" in again.stderr
        found = lines_of(target)
        assert [(line["number"], line["sample"]) for line in found] == sorted(expected) and not parts.exists()
        for line in found:
            same = expected[line["number"], line["sample"]]
            assert {**line, "time": 0, "log_probs": 0} == {**same, "time": 0, "log_probs": 0}

    best = in_process(*arguments[:-4], "--best-of", "2", "--samples", "1", "--temperature", "1", "--device", "cpu")
    assert best.returncode == 2 and "answers.jsonl holds something else" in best.stderr
    other = (*arguments[:5], tmp_path / "best.jsonl", "--max-new-tokens", "9", "--best-of", "2", "--device", "cpu")
    assert in_process(*other, "--temperature", "1").returncode == 0
    for line in lines_of(tmp_path / "best.jsonl"):
        pair = [expected[line["number"], sample] for sample in range(2)]
        assert line["tokens"] == max(pair, key=lambda one: np.mean(one["log_probs"]))["tokens"]

    other = in_process(*arguments, "--seed", "3")
    assert other.returncode == 2 and "answers.jsonl holds something else" in other.stderr
    close_groups()


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device; make room there, or choose"),
    ],
    ids=["Ctrl-C", "full disk"],
)
def test_a_command_that_ends_before_it_has_finished_says_how_to_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, said: str
) -> None:
    source, target, parts = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl", tmp_path / "out.jsonl.parts"
    source.write_text("\n".join(map(json.dumps, RECORDS)))
    arguments = ("generate", str(folder), "--input", source, "--output", target, "--device", "cpu",
                 "--max-new-tokens", "5", "--max-running", "1")  # fmt: skip
    write, lines = os.write, []

    def fails(fd: int, data: bytes) -> int:
        if data.startswith(b'{"job"'):
            lines.append(data)
            if len(lines) == 3:
                raise error
        return write(fd, data)

    with monkeypatch.context() as patched:
        patched.setattr("llm_parallel.jsonlines.os.write", fails)
        done = in_process(*arguments)
    assert done.returncode == status and said in done.stderr
    assert f"2 of 4 answers are complete in {parts}; the same command goes on with the others" in done.stderr
    assert not target.exists() and parts.is_dir()
    again = in_process(*arguments)
    assert again.returncode == 0 and "2 answers already; 2 are left" in again.stderr and len(lines_of(target)) == 4


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "line 1 of .* is no JSON"),
        ("[1]", "no JSON object"),
        ('{"text": "x"}', "only 'text'; give one of prompt, prompt_tokens and messages"),
        ('{"prompt": 3}', "it must be a text"),
        ('{"prompt": ""}', "prompt in line 1 of .* is empty"),
        ('{"prompt_tokens": [1, 999]}', "token 999"),
        ('{"prompt_tokens": [1.5]}', "list of token ids"),
        ('{"messages": "hello"}', "list of messages"),
        (json.dumps({"prompt": "x" * 300}), "max_seq_length_tokens 256"),
    ],
)
def test_lines_that_cannot_be_answered_are_named(folder: Path, tmp_path: Path, line: str, named: str) -> None:
    import re

    source = tmp_path / "prompts.jsonl"
    source.write_text(line + "\n")
    done = in_process("generate", str(folder), "--input", source, "--output", tmp_path / "out.jsonl", "--device", "cpu")
    assert done.returncode == 2 and re.search(named, done.stderr), done.stderr
    assert not (tmp_path / "out.jsonl").exists()
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "neither of --prompt and --input"),
        (("--prompt", "x", "--input", "y"), "both of --prompt and --input"),
        (("--input", "y"), "--output is not"),
        (("--prompt", "x", "--samples", "2"), "--samples is given without --input"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: tuple[str, ...], named: str) -> None:
    done = in_process("generate", "nowhere", *arguments)
    assert done.returncode == 2 and named in done.stderr


@pytest.mark.gloo
def test_answers_of_a_given_form(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="pip install llguidance")
    found = in_process(
        "generate", str(folder), "--prompt", "Is it? ", "--choice", "yes", "--choice", "no", "--device", "cpu"
    )
    assert found.returncode == 0 and found.stdout.splitlines()[0] in ("Is it? yes", "Is it? no"), found.stderr
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["a longer text"]}')
    cut = in_process(
        "generate", str(folder), "--prompt", "x", "--json-schema", schema, "--max-new-tokens", "3", "--device", "cpu"
    )
    assert cut.returncode == 0 and "ended before its structure was complete, at --max-new-tokens 3" in cut.stderr

    source, target = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text("\n".join(map(json.dumps, RECORDS)))
    arguments = ("generate", str(folder), "--input", source, "--output", target, "--device", "cpu")
    schema.write_text('{"type": "array", "uniqueItems": true}')
    refused = in_process(*arguments, "--json-schema", schema)
    assert refused.returncode == 2 and "uniqueItems" in refused.stderr and not target.exists()
    assert in_process(*arguments, "--regex", "[ab]{2}", "--max-new-tokens", "9", "--samples", "2").returncode == 0
    lines = lines_of(target)
    assert len(lines) == 8 and all(set(line["text"]) <= {"a", "b"} and len(line["text"]) == 2 for line in lines)
    other = in_process(*arguments, "--regex", "[abc]{2}", "--max-new-tokens", "9", "--samples", "2")
    assert other.returncode == 2 and "holds something else" in other.stderr


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--regex", "a", "--choice", "b"], "--regex and --choice are given together"),
        (["--grammar", "none.gbnf"], "--grammar none.gbnf cannot be read"),
        (["--choice", ""], "none empty"),
    ],
)
def test_forms_that_are_none(folder: Path, more: list[str], part: str) -> None:
    found = in_process("generate", str(folder), "--prompt", "x", *more)
    assert found.returncode == 2 and part in found.stderr
