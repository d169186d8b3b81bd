"""Statistics of two evaluations against scipy, and causes that were planted in made-up results."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats as scipy_stats

from llm_parallel.errors import UserError
from llm_parallel.evaluate.causes import causes, prompt_difference
from llm_parallel.evaluate.compare import compare_command, contributions
from llm_parallel.evaluate.pairs import pairs_of
from llm_parallel.evaluate.results import read_results, show_results, table_rows
from llm_parallel.evaluate.stats import EXACT, bootstrap_interval, mcnemar, paired
from llm_parallel.metrics.task_plots import widen


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (3, 0), (7, 2), (40, 25), (900, 980)])
def test_mcnemar_is_the_binomial_test(better: int, worse: int) -> None:
    wanted = scipy_stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert mcnemar(better, worse) == pytest.approx(wanted, rel=1e-9)


def test_mcnemar_of_many_is_the_normal_one() -> None:
    count = EXACT + 2
    exact = scipy_stats.binomtest(count // 2 + 40, count).pvalue
    assert mcnemar(count // 2 + 40, count // 2 - 40) == pytest.approx(exact, rel=0.02)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_interval(draw.choice([-1.0, 0.0, 1.0], 200, p=[0.1, 0.75, 0.15]), seed, 400)
        covered += low <= 0.05 <= high
    assert 0.9 <= covered / 200 <= 0.99


def test_paired_counts() -> None:
    found = paired([0, 1, 1, 0], [1, 1, 0, 1])
    assert (found.first, found.second, found.better, found.worse, found.count) == (0.5, 0.75, 2, 1, 4)
    assert found.p == 1.0 and found.low <= 0.25 <= found.high
    assert paired([0.2, 0.5], [0.4, 0.1]).p is None
    assert paired([0.0, 0.5], [1.0, 1.0]).p is None and paired([0.0, 1.0], [1.0, 0.5]).p is None


def results(**ours: Any) -> dict[str, Any]:
    """An evaluation of two tasks: one of choices, one of texts."""
    samples: dict[str, list[dict[str, Any]]] = {"choices": [], "texts": []}
    for number in range(8):
        prompt = (
            f"Question: what is {number}?\nAnswer: it is.\n\nQuestion: what comes after the number {number}?\nAnswer:"
        )
        common = {"doc_id": number, "doc_hash": f"h{number}", "filter": "none"}
        samples["choices"].append({
            **common, "arguments": [[prompt, " yes"], [prompt, " no"]],
            "resps": [[[-1.0 - number / 8, True]], [[-2.0, False]]], "metrics": ["acc"], "acc": 1.0,
        })  # fmt: skip
        samples["texts"].append({
            **common, "arguments": [[prompt, {"until": ["\n"], "max_gen_toks": 32}]], "resps": [[f" {number + 1}"]],
            "metrics": ["exact_match"], "exact_match": 1.0,
        })  # fmt: skip
    described = {"begin": [], "precision": "fp32", "weights": "saved", "model": "m", "context": 512, "truncated": {}}
    return {
        "results": {}, "configs": {"choices": {}, "texts": {}}, "n-shot": {"choices": 1, "texts": 1}, "versions": {},
        "config": {"model": "EngineLM"}, "llm_parallel": {**described, **ours}, "samples": samples,
    }  # fmt: skip


def with_prompts(change: Callable[[str], str]) -> dict[str, Any]:
    made = results()
    for sample in [*made["samples"]["choices"], *made["samples"]["texts"]]:
        sample["arguments"] = [[change(one[0]), one[1]] for one in sample["arguments"]]
    return made


def with_numbers(error: float, **ours: Any) -> dict[str, Any]:
    made, draw = results(**ours), np.random.default_rng(0)
    for sample in made["samples"]["choices"]:
        sample["resps"] = [[[one[0][0] + error * draw.normal(), one[0][1]]] for one in sample["resps"]]
    return made


def with_stops(stops: list[str]) -> dict[str, Any]:
    made = results()
    for sample in made["samples"]["texts"]:
        sample["arguments"][0][1]["until"] = stops
    return made


def without_first(prompt: str) -> str:
    return "Question: how are you?\nAnswer: it is.\n\n" + prompt.split("\n\n", 1)[1]


PLANTED: dict[str, tuple[dict[str, Any], str]] = {
    "BOS": (with_numbers(1.5, begin=["<s>"]), "begin token (BOS)"),
    "trailing space": (with_prompts(lambda prompt: prompt + " "), "trailing space"),
    "trailing space in examples too": (
        with_prompts(lambda prompt: prompt.replace("Answer:", "Answer: ")), "trailing space",
    ),
    "two spaces": (with_prompts(lambda prompt: prompt.replace("Answer: it", "Answer:  it")), "white space"),
    "stop string": (with_stops(["\n", "."]), "stop strings"),
    "other shots": (with_prompts(without_first), "few-shot examples"),
    "bf16": (with_numbers(0.02, precision="bf16"), "precision"),
    "bf16 that nobody notes": (with_numbers(0.02), "precision or kernels"),
    "template": (
        with_prompts(lambda prompt: f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"), "chat template",
    ),
    "truncation": (results(context=256, truncated={"choices": 4}), "truncation"),
    "another model": (with_numbers(2.0), "another model, or other tokens before the text"),
    "BOS in the text": (with_prompts(lambda prompt: "<s>" + prompt), "begin token"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_cause_is_the_only_one_that_is_named(name: str) -> None:
    other, wanted = PLANTED[name]
    for first, second in ((results(), other), (other, results())):
        found = causes(first, second, pairs_of(first, second))
        assert [cause.name for cause in found] == [wanted], found


def test_nothing_is_named_where_nothing_differs() -> None:
    close = with_numbers(1e-4)
    assert not causes(results(), close, pairs_of(results(), close))


def test_the_number_of_shots_is_told() -> None:
    other = with_prompts(lambda prompt: prompt.split("\n\n", 1)[1])
    other["n-shot"] = {"choices": 0, "texts": 0}
    (found,) = causes(results(), other, pairs_of(results(), other))
    assert found.name == "few-shot examples" and "1 and 0" in found.evidence


def test_wording_is_told_from_examples() -> None:
    assert prompt_difference("Q: What is it?\nA:", "Question: What is that thing?\nAnswer:") == "wording"


def test_contributions_weigh_tasks_by_their_documents() -> None:
    compared = {
        ("small", "acc"): paired([0.0] * 10, [1.0] * 10),
        ("large", "acc"): paired([0.0] * 90, [0.0] * 60 + [1.0] * 30),
    }
    assert contributions(["small", "large"], compared, "acc") == [
        ("large", pytest.approx(0.3)), ("small", pytest.approx(0.1)),
    ]  # fmt: skip


def test_the_command_prints_changes_and_causes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = results(), copy.deepcopy(PLANTED["stop string"][0])
    second["samples"]["texts"][3].update(exact_match=0.0, resps=[["4 apples are"]])
    for name, content in (("a.json", first), ("b.json", second)):
        (tmp_path / name).write_text(json.dumps(content))
    assert compare_command(tmp_path / "a.json", tmp_path / "b.json") == 0
    out = capsys.readouterr().out
    assert "| texts | exact_match | 8 | 8 | 100.0 | 87.5 | -12.5 |" in out
    assert "texts: 1 documents have another score: 3" in out and "| 4 | 4 apples are |" in out
    assert "stop strings | 8 requests have until ['\\n'] and ['\\n', '.']" in out


def write_as_lm_eval(folder: Path, date: str, made: dict[str, Any]) -> Path:
    """Files as lm-eval's --output_path gets them with --log_samples."""
    folder.mkdir(exist_ok=True)
    for task, samples in made["samples"].items():
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
        (folder / f"samples_{task}_{date}.jsonl").write_text("".join(lines))
    file = folder / f"results_{date}.json"
    file.write_text(json.dumps({key: value for key, value in made.items() if key != "samples"}))
    return file


