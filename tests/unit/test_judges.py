"""Judges of answers, as a table of answers and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_parallel.config.tree_online import JudgeConfig
from llm_parallel.errors import UserError
from llm_parallel.tasks.base import Asked, Given, JudgeFailed
from llm_parallel.tasks.open import open_judge


def score(record: dict[str, Any], answer: str, tokens: int = 5, **settings: Any) -> float:
    judge = open_judge([JudgeConfig(**settings)])
    return judge(Asked([{"role": "user", "content": "?"}], record, "a.jsonl:3"), Given(answer, tokens))


CASES = [
    ({"kind": "exact"}, {"answer": "4"}, " 4\n", 1.0),
    ({"kind": "exact"}, {"answer": 4}, "4", 1.0),
    ({"kind": "exact"}, {"answer": ["four", "4"]}, "four", 1.0),
    ({"kind": "exact"}, {"answer": "4"}, "4.", 0.0),
    ({"kind": "exact", "field": "right"}, {"right": "x"}, "x", 1.0),
    ({"kind": "contains"}, {"answer": "Paris"}, "It is Paris.", 1.0),
    ({"kind": "contains"}, {"answer": ["Paris", "Lutetia"]}, "Rome", 0.0),
    ({"kind": "number"}, {"answer": "so 1,234.50 in all"}, "5 and 6, in all 1234.5", 1.0),
    ({"kind": "number"}, {"answer": -3}, "the result is \u22123.", 1.0),
    ({"kind": "number"}, {"answer": 3}, "13", 0.0),
    ({"kind": "number"}, {"answer": 3}, "none", 0.0),
    ({"kind": "number"}, {"answer": "#### 72"}, "48/2 = 24\n48+24 = 72\n#### 72", 1.0),
    ({"kind": "regex", "pattern": r"^\d+$"}, {}, "42", 1.0),
    ({"kind": "regex", "pattern": r"= {answer}\b"}, {"answer": "1+1"}, "x = 1+1", 1.0),
    ({"kind": "regex", "pattern": r"= {answer}\b"}, {"answer": "1+1"}, "x = 11", 0.0),
    ({"kind": "json", "field": "schema"}, {"schema": {"type": "object", "required": ["a"]}}, '{"a": 1}', 1.0),
    ({"kind": "json", "field": "schema"}, {"schema": '{"type": "array"}'}, "Here:\n```json\n[1]\n```", 1.0),
    ({"kind": "json", "field": "schema"}, {"schema": {"type": "array"}}, "[1", 0.0),
    ({"kind": "length", "max_tokens": 4}, {}, "a b c d", -0.25),
    ({"kind": "length", "max_tokens": 8}, {}, "a b c d", 0.0),
    ({"kind": "exact", "weight": -2.0}, {"answer": "a"}, "a", -2.0),
]


@pytest.mark.parametrize(("settings", "record", "answer", "expected"), CASES)
def test_an_answer_has_the_score_that_it_should(
    settings: dict[str, Any], record: dict[str, Any], answer: str, expected: float
) -> None:
    assert score(record, answer, **settings) == expected


UNJUDGED = [
    ({"kind": "exact"}, {"question": "?"}, "a.jsonl:3 has no field 'answer', which holds the right answer; its fields"),
    ({"kind": "exact"}, {"answer": {"x": 1}}, "has answer = {'x': 1}; it must be a text, a number or a list of these"),
    ({"kind": "exact"}, {"answer": []}, "has answer = []"),
    ({"kind": "number"}, {"answer": "none"}, "has answer = 'none', which has no number"),
    ({"kind": "regex", "pattern": "{word}"}, {}, "has no field 'word', which the pattern names"),
    ({"kind": "json", "field": "schema"}, {"schema": "{"}, "a field schema that is no JSON"),
    ({"kind": "json", "field": "schema"}, {"schema": {"type": "nonsense"}}, "a field schema that is no JSON schema"),
]


@pytest.mark.parametrize(("settings", "record", "said"), UNJUDGED)
def test_a_record_that_cannot_be_judged_is_an_error_and_no_zero(
    settings: dict[str, Any], record: dict[str, Any], said: str
) -> None:
    with pytest.raises(JudgeFailed) as failed:
        score(record, "1", **settings)
    assert said in str(failed.value)


FUNCTIONS = {
    "return 'good'": "returned 'good'; it must return a finite number",
    "return float('nan')": "returned nan; it must return a finite number",
    "return None": "returned None",
    "raise KeyError('x')": "raised KeyError: 'x' (for a.jsonl:3)",
    "raise SystemExit(0)": "raised SystemExit: 0 (for a.jsonl:3)",
    "import numpy; return numpy.ones(2)": "returned array([1., 1.])",
    "import numpy; return numpy.float32('inf')": "it must return a finite number",
    "return 'x' * 9999": "x …; it must return a finite number",
    "import time; time.sleep(60)": "has not returned within 0.02 s (for a.jsonl:3); mend it, or raise its timeout_s",
    "while True:\n        try: [].x\n        except Exception: pass": "has not returned within 0.02 s",
}


@pytest.mark.parametrize("body", FUNCTIONS)
def test_a_function_that_gives_no_number_is_an_error(body: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"def reward(**_):\n    {body}\n")
    with pytest.raises(JudgeFailed) as failed:
        score({}, "x", kind="function", file=str(file), timeout_s=0.02)
    assert FUNCTIONS[body] in str(failed.value)


def test_a_function_is_told_all_there_is(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def mine(prompt, answer, record, complete):\n"
        "    return (prompt[0]['content'] == '?') + 2 * (answer == 'x') + 4 * (record['a'] == 1) + 8 * complete\n"
    )
    assert score({"a": 1}, "x", kind="function", file=str(file), function="mine") == 15.0


WRONG = [
    ([], "method.rollout.judges is empty; give at least one judge"),
    ([{"kind": "regex"}], "method.rollout.judges.0.pattern is not given"),
    ([{"kind": "exact"}, {"kind": "regex", "pattern": "("}], "method.rollout.judges.1.pattern = '(' is no regular"),
    ([{"kind": "function"}], "method.rollout.judges.0.file is not given"),
    ([{"kind": "function", "file": "nowhere.py"}], "method.rollout.judges.0.file = nowhere.py is no file of Python"),
]


@pytest.mark.parametrize(("judges", "said"), WRONG)
def test_settings_that_cannot_be_are_refused(judges: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(UserError) as refused:
        open_judge([JudgeConfig(**one) for one in judges])
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [("import nothing_like_this", "fails with ModuleNotFoundError"), ("x = 1", "function = reward is no function of")],
)
def test_a_file_without_the_function_is_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        open_judge([JudgeConfig(kind="function", file=str(file))])
    assert said in str(refused.value)
