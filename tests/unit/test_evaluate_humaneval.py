"""HumanEval's right and wrong answers through lm-eval's harness and our sandbox, and what IFEval needs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from llm_parallel.evaluate.request import EvaluateRequest

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed (pip install 'llm-parallel[evaluate]')", allow_module_level=True)


@pytest.mark.parametrize(("number", "right", "k", "wanted"), [(5, 2, 1, 0.4), (5, 2, 3, 0.9), (4, 2, 3, 1.0)])
def test_the_chance_that_one_of_several_answers_is_right(number: int, right: int, k: int, wanted: float) -> None:
    """Of the draws of k answers without returning them."""
    from llm_parallel.evaluate.humaneval import pass_at_k

    assert pass_at_k(number, right, k) == pytest.approx(wanted)


@pytest.mark.processes
def test_the_sets_own_answers_pass_and_others_do_not(tmp_path: Path) -> None:
    from lm_eval.api.model import LM

    from llm_parallel.evaluate.command import open_tasks
    from llm_parallel.evaluate.harness import Settings, run_harness

    class Knows(LM):
        """Answers every second document with its solution."""

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            found = []
            for request in requests:
                right = int(request.doc["task_id"].split("/")[1]) % 2 == 0
                found.append(request.doc["canonical_solution"] if right else "    return None\n")
            return found

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            raise AssertionError("HumanEval is written")

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            raise AssertionError("HumanEval is written")

    programs, tasks = open_tasks(EvaluateRequest("knows", tasks=("humaneval",), demo=True), tmp_path)
    try:
        results = run_harness(Knows(), tasks, Settings())
    finally:
        programs.close()
    assert results["results"]["humaneval"]["pass@1,create_test"] == 0.5
    assert programs.mode in ("bwrap", "landlock")


@pytest.mark.skipif(importlib.util.find_spec("langdetect") is None, reason="IFEval's packages are not installed")
def test_the_language_of_an_answer_is_found_alike_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import langdetect

    from llm_parallel.evaluate import ifeval

    monkeypatch.setattr(langdetect.DetectorFactory, "seed", None)  # its own: answers are random
    ifeval.prepare()
    assert langdetect.DetectorFactory.seed is not None