def test_each_of_lm_evals_results_has_its_own_samples(tmp_path: Path) -> None:
    """lm-eval writes every run of a model into one folder, and one task's name may begin as another's."""
    first, second = results(), results()
    first["samples"]["texts"][0]["resps"] = [["a\u2028b\x85c"]]
    second["samples"]["texts"][3].update(exact_match=0.0)
    for made in (first, second):
        made["configs"]["texts_more"] = made["configs"]["texts"]
        made["samples"]["texts_more"] = [{**sample, "doc_hash": "other"} for sample in made["samples"]["texts"]]
    one = write_as_lm_eval(tmp_path / "m", "2026-11-30T10-00-00.000001", first)
    other = write_as_lm_eval(tmp_path / "m", "2026-11-30T11-00-00.000001", second)
    assert read_results(one)["samples"] == first["samples"]
    assert read_results(other)["samples"] == second["samples"]
    with pytest.raises(UserError, match=r"holds 2 results of lm-eval; give one of them, as .*T11-00-00"):
        read_results(tmp_path)
    other.unlink()
    assert read_results(tmp_path)["samples"] == first["samples"]
    (tmp_path / "m" / "samples_texts_2026-11-30T10-00-00.000001.jsonl").unlink()
    with pytest.raises(UserError, match="evaluate with lm-eval's --log_samples, which writes them"):
        read_results(one)


