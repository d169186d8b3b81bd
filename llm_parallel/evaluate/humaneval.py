"""HumanEval (Chen et al. 2021, arXiv 2107.03374) with lm-eval's prompts and stop strings, and answers run in our
sandbox instead of in this process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from math import comb
from typing import Any, Literal, cast

from llm_parallel.tasks.sandbox import Mode, Sandbox, Tested

SANDBOX_MODES = ("auto", "bwrap", "landlock", "unsafe")


def pass_at_k(number: int, right: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k answers is right, of ``number`` of which ``right`` are."""
    return 1.0 - comb(number - right, k) / comb(number, k)


class Programs:
    """Tests programs of answers, each once. mode: as of ``Sandbox``, which is started when it is needed."""

    def __init__(self, mode: str = "auto") -> None:
        self._asked = mode
        self._sandbox: Sandbox | None = None
        self._passed: dict[tuple[str, str], bool] = {}
        self.mode: str | None = None
        """How programs were held; None while none has run."""

    def close(self) -> None:
        """Ends the sandbox's workers; further programs start others."""
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            with suppress(OSError):
                sandbox.close()

    def run(self, jobs: Sequence[tuple[str, str]]) -> list[bool]:
        """Which programs pass their tests. Raises SandboxFailed if they cannot be run."""
        if self._sandbox is None:
            self._sandbox = Sandbox(cast(Mode | Literal["auto"], self._asked))
            self.mode = self._sandbox.mode
        new = [job for job in dict.fromkeys(jobs) if job not in self._passed]
        for job, result in zip(new, self._sandbox.run_many([Tested(*job) for job in new])):
            self._passed[job] = result.status == "passed"
        return [self._passed[job] for job in jobs]


def tests_of(document: dict[str, Any]) -> str:
    """The tests of a document, as lm-eval writes them."""
    return f"{document['test']}\ncheck({document['entry_point']})"


def task(config: dict[str, Any], programs: Programs) -> dict[str, Any]:
    """lm-eval's configuration of HumanEval, in which what runs programs is replaced."""

    def build_predictions(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
        found = [[doc["prompt"] + answer for answer in answers] for answers, doc in zip(resps, docs)]
        programs.run([(one, tests_of(doc)) for codes, doc in zip(found, docs) for one in codes])
        return found

    def pass_at_k_of(references: list[str], predictions: list[list[str]], k: list[int]) -> dict[str, float]:
        shares: dict[str, list[float]] = {f"pass@{number}": [] for number in k}
        for tests, codes in zip(references, predictions):
            right = sum(programs.run([(code, tests) for code in codes]))
            for number in k:
                shares[f"pass@{number}"].append(pass_at_k(len(codes), right, number))
        return {name: sum(values) / len(values) for name, values in shares.items()}

    pass_at_k_of.__name__ = "pass_at_k"  # lm-eval's name of the metric
    metrics = [{**config["metric_list"][0], "metric": pass_at_k_of}]
    filters = [{"name": "create_test", "filter": [{"function": "custom", "filter_fn": build_predictions}]}]
    return {**config, "metric_list": metrics, "filter_list": filters}
