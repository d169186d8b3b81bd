"""Evaluations on our engine against lm-eval's own back end over transformers, sample by sample."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_parallel.evaluate.request import EvaluateRequest
from llm_parallel.generate.load import Member
from tests.support.harness import run_ranks
from tests.support.served import served_folder

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
