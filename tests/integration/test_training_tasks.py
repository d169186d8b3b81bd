"""Benchmarks that a run scores while it trains (``evaluate.tasks``): losses do not depend on them, every step is scored
once, in every layout alike, and as ``llm-parallel evaluate`` scores the checkpoint."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from llm_parallel.evaluate.demo import write_demo
from llm_parallel.metrics.history import read_history
from tests.support.commands import events, losses, train_in_ranks
from tests.support.data_helpers import write_token_file
from tests.support.harness import run_ranks
from tests.support.served import served_folder

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed (pip install 'llm-parallel[evaluate]')", allow_module_level=True)

pytestmark = pytest.mark.gloo
TASKS = ["hellaswag", "nq_open"]
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file without tasks, tokens that mean nothing, and the demo's sets."""
    made = tmp_path_factory.mktemp("tasks")
    served_folder(made / "model")
    rng = np.random.default_rng(5)
    write_token_file(made / "tokens", [rng.integers(3, 259, 60) for _ in range(40)])
    write_demo(made / "sets", 4)
    tree = {
        "device": "cpu",
        "model": {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4,
                  "num_query_groups": 2, "max_seq_length_tokens": 600, "init_std": 0.1},
        "data": {"train": [str(made / "tokens")], "tokenizer": str(made / "model"), "seq_length_tokens": 32,
                 "eval_fraction": 0.0},
        "train": {"global_batch_size": 4, "steps": STEPS, "threads_per_process": 1},
        "optim": {"lr": 3e-3, "min_lr": 3e-4},
        "log": {"tensorboard": False, "plots": False},
        "checkpoint": {"asynchronous": False},
    }  # fmt: skip
    (made / "run.yaml").write_text(yaml.safe_dump(tree))
    return made


def scored(folder: Path, run: str, **more: Any) -> list[str]:
    """Overrides of a run that scores its tasks every second step."""
    fields = {"tasks": TASKS, "data_dir": str(folder / "sets"), "interval_steps": 2, "samples": 3, "new_tokens": 4}
    chosen = [f"evaluate.{name}={json.dumps(value)}" for name, value in {**fields, **more}.items()]
    return [f"run_dir={folder / run}", *chosen]


def train(folder: Path, processes: int, *overrides: str, **how: Any) -> None:
    train_in_ranks(folder / "run.yaml", processes, *overrides, **how)


def samples(folder: Path, run: str, step: int) -> dict[str, Any]:
    """Answers of the tasks at a step, by task and document."""
    found = {}
    for task in TASKS:
        lines = (folder / run / f"evaluations/step_{step:07d}/samples_{task}.jsonl").read_text().splitlines()
        found.update({(task, row["doc_hash"]): row["resps"] for row in map(json.loads, lines)})
    return found


def assert_alike(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    assert one.keys() == other.keys() and len(one) == 3 * len(TASKS)
    for key, answers in one.items():
        for wanted, got in zip(answers, other[key], strict=True):
            if key[0] == "hellaswag":
                assert float(got[0][0]) == pytest.approx(float(wanted[0][0]), abs=tolerance)
            else:
                assert got == wanted


def by_command(rank: int, world_size: int, folder: str, run: str) -> None:
    from llm_parallel.evaluate.command import evaluate_here
    from llm_parallel.evaluate.request import EvaluateRequest
    from llm_parallel.generate.load import Member

    evaluate_here(
        EvaluateRequest(
            f"{folder}/{run}", tasks=TASKS, data_dir=Path(folder) / "sets", limit=3, new_tokens=4, device="cpu",
            out=Path(folder) / run / "evaluations/step_9999999",
        ),
        Member(rank, rank, world_size),
    )  # fmt: skip


def test_losses_stay_as_they_are_and_scores_are_those_of_the_command(folder: Path) -> None:
    train(folder, 1, f"run_dir={folder / 'plain'}")
    train(folder, 1, *scored(folder, "scored"))
    assert losses(folder / "plain") == losses(folder / "scored"), "to the last bit"
    history = read_history(folder / "scored")
    assert [record["step"] for record in history.tasks] == [0, 2, 4]
    assert [event["step"] for event in events(folder / "scored", "tasks")] == [0, 2, 4]
    for record in history.tasks:
        assert record["tasks/hellaswag/documents"] == 3 and 0 <= record["tasks/hellaswag/acc_norm"] <= 1
        assert "tasks/nq_open/exact_match" in record
    run_ranks(by_command, 1, str(folder), "scored")
    assert_alike(samples(folder, "scored", 4), samples(folder, "scored", 9999999), 1e-5)
    assert samples(folder, "scored", 0) != samples(folder, "scored", 4)
