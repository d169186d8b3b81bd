"""SmolLM2-135M learns to answer sums in a given form, and to stop, by adapters alone."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.commands import train_in_ranks
from tests.support.harness import run_ranks
from tests.support.smollm import smollm_folder

pytestmark = [pytest.mark.slow, pytest.mark.gloo]
HELD_OUT = 16


def problems(seed: int, count: int) -> list[tuple[int, int]]:
    numbers = random.Random(seed)
    return [(numbers.randint(2, 40), numbers.randint(2, 40)) for _ in range(count)]


def question(a: int, b: int) -> str:
    return f"What is {a} plus {b}?"


def answered(rank: int, world_size: int, run_dir: str) -> tuple[int, int, int]:
    """Of the held-out questions, answers in the form, answers that stop, and right ones."""
    from llm_parallel.data.chat_data import ChatData
    from llm_parallel.generate.decode import generate
    from llm_parallel.generate.load import load_model
    from llm_parallel.generate.sampling import Sampling

    loaded = load_model(run_dir, device="cpu")
    assert loaded.tokenizer is not None
    data = ChatData.open(next(path for path in (Path(run_dir) / "data").iterdir() if path.is_dir()))
    asked = problems(0, HELD_OUT)
    prompts = data.encode_prompts([question(a, b) for a, b in asked])
    found = generate(loaded.network, prompts, Sampling(max_new_tokens=16), set(data.stops))
    texts = [re.fullmatch(r"Answer: (\d+)", loaded.tokenizer.decode(tokens)) for tokens in found]
    right = sum(text is not None and int(text[1]) == a + b for text, (a, b) in zip(texts, asked))
    return sum(text is not None for text in texts), sum(len(tokens) < 16 for tokens in found), right


@pytest.mark.parametrize("layout", [{}, {"tp": 3}, {"pp": 2}], ids=["1 process", "TP3", "PP2"])
def test_adapters_teach_the_form_and_to_stop(tmp_path: Path, layout: dict[str, int]) -> None:
    held_out = set(problems(0, HELD_OUT))
    with (tmp_path / "sums.jsonl").open("w") as handle:
        for a, b in [pair for pair in problems(1, 400) if pair not in held_out][:200]:
            handle.write(json.dumps({"prompt": question(a, b), "completion": f"Answer: {a + b}"}) + "\n")
    tree: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "device": "cpu",
        "checkpoint": {"load": str(smollm_folder())},
        "chat": {"train": [str(tmp_path / "sums.jsonl")], "eval_fraction": 0.0},
        "data": {"seq_length_tokens": 192},
        "adapter": {"rank": 16, "alpha": 32},
        "parallel": layout,
        "train": {"global_batch_size": 2, "steps": 20, "threads_per_process": 1},
        "optim": {"lr": 1e-3, "schedule": "constant", "warmup_steps": 4, "weight_decay": 0.0},
        "log": {"tensorboard": False, "plots": False},
    }
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(tree))
    train_in_ranks(run_file, layout.get("tp", 1) * layout.get("pp", 1), timeout_s=900.0)
    form, stopped, _ = run_ranks(answered, 1, str(tmp_path / "run"))[0]
    assert (form, stopped) == (HELD_OUT, HELD_OUT)
