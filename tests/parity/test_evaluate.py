"""Evaluations on our engine against lm-eval's own back end over transformers, sample by sample."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_parallel.evaluate.request import EvaluateRequest
from llm_parallel.generate.load import Member
from tests.support.harness import run_ranks
from tests.support.served import served_folder
from tests.support.smollm import smollm_folder

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed (pip install 'llm-parallel[evaluate]')", allow_module_level=True)

TASKS = (
    "mmlu", "triviaqa", "nq_open", "gsm8k_cot", "agieval_en", "boolq", "hellaswag", "openbookqa", "quac", "winogrande",
)  # fmt: skip


def our_job(rank: int, world_size: int, settings: dict[str, Any]) -> None:
    from llm_parallel.evaluate.command import evaluate_here

    evaluate_here(EvaluateRequest(**settings, device="cpu"), Member(rank, rank, world_size))


def of_lm_eval(settings: dict[str, Any]) -> dict[str, Any]:
    """The same tasks by lm-eval's back end."""
    from lm_eval.models.huggingface import HFLM

    from llm_parallel.evaluate.command import open_tasks
    from llm_parallel.evaluate.harness import Settings, run_harness

    request = EvaluateRequest(**settings)
    _, tasks = open_tasks(request, settings["out"])
    lm = HFLM(pretrained=settings["model"], device="cpu", dtype="float32", batch_size=4)
    return run_harness(lm, tasks, Settings(request.limit, request.seed, request.new_tokens))


def flat(values: Any) -> list[Any]:
    return [one for value in values for one in flat(value)] if isinstance(values, list | tuple) else [values]


def check_alike(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float = 1e-4) -> int:
    """Compares every sample; returns how many answers there were."""
    assert set(ours["configs"]) == set(theirs["configs"]) and set(theirs) - {"samples"} <= set(ours)
    count = 0
    for task, samples in theirs["samples"].items():
        for one, other in zip(samples, ours["samples"][task], strict=True):
            assert [one[key] for key in ("doc_id", "prompt_hash", "doc_hash", "target_hash")] == [
                other[key] for key in ("doc_id", "prompt_hash", "doc_hash", "target_hash")
            ]
            expected, found = flat(one["resps"]), flat(other["resps"])
            count += len(one["resps"])
            for wanted, got in zip(expected, found, strict=True):
                if isinstance(wanted, float):
                    np.testing.assert_allclose(got, wanted, atol=tolerance, rtol=tolerance, err_msg=task)
                else:
                    assert got == wanted, (task, one["doc_id"])
    for task, values in theirs["results"].items():
        for name, value in values.items():
            if isinstance(value, float) and "stderr" not in name:
                assert ours["results"][task][name] == pytest.approx(value, abs=1e-9), (task, name)
    return count


@pytest.mark.gloo
@pytest.mark.parametrize(
    "layout", [{}, *(pytest.param({axis: 2}, marks=pytest.mark.slow) for axis in ("tp", "pp"))], ids=str
)
def test_every_benchmark_is_answered_as_by_lm_eval(layout: dict[str, int], tmp_path: Path) -> None:
    from llm_parallel.evaluate.demo import write_demo
    from llm_parallel.evaluate.results import read_results

    model = served_folder(tmp_path / "model", context=700)
    data = write_demo(tmp_path / "data", 3)
    settings = {
        "model": str(model), "tasks": TASKS, "data_dir": data, "limit": 2, "new_tokens": 4, "out": tmp_path / "out",
    }  # fmt: skip
    run_ranks(our_job, max(layout.values(), default=1), {**settings, **layout})
    ours = read_results(tmp_path / "out")
    assert check_alike(ours, of_lm_eval(settings)) > 100
    tokens = ours["llm_parallel"]["tokens"]
    assert tokens["run"] < tokens["asked"] * 0.7, "requests share what they begin with"
    assert ours["llm_parallel"]["truncated"], "the context is too small for some of them"


OTHERS = ("xstest", "truthfulqa_mc1", "truthfulqa_mc2", "toxigen", "ceval-valid", "cmmlu", "follow", "humaneval")


@pytest.mark.gloo
def test_the_other_tasks_run_and_a_cut_record_is_gone_on_with(tmp_path: Path) -> None:
    """The record of an evaluation that was killed is its beginning, perhaps with a torn line."""
    from llm_parallel.evaluate.results import read_results

    tasks = (*OTHERS, "ifeval") if importlib.util.find_spec("langdetect") else OTHERS
    settings: dict[str, Any] = {
        "model": str(served_folder(tmp_path / "model", context=900)), "tasks": tasks, "demo": True, "limit": 2,
        "new_tokens": 4, "out": tmp_path / "out",
    }  # fmt: skip
    run_ranks(our_job, 1, settings)
    first, record = read_results(tmp_path / "out"), tmp_path / "out" / "requests.jsonl"
    assert {"pass@1,create_test", "pass@1_stderr,create_test"} <= set(first["results"]["humaneval"])
    assert first["llm_parallel"]["sandbox"] in ("bwrap", "landlock")
    assert {"refused_safe,none", "refused_unsafe,none"} <= set(first["results"]["xstest"])
    lines = record.read_bytes().splitlines(keepends=True)
    record.write_bytes(b"".join(lines[: len(lines) // 2]) + lines[-1][:20])
    run_ranks(our_job, 1, settings)
    again = read_results(tmp_path / "out")
    assert again["llm_parallel"]["tokens"]["known"] >= len(lines) // 2
    assert 0 < again["llm_parallel"]["tokens"]["run"] < first["llm_parallel"]["tokens"]["run"]
    assert len(record.read_bytes().splitlines()) == len(lines) + 1, "each request but the torn line's stands there once"
    for task, values in first["results"].items():  # other requests share a pass, so that sums are rounded otherwise
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        assert {name: again["results"][task][name] for name in numbers} == pytest.approx(numbers, abs=1e-5), task


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("layout", [{}, {"tp": 3}, {"pp": 2}], ids=str)
def test_smollm_scores_as_by_lm_eval(layout: dict[str, int], tmp_path: Path) -> None:
    """A real model and its tokenizer; lm-eval's back end needs the names of special tokens beside it."""
    from llm_parallel.evaluate.demo import write_demo
    from llm_parallel.evaluate.results import read_results

    model = tmp_path / "model"
    model.mkdir()
    for file in smollm_folder().iterdir():
        shutil.copy(file, model / file.name)  # a link that leaves the folder is refused
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (model / "tokenizer_config.json").write_text(json.dumps(names))
    settings = {
        "model": str(model), "tasks": ("mmlu", "nq_open", "boolq", "hellaswag", "winogrande"), "limit": 4, "shots": 2,
        "data_dir": write_demo(tmp_path / "data", 6), "new_tokens": 8, "out": tmp_path / "out",
    }  # fmt: skip
    run_ranks(our_job, max(layout.values(), default=1), {**settings, **layout})
    assert check_alike(read_results(tmp_path / "out"), of_lm_eval(settings)) > 50
