"""What judges read of a record, in words; and whether they can judge an answer to it at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from llm_parallel.config.tree_online import JudgeConfig
from llm_parallel.errors import UserError
from llm_parallel.tasks.base import Asked, Given, JudgeFailed
from llm_parallel.tasks.code import Pairs, read_tests
from llm_parallel.tasks.open import open_judge
from llm_parallel.tasks.text import Regex, last_number, right_ones

BY_RECORD = ("exact", "contains", "number", "regex", "json")
"""Judges that compare with the record alone, and can be asked before there is an answer."""
MOST = 120


def check_records(judges: Sequence[JudgeConfig], asked: Iterable[Asked], field: str = "method.rollout.judges") -> None:
    """Raises UserError if a judge could not judge an answer to one of the records: a field is missing, or holds no
    right answer. Judges that are programs or models are not asked."""
    records = list(asked)
    for number, one in enumerate(judges):
        if one.kind not in BY_RECORD:
            continue
        judge = open_judge([one], field)
        problems = [said for record in records if (said := _problem(judge, record))]
        if problems:
            raise UserError(
                f"{field}.{number}.kind = {one.kind} cannot judge answers to {len(problems):,} of {len(records):,} "
                f"prompts: {problems[0]}"
            )


def _problem(judge: Any, asked: Asked) -> str | None:
    try:
        judge(asked, Given("", 0))
    except JudgeFailed as error:
        return str(error)
    return None


def readings(judges: Sequence[JudgeConfig], asked: Asked) -> list[str]:
    """For each judge a sentence about what it takes for a good answer to a record. Raises JudgeFailed."""
    return [_reading(judge, asked) + (f", times {judge.weight:g}" if judge.weight != 1 else "") for judge in judges]


def _reading(judge: JudgeConfig, asked: Asked) -> str:
    if judge.kind in ("exact", "contains", "number"):
        right = right_ones(asked, judge.field)
        if judge.kind == "number":
            return f"1 if the answer's last number is {_any([str(last_number(one)) for one in right])}"
        verb = "is" if judge.kind == "exact" else "contains"
        return f"1 if the answer {verb} {_any([repr(one.strip()) for one in right])}"
    if judge.kind == "regex":
        assert judge.pattern is not None
        return f"1 if {_short(Regex(judge.pattern).filled(asked))} is found in the answer"
    if judge.kind == "json":
        schema = asked.field(judge.field, "holds the JSON schema")
        return f"1 if the answer is JSON that fits {_short(schema if isinstance(schema, str) else json.dumps(schema))}"
    if judge.kind == "length":
        return f"minus the share of tokens over {judge.max_tokens}"
    if judge.kind == "function":
        names = ", ".join(map(str, asked.fields)) or "none"
        return f"what {judge.function} of {judge.file} returns, which is told the fields {names}"
    if judge.kind == "code":
        return _reading_of_tests(judge, asked)
    if judge.kind == "model":
        low, high = judge.scale
        named = f"what {judge.model} at {judge.url} says of the answer"
        return f"{named} and of {judge.field}" if judge.reads == "pair" else f"{named}, from {low:g} to {high:g}"
    if judge.kind == "reward_model":
        return f"what the reward model in {judge.folder} says of the prompt with the answer"
    return f"what the judge of kind {judge.kind} says"


def _reading_of_tests(judge: JudgeConfig, asked: Asked) -> str:
    tests = read_tests(asked)
    if isinstance(tests, Pairs):
        what = f"writes what it should for {len(tests.inputs)} inputs, such as {_short(repr(tests.inputs[0]))}"
    else:
        name = f"the function {tests.entry_point}" if tests.entry_point else "its functions"
        what = f"passes {tests.tests.count('assert ')} assertions on {name}"
    return f"the share of the tests that it passes: {what}" if judge.pays == "share" else f"1 if it {what}"


def _any(texts: Sequence[str]) -> str:
    return _short(" or ".join(texts))


def _short(text: str) -> str:
    return text if len(text) <= MOST else f"{text[:MOST]} …"
