"""``llm-parallel evaluate --compare`` names causes that were planted in real evaluations of a real model."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_parallel.evaluate.demo import write_demo
from llm_parallel.evaluate.request import EvaluateRequest
from llm_parallel.generate.load import Member
from tests.support.harness import run_ranks
from tests.support.smollm import smollm_folder

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed (pip install 'llm-parallel[evaluate]')", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.gloo]
PLANTED: dict[str, tuple[dict[str, Any], str]] = {
    "BOS": ({"bos": True}, "begin token (BOS)"),
    "trailing space": ({"texts": {"doc_to_text": "Q: {{question}}?\nA: "}}, "trailing space"),
    "stop string": ({"texts": {"until": ["\n", ".", ",", " the"]}}, "stop strings"),
    "other shots": ({"shots": 2}, "few-shot examples"),
    "bf16": ({"weights": "bf16"}, "precision"),
    "template": ({"chat": True}, "chat template"),
}
"""What is changed of the first evaluation, and the cause that must be named, with no other."""


def task_file(path: Path, doc_to_text: str = "Q: {{question}}?\nA:", until: Any = ("\n", ".", ",")) -> str:
    """nq_open with other prompts or stop strings, under its own name."""
    config = {
        "task": "nq_open", "output_type": "generate_until", "training_split": "train", "validation_split": "validation",
        "doc_to_text": doc_to_text, "doc_to_target": "{{answer}}", "fewshot_delimiter": "\n",
        "generation_kwargs": {"until": list(until), "do_sample": False, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 4.0},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(config))
    return str(path)


def evaluations(rank: int, world_size: int, folder: Path, model: str) -> None:
    """All evaluations, in one process."""
    from llm_parallel.evaluate.command import evaluate_here

    for name, (changed, _) in {"base": ({}, ""), "again": ({"max_running": 3}, ""), **PLANTED}.items():
        settings: dict[str, Any] = {"shots": 1, **changed}
        texts = task_file(folder / f"{name}.yaml", **settings.pop("texts", {}))
        evaluate_here(
            EvaluateRequest(
                model, tasks=("hellaswag", texts), data_dir=folder / "data", limit=6, new_tokens=6, device="cpu",
                out=folder / name, **settings,
            ),
            Member(),
        )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("causes")
    write_demo(made / "data", 8)
    (made / "model").mkdir()
    for file in smollm_folder().iterdir():
        shutil.copy(file, made / "model" / file.name)  # a link that leaves the folder is refused
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (made / "model/tokenizer_config.json").write_text(json.dumps(names))
    run_ranks(evaluations, 1, made, str(made / "model"), timeout_s=1800.0)
    return made


@pytest.mark.parametrize("name", PLANTED)
def test_a_cause_that_was_planted_is_the_only_one_named(folder: Path, name: str, capsys: Any) -> None:
    from llm_parallel.evaluate.causes import causes
    from llm_parallel.evaluate.compare import compare_command
    from llm_parallel.evaluate.pairs import pairs_of
    from llm_parallel.evaluate.results import read_results

    wanted = PLANTED[name][1]
    first, second = (read_results(folder / one) for one in ("base", name))
    assert [cause.name for cause in causes(first, second, pairs_of(first, second))] == [wanted]
    assert compare_command(folder / "base", folder / name) == 0
    assert wanted in capsys.readouterr().out


def test_an_evaluation_that_was_repeated_has_no_cause(folder: Path) -> None:
    """Other requests share a pass, so that sums are rounded otherwise."""
    from llm_parallel.evaluate.causes import causes
    from llm_parallel.evaluate.pairs import pairs_of
    from llm_parallel.evaluate.results import read_results

    first, second = (read_results(folder / one) for one in ("base", "again"))
    assert json.dumps(first["llm_parallel"]["data"]) == json.dumps(second["llm_parallel"]["data"])
    assert causes(first, second, pairs_of(first, second)) == []