def test_prompts_that_were_cut_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    show_results({**results(context=256, truncated={"choices": 4})})
    assert (
        "[choices: 4 requests with their answers were longer than the model's context of 256" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{", "is no JSON"),
        ("[]", "holds no results of an evaluation"),
        (json.dumps({"results": {}, "configs": {"a": {}}}), "has no samples of a beside it"),
        (json.dumps({**results(), "samples": {"else": [{"doc_hash": "x"}]}}), "have no document in common"),
    ],
)
def test_files_that_cannot_be_compared(content: str | None, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(results()))
    if content is not None:
        (tmp_path / "b.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        compare_command(tmp_path / "a.json", tmp_path / "b.json")


def test_a_document_with_two_filters_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for name, score in (("first", 1.0), ("second", 0.0)):
        made = results()
        made["samples"]["texts"] = [
            {**sample, "filter": filtered, "exact_match": score if sample["doc_id"] < 3 else 1.0}
            for sample in made["samples"]["texts"]
            for filtered in ("strict-match", "flexible-extract")
        ]
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(made))
    assert compare_command(*files) == 0
    said = capsys.readouterr().out
    for filtered in ("strict-match", "flexible-extract"):
        assert f"| texts | exact_match ({filtered}) | 8 | 8 | 100.0 | 62.5 |" in said
    assert "texts: 3 documents have another score: 0, 1, 2\n" in said


@pytest.mark.parametrize(("value", "wanted"), [(0.0, (-0.1, 1.9)), (10.0, (9.0, 11.0))])
def test_a_picture_shows_two_points_at_least(value: float, wanted: tuple[float, float]) -> None:
    axes = Figure().add_subplot()
    axes.plot([0, 40], [value, value])
    widen(axes)
    assert axes.get_ylim() == pytest.approx(wanted)
    axes.plot([80], [50.0])
    axes.relim()
    axes.autoscale()
    before = axes.get_ylim()
    widen(axes)
    assert axes.get_ylim() == before


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [("torch.float32", "fp32", False), ("torch.bfloat16", "bf16", False), ("torch.float32", "bfloat16", True)],
)
def test_names_of_precisions_of_both_programs(first: str, second: str, said: bool) -> None:
    """Of results without our facts, as lm-eval's own are."""
    pair = [{**results(), "config": {"model": "hf", "model_dtype": dtype}} for dtype in (first, second)]
    for one in pair:
        del one["llm_parallel"]
    found = causes(*pair, pairs_of(*pair))
    assert [cause.name for cause in found] == (["precision"] if said else [])


def test_other_scores_of_the_same_answers_and_other_answers_to_the_same_prompts() -> None:
    judged = results()
    judged["samples"]["texts"][0]["exact_match"] = 0.0
    one = results()
    (cause,) = causes(one, judged, pairs_of(one, judged))
    assert (cause.name, cause.evidence) == ("scoring", "1 documents have the same answers and other scores")
    rounded = results()
    rounded["samples"]["texts"][3]["resps"] = [[" another"]]
    (cause,) = causes(one, rounded, pairs_of(one, rounded))
    assert cause.name == "rounding" and cause.evidence.startswith("1 answers to the same prompts differ")


def test_a_value_without_a_standard_error_has_none_in_the_table() -> None:
    found = {"results": {"one": {"acc,none": 0.5, "acc_stderr,none": "N/A", "f1,none": 0.25, "f1_stderr,none": 0.0}}}
    assert [(row[3], row[4], row[5]) for row in table_rows(found)] == [("acc", "50.0", ""), ("f1", "25.0", "0.0")]
