"""What ``generate`` prints is what transformers writes: begin token, end tokens and stop strings included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.in_process import in_process
from tests.support.parity_models import RANDOM, load_hf, random_folder

SPECIAL = ["<s>", "</s>", "<|end|>"]
PROMPTS = ["Once", "the cat sat on"]


def with_tokenizer(folder: Path) -> Path:
    """Gives a folder a tokenizer of bytes that puts ``<s>`` before a text, with two end tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    made = Tokenizer(models.BPE({one: n for n, one in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    made.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ends = {"bos_token_id": 256, "eos_token_id": [257, 259], "pad_token_id": 257}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder


def theirs(folder: Path, prompt: str, **options: Any) -> str:
    """Greedy text of transformers after a prompt, without special tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        out = load_hf(folder, torch.float32).generate(
            **given, max_new_tokens=24, do_sample=False, tokenizer=tokenizer, **options
        )
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    return text.removeprefix(prompt)


def ours(folder: Path, *prompts: str, stop: list[str] | None = None) -> str:
    options = [part for one in stop or () for part in ("--stop", one)]
    given = [part for prompt in prompts for part in ("--prompt", prompt)]
    done = in_process("generate", folder, *given, "--max-new-tokens", "24", "--device", "cpu", *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", RANDOM)
def test_the_text_of_random_models(kind: str, tmp_path: Path) -> None:
    folder = with_tokenizer(random_folder(kind, tmp_path))
    assert ours(folder, PROMPTS[1]) == f"{PROMPTS[1]}{theirs(folder, PROMPTS[1])}\n"


def test_stop_strings(tmp_path: Path) -> None:
    folder = with_tokenizer(random_folder("llama-2", tmp_path))
    plain = [theirs(folder, prompt) for prompt in PROMPTS]
    # Parts of what the model writes, so that they are met: at a token's end, within the text, and over several tokens.
    for stops in ([plain[0][3]], [plain[0][5:8], plain[1][4:6]], [plain[1][7:10], "never written"]):
        expected = []
        for prompt in PROMPTS:
            text = theirs(folder, prompt, stop_strings=stops)
            expected.append(text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))])
        assert ours(folder, *PROMPTS, stop=stops) == (
            f"--- prompt 1 of 2 ---\n{PROMPTS[0]}{expected[0]}\n\n--- prompt 2 of 2 ---\n{PROMPTS[1]}{expected[1]}\n"
        )
        assert expected != plain, "a stop string is met"
