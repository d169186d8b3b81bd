"""Which texts run for log-likelihoods and what is read from them, the record of answers, and curves over checkpoints,
without a model."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_parallel.errors import UserError
from llm_parallel.evaluate.curve import curve_command, points_of
from llm_parallel.evaluate.record import Outcome, Record, model_mark
from llm_parallel.evaluate.request import EvaluateRequest
from llm_parallel.evaluate.results import write_results
from llm_parallel.evaluate.runner import common
from llm_parallel.generate.pages import PagePool
from llm_parallel.generate.requests import Request
from llm_parallel.generate.sampling import Sampling
from llm_parallel.generate.scheduler import Limits, Scheduler
from tests.support import made_up_model

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed (pip install 'llm-parallel[evaluate]')", allow_module_level=True)

VOCABULARY = 5


log_probs, answered = (
    partial(made_up_model.log_probs, vocabulary=VOCABULARY),
    partial(made_up_model.answered, vocabulary=VOCABULARY),
)
tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=12), st.integers(6, 9))
def test_every_continuation_is_read_as_if_it_ran_alone(pairs: list[tuple[list[int], list[int]]], context: int) -> None:
    from llm_parallel.evaluate.lm import read, request_of, rows_of

    rows = rows_of([(None, *pair) for pair in pairs], context)
    found: dict[int, tuple[float, bool]] = {}
    for row, members in rows.items():
        request = request_of(row, members)
        found.update(read(request, members, answered(request)))
    for number, (before, after) in enumerate(pairs):
        text = (before + after)[-(context + 1) :]
        places = range(len(text) - len(after), len(text))
        alone = [log_probs(tuple(text[:place])) for place in places]
        wanted = sum(float(one[text[place]]) for one, place in zip(alone, places))
        greedy = all(int(one.argmax()) == text[place] for one, place in zip(alone, places))
        assert found[number] == (pytest.approx(wanted), greedy)
    assert len(rows) == len({tuple((b + a)[-(context + 1) :][:-1]) for b, a in pairs})


def test_a_continuation_longer_than_the_context() -> None:
    from llm_parallel.evaluate.lm import rows_of

    with pytest.raises(UserError, match="a continuation has 5 tokens and the model's context 4"):
        rows_of([(None, [1], [1, 2, 3, 4, 0])], 4)


@given(tokens, tokens)
def test_common_beginnings(one: list[int], other: list[int]) -> None:
    wanted = next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    assert common(one, other) == wanted


def test_scored_requests_share_the_pages_before_what_they_need() -> None:
    scheduler = Scheduler(Limits(num_pages=64, page_tokens=4))
    head = tuple(range(10))
    one = Request(0, (*head, 20, 21), Sampling(max_new_tokens=1), prompt_log_probs=1, scores_from=10, candidates=(1,))
    other = replace(one, number=1, prompt=(*head, 30, 31))
    whole = Request(2, one.prompt, Sampling(max_new_tokens=1), prompt_log_probs=1)
    for request in (one, other, whole):
        scheduler.submit(request)
    starts = {part.sequence.request.number: part.start for part in scheduler.plan()}
    assert starts == {0: 0, 1: 8, 2: 0}  # row 9 predicts the first token that is scored
    assert isinstance(scheduler.pool, PagePool) and scheduler.num_computed == 12 + 4 + 12


def test_the_record_is_read_again_without_a_torn_line(tmp_path: Path) -> None:
    path, request = tmp_path / "requests.jsonl", Request(0, (1, 2), Sampling(max_new_tokens=1), candidates=(3,))
    record = Record(path, "model")
    outcome = Outcome((4,), ((-0.123456789012345, 5), (-2.0, -1)), "length")
    record.add(record.key(request), outcome)
    record.close()
    with path.open("a") as handle:
        handle.write('{"key": "torn')
    again = Record(path, "model")
    assert again.num_found == 1 and again.get(again.key(replace(request, number=7))) == outcome
    again.close()


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": (1, 3)}, {"candidates": (4,)}, {"scores_from": 2}, {"prompt_log_probs": 1}, {"stop": ("\n",)},
        {"ends": frozenset([0])}, {"stream": 1}, {"sampling": Sampling(max_new_tokens=1, temperature=0.5)},
    ],
    ids=str,
)  # fmt: skip
def test_requests_that_differ_have_other_keys(change: dict[str, Any]) -> None:
    record, request = Record(None, "model"), Request(0, (1, 2), Sampling(max_new_tokens=1), candidates=(3,))
    assert record.key(replace(request, **change)) != record.key(request)
    assert Record(None, "other").key(request) != record.key(request)


def test_a_mark_depends_on_every_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"0" * 100)
    (tmp_path / "config.json").write_text("{}")
    before = model_mark(tmp_path, ["fp32"])
    assert model_mark(tmp_path, ["fp32"]) == before != model_mark(tmp_path, ["bf16"])
    (tmp_path / "model.safetensors").write_bytes(b"0" * 99 + b"1")
    assert model_mark(tmp_path, ["fp32"]) != before


def test_a_curve_over_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llm_parallel.checkpoint.folders import COMPLETE, folder_name

    for step in (20, 100):
        folder = tmp_path / "run" / "checkpoints" / folder_name(step)
        folder.mkdir(parents=True)
        for name in COMPLETE:
            (folder / name).write_text("")
    asked: list[EvaluateRequest] = []

    def evaluate(request: EvaluateRequest) -> int:
        asked.append(request)
        assert request.out is not None
        value = len(asked) / 4
        write_results(request.out, {
            "results": {"boolq": {"alias": "boolq", "acc,none": value, "acc_stderr,none": 0.1}},
            "configs": {"boolq": {}}, "samples": {"boolq": [{"doc_id": 0}]},
        })  # fmt: skip
        return 0

    assert curve_command(EvaluateRequest(str(tmp_path / "run"), curve=True, tasks=("boolq",)), evaluate) == 0
    assert [Path(one.model).name for one in asked] == [folder_name(20), folder_name(100)]
    out = tmp_path / "run" / "evaluations"
    points = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    assert [(point["step"], point["value"], point["error"]) for point in points] == [(20, 0.25, 0.1), (100, 0.5, 0.1)]
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "| boolq | acc | 25.0 | 50.0 |" in capsys.readouterr().out

    # The run goes on: step 20 goes, 200 and 300 come, and 200 goes again while it is read.
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / folder_name(20)).rename(checkpoints / folder_name(300))
    shutil.copytree(checkpoints / folder_name(300), checkpoints / folder_name(200))
    other = out / folder_name(10)
    shutil.copytree(out / folder_name(20), other)
    (other / "results.json").write_text((other / "results.json").read_text().replace("{", '{"n-shot": {"a": 5}, ', 1))

    def removed(request: EvaluateRequest) -> int:
        if request.model.endswith("200"):
            shutil.rmtree(request.model)
            raise FileNotFoundError(request.model)
        return evaluate(request)

    assert curve_command(EvaluateRequest(str(tmp_path / "run"), curve=True, tasks=("boolq",)), removed) == 0
    points = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    assert [(point["step"], point["value"]) for point in points] == [(20, 0.25), (100, 0.75), (300, 1.0)]
    said = capsys.readouterr().err
    assert "[iter_0000200 was removed by the run meanwhile and is left out]" in said
    assert "[not in the curve, since they were evaluated with other settings: iter_0000010]" in said


def test_points_are_of_groups_and_of_tasks_outside() -> None:
    results = {
        "results": {"a": {"acc,none": 0.5}, "b": {"acc,none": 0.25, "alias": "b"}},
        "groups": {"g": {"acc,none": 0.5, "acc_stderr,none": "N/A"}}, "group_subtasks": {"g": ["a"]},
    }  # fmt: skip
    assert [(point.task, point.value, point.error) for point in points_of(3, results)] == [
        ("b", 0.25, None),
        ("g", 0.5, None),
    ]


def test_a_curve_of_a_folder_without_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        curve_command(EvaluateRequest(str(tmp_path), curve=True), lambda _: 0)
