"""The judge of programs: records in three forms, programs in several, and what cannot be judged."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_parallel.config.tree_online import JudgeConfig
from llm_parallel.errors import UserError
from llm_parallel.tasks.ahead import Ahead
from llm_parallel.tasks.base import Asked, Given, JudgeFailed
from llm_parallel.tasks.code import Code, programs, read_tests, same_output
from llm_parallel.tasks.open import open_judge
from llm_parallel.tasks.readings import readings
from llm_parallel.tasks.sandbox import Limits, Sandbox, SandboxFailed, Tested

HUMAN_EVAL = {
    "prompt": 'from typing import List\n\n\ndef both(a: int, b: int) -> List[int]:\n    """ Both of them.\n    """\n',
    "entry_point": "both",
    "test": "def check(candidate):\n    assert candidate(1, 2) == [1, 2]\n    assert candidate(0, 0) == [0, 0]\n",
}
CHAT = {**HUMAN_EVAL, "prompt": f"Complete this.\n```python\n{HUMAN_EVAL['prompt']}```\n"}
MBPP = {"test_list": ["assert f(1) == 2", "assert f(2) == 3"], "test_setup_code": "import math", "text": "Add one."}
STREAMS = {"input_output": json.dumps({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]})}
CALLED = {"input_output": {"inputs": [[[1, 2]], [[3]]], "outputs": [3, 3], "fn_name": "total"}}
TREE = {
    "test_setup_code": "import math\nroot = Node(1)\nroot.left = Node(2)\nroot.left.right = Node(math.floor(4.5))",
    "test_list": ["assert depth(root) == 3", "assert root.left.right.key == 4"],
}
NODE = """class Node:
    def __init__(self, key): self.key, self.left, self.right = key, None, None
def depth(node): return 0 if node is None else 1 + max(depth(node.left), depth(node.right))
"""
BODY = "    return [a, b]\n"
WHOLE = "def both(a: int, b: int) -> List[int]:\n    return [a, b]\n"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    try:
        with Sandbox(limits=Limits(memory_bytes=256 << 20), workers=2) as found:
            yield found
    except SandboxFailed as error:
        pytest.skip(str(error))


CASES: list[tuple[dict[str, Any], str, bool, float]] = [
    (HUMAN_EVAL, BODY, False, 1.0),
    (HUMAN_EVAL, BODY + "\n\nprint(both(1,\n", False, 1.0),
    (HUMAN_EVAL, BODY + "\n\ndef next_one(:\n", False, 1.0),
    (HUMAN_EVAL, WHOLE, False, 1.0),
    (HUMAN_EVAL, f"Here it is:\n```python\n{WHOLE}```\nIt gives both.", False, 1.0),
    (
        HUMAN_EVAL,
        f"```python\nprint(1)\n```\nor\n```\n{WHOLE}```\nUse it:\n```python\nboth(1, 2)\n```",
        False,
        1.0,
    ),
    (HUMAN_EVAL, f"```python\n{WHOLE}", False, 1.0),
    (HUMAN_EVAL, f"```python\n{BODY}```", False, 1.0),
    (HUMAN_EVAL, "    return [0, 0]", False, 0.0),
    (HUMAN_EVAL, "    return [0, 0]", True, 0.5),
    (HUMAN_EVAL, "I do not know.", False, 0.0),
    (HUMAN_EVAL, "", False, 0.0),
    (HUMAN_EVAL, "    import os; os._exit(0)", True, 0.0),
    (HUMAN_EVAL, "    while True: a = [a, a]", True, 0.0),
    (CHAT, f"```python\n{WHOLE}```", False, 1.0),
    (CHAT, f"```\n{BODY}```", False, 1.0),
    ({**HUMAN_EVAL, "prompt": "Write a function both."}, f"```python\nfrom typing import List\n{WHOLE}```", False, 1.0),
    (MBPP, "[BEGIN]\ndef f(x): return x + 1\n[DONE]\nmore", False, 1.0),
    (MBPP, "def f(x): return x + 1\n[DONE]", False, 1.0),
    (MBPP, "```\ndef f(x): return 2\n```", True, 0.5),
    (MBPP, "def f(x): return", False, 0.0),
    (TREE, NODE, False, 1.0),
    (TREE, NODE.replace("1 +", "2 +"), True, 0.5),
    ({"test_list": ["assert sum(10, 15) == 6"]}, "def sum(a, b): return 6", False, 1.0),
    ({"test_list": ["assert sum(f(2)) == 6"]}, "def sum(a): return 6\ndef f(x): return [x]", False, 0.0),
    (STREAMS, "```py\nprint(sum(map(int, input().split())))\n```", False, 1.0),
    (STREAMS, "print(3)", True, 0.5),
    (STREAMS, "print(3)", False, 0.0),
    (STREAMS, "exit(0)", True, 0.0),
    ({"inputs": ["a"], "outputs": ["a"]}, "print(input())", False, 1.0),
    (CALLED, "class Solution:\n    def total(self, x): return sum(x)", False, 1.0),
    (CALLED, "def total(x): return (sum(x),)", False, 0.0),
    (CALLED, "def total(x): return 3", False, 1.0),
]


@pytest.mark.processes
@pytest.mark.parametrize(("record", "answer", "share", "expected"), CASES)
def test_a_program_has_the_score_that_it_should(
    record: dict[str, Any], answer: str, share: bool, expected: float, sandbox: Sandbox
) -> None:
    assert Code(sandbox, share)(Asked([], record, "a.jsonl:3"), Given(answer, 1)) == expected


UNJUDGED: list[tuple[dict[str, Any], str]] = [
    ({"question": "?"}, "a.jsonl:3 has no tests that are known: give test with entry_point (HumanEval), test_list"),
    ({"test_list": [], "test_setup_code": "x = ("}, "has test_list = []; it must be a list of texts"),
    ({"test_list": 5}, "has test_list = 5; it must be a list of texts"),
    ({"test": 5, "entry_point": "f"}, "has test = 5; it must be a text"),
    ({"input_output": "{"}, "has input_output = '{', which is no JSON"),
    ({"input_output": "[]"}, "has input_output = []; it must hold inputs and outputs"),
    ({"input_output": {"inputs": [1], "outputs": []}}, "has 1 inputs and 0 outputs in input_output; there must be"),
    ({"inputs": [[1]], "outputs": [1], "fn_name": "a b"}, "has fn_name = 'a b' in the record, which is no name"),
]


@pytest.mark.parametrize(("record", "said"), UNJUDGED)
def test_a_record_without_tests_is_an_error(record: dict[str, Any], said: str) -> None:
    with pytest.raises(JudgeFailed) as failed:
        read_tests(Asked([], record, "a.jsonl:3"))
    assert said in str(failed.value)


@pytest.mark.processes
def test_tests_that_are_none_are_an_error_and_no_zero(sandbox: Sandbox) -> None:
    for record in ({"test": "def check(", "entry_point": "f"}, {"test_list": ["assert f("]}):
        with pytest.raises(JudgeFailed, match=r"the tests of a\.jsonl:3 cannot be run: the tests are no Python"):
            Code(sandbox)(Asked([], record, "a.jsonl:3"), Given("def f(): pass", 1))


class Broken:
    workers = 2

    def run(self, job: object) -> None:
        raise SandboxFailed("it is broken")


def test_a_sandbox_that_fails_is_an_error_and_no_zero() -> None:
    with pytest.raises(JudgeFailed, match=r"the tests of a\.jsonl:3 cannot be run: it is broken"):
        Code(Broken())(Asked([], MBPP, "a.jsonl:3"), Given("def f(x): return x", 1))  # type: ignore[arg-type]


def test_what_a_program_may_be() -> None:
    code = str(HUMAN_EVAL["prompt"])
    assert programs(BODY, code, "both")[0] == code + BODY
    assert programs(WHOLE, code, "both") == ("from typing import List\n\n\n" + WHOLE,)
    assert programs("x = 1\n\nand prose", "", None) == ("x = 1\n\nand prose",)
    assert programs("```text\nno\n```\n```python\nx = 1\n```", "", None) == ("x = 1\n",)
    assert programs("    ```python\n    x = 1\n    ```", "", None) == ("    x = 1\n",)


def test_outputs_are_compared_by_lines() -> None:
    assert same_output("1 \n2\n\n", "1\n2")
    assert not same_output("1\n\n2", "1\n2") and not same_output("1 2", "1\n2") and not same_output("", "0")


class Counting:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, asked: Asked, given: Given) -> float:
        self.calls += 1
        if given.text == "bad":
            raise JudgeFailed("it cannot be judged")
        return float(given.tokens)


def test_what_was_judged_ahead_is_not_judged_again() -> None:
    counting = Counting()
    ahead = Ahead(counting, 3)
    items = [(Asked([], {"a": number}, "x"), Given("bad" if number == 2 else "good", number)) for number in range(5)]
    ahead.prepare(items)
    assert counting.calls == 5
    for number, item in enumerate(items):
        if number == 2:
            with pytest.raises(JudgeFailed):
                ahead(*item)
        else:
            assert ahead(*item) == number
    assert counting.calls == 5
    assert ahead(*items[0]) == 0 and counting.calls == 6


@pytest.mark.processes
def test_a_run_names_it(sandbox: Sandbox, tmp_path: Path) -> None:
    config = JudgeConfig(kind="code", pays="share", weight=2.0, sandbox=sandbox.mode)
    judge = open_judge([config])
    items = [(Asked([], MBPP, "x"), Given(f"def f(x): return {one}", 1)) for one in ("x + 1", "2", "0")]
    judge.prepare(items)
    assert [judge(*item) for item in items] == [2.0, 1.0, 0.0]
    assert readings([config], Asked([], MBPP)) == [
        "the share of the tests that it passes: passes 2 assertions on its functions, times 2"
    ]
    with pytest.raises(UserError, match=r"judges\.0\.packages names .*nowhere, which is no folder"):
        open_judge([JudgeConfig(kind="code", packages=(str(tmp_path / "nowhere"),))])
    (tmp_path / "own.py").write_text("def two(): return 2\n")
    tmp_path.chmod(0o755)
    with_packages = open_judge([JudgeConfig(kind="code", packages=(str(tmp_path),), sandbox=sandbox.mode)])
    assert with_packages(Asked([], MBPP), Given("import own\ndef f(x): return x + own.two() - 1", 1)) == 1.0


@pytest.mark.processes
def test_no_way_to_hold_programs_is_said_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_parallel.tasks.sandbox_worker.shutil.which", lambda _: None)
    with pytest.raises(UserError, match=r"judges\.0\.sandbox = bwrap: no way to hold programs works here"):
        open_judge([JudgeConfig(kind="code", sandbox="bwrap")])


GIVEN, MBPP_FILE = os.environ.get("HUMAN_EVAL_FILE", ""), os.environ.get("MBPP_FILE", "")


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(not GIVEN, reason="HUMAN_EVAL_FILE names no file HumanEval.jsonl.gz, which openai/human-eval has")
@pytest.mark.parametrize("mode", ["bwrap", "landlock"])
def test_all_right_answers_of_human_eval_pass_and_no_empty_one(mode: Any) -> None:
    opened = gzip.open if GIVEN.endswith(".gz") else open
    with opened(GIVEN, "rt", encoding="utf-8") as file:  # type: ignore[operator]
        rows = [json.loads(line) for line in file]
    with Sandbox(mode) as sandbox:
        judge = Ahead(Code(sandbox), sandbox.workers)
        asked = [Asked([], row, row["task_id"]) for row in rows]
        right = [(one, Given(row["canonical_solution"], 1)) for one, row in zip(asked, rows)]
        judge.prepare(right)
        assert [item[0].where for item in right if judge(*item) != 1.0] == []
        wrong = [(one, Given("    return None\n", 1)) for one in asked]
        judge.prepare(wrong)
        assert [item[0].where for item in wrong if judge(*item) != 0.0] == []
        assert len(rows) == 164
        assert sandbox.run(Tested("def f(): return 1", "assert f() == 1")).mode == mode


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(not MBPP_FILE, reason="MBPP_FILE names no file mbpp.jsonl, which google-research has")
@pytest.mark.parametrize("mode", ["bwrap", "landlock"])
def test_all_right_answers_of_mbpp_pass(mode: Any) -> None:
    rows = [json.loads(line) for line in Path(MBPP_FILE).read_text(encoding="utf-8").splitlines()]
    with Sandbox(mode) as sandbox:
        judge = Ahead(Code(sandbox), sandbox.workers)
        right = [(Asked([], row, str(row["task_id"])), Given(row["code"], 1)) for row in rows]
        judge.prepare(right)
        assert [item[0].where for item in right if judge(*item) != 1.0] == []
    assert len(rows) > 900
