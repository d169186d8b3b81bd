"""A judge that runs the program in an answer, in the sandbox, on the tests of its record.

Three forms of records are read: HumanEval's (``prompt``, ``test``, ``entry_point``; Chen et al. 2021, arXiv
2107.03374), MBPP's (``test_list``, ``test_setup_code`` or ``test_imports``; Austin et al. 2021, arXiv 2108.07732) and
APPS' (inputs and outputs, of a function by ``fn_name`` or of the standard streams; Hendrycks et al. 2021, arXiv
2105.09938)."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llm_parallel.tasks.base import Asked, Given, JudgeFailed
from llm_parallel.tasks.sandbox import Sandbox, SandboxFailed, SandboxResult, Script, Tested

FENCED = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
PYTHON = ("python", "py", "python3", "")
COMPLETION_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```", "\nassert ")
"""Where the completion of a function is over, if it does not end by itself."""

SAME = """
def _plain(value):
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return {key: _plain(one) for key, one in value.items()} if isinstance(value, dict) else value
def _same(given, right):
    given, right = _plain(given), _plain(right)
    return given == right or (isinstance(right, list) and len(right) == 1 and given == right[0])
"""
"""APPS' comparison: tuples are lists, and a result may stand in a list of its own."""


@dataclass(frozen=True)
class Pairs:
    """What a program must write for what it reads."""

    inputs: Sequence[str]
    outputs: Sequence[str]


@dataclass(frozen=True)
class Tests:
    """Tests of a record. code: the beginning of the program, which an answer may complete; see ``Tested``."""

    tests: str
    setup: str = ""
    entry_point: str | None = None
    code: str = ""


def read_tests(asked: Asked) -> Tests | Pairs:
    """The tests of a record, in whichever of the three forms it has them. Raises JudgeFailed."""
    fields = asked.fields
    if fields.get("test") is not None and fields.get("entry_point") is not None:
        name = str(fields["entry_point"])
        code = _code_in(str(fields["prompt"]), name) if isinstance(fields.get("prompt"), str) else ""
        return Tests(f"{_text(asked, 'test')}\ncheck(candidate)\n", code, name, code)
    if fields.get("test_list") is not None:
        imports, others = _divided("\n".join(_texts(asked, "test_setup_code")))
        tests = [others, *_texts(asked, "test_list")]
        setup = [*_texts(asked, "test_imports"), imports]
        return Tests("\n".join(tests) + "\n", "\n".join(setup))
    if fields.get("input_output") is not None:
        return _input_output(_object(asked, "input_output"), asked, "input_output")
    if fields.get("inputs") is not None and fields.get("outputs") is not None:
        return _input_output(fields, asked, "the record")
    raise JudgeFailed(
        f"{asked.where} has no tests that are known: give test with entry_point (HumanEval), test_list (MBPP), or "
        f"input_output (APPS); its fields are {', '.join(map(repr, fields)) or 'none'}"
    )


@lru_cache(4096)
def _divided(setup: str) -> tuple[str, str]:
    """What is imported, which must work, and the rest, which may need the program (MBPP makes trees of ``Node``)."""
    try:
        statements = ast.parse(setup).body
    except (SyntaxError, ValueError):
        return setup, ""
    kinds = (ast.Import, ast.ImportFrom)
    parts = [[one for one in statements if isinstance(one, kinds) is wanted] for wanted in (True, False)]
    return "\n".join(map(ast.unparse, parts[0])), "\n".join(map(ast.unparse, parts[1]))


def _text(asked: Asked, name: str) -> str:
    value = asked.fields[name]
    if not isinstance(value, str):
        raise JudgeFailed(f"{asked.where} has {name} = {_short(value)}; it must be a text")
    return value


def _texts(asked: Asked, name: str) -> list[str]:
    value = asked.fields.get(name)
    if value is None:
        return []
    found = [value] if isinstance(value, str) else list(value) if hasattr(value, "__iter__") else [value]
    if not all(isinstance(one, str) for one in found) or (name == "test_list" and not any(found)):
        raise JudgeFailed(f"{asked.where} has {name} = {_short(value)}; it must be a list of texts")
    return found


def _object(asked: Asked, name: str) -> Mapping[str, Any]:
    value = asked.fields[name]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise JudgeFailed(f"{asked.where} has {name} = {_short(value)}, which is no JSON") from None
    if not isinstance(value, Mapping):
        raise JudgeFailed(f"{asked.where} has {name} = {_short(value)}; it must hold inputs and outputs")
    return value


def _input_output(held: Mapping[str, Any], asked: Asked, name: str) -> Tests | Pairs:
    inputs, outputs = list(held.get("inputs") or []), list(held.get("outputs") or [])
    if not inputs or len(inputs) != len(outputs):
        raise JudgeFailed(
            f"{asked.where} has {len(inputs)} inputs and {len(outputs)} outputs in {name}; there must be as many of "
            "both, and at least one"
        )
    function = held.get("fn_name")
    if function is None:
        return Pairs([_lines(one) for one in inputs], [_lines(one) for one in outputs])
    if not str(function).isidentifier():
        raise JudgeFailed(f"{asked.where} has fn_name = {_short(function)} in {name}, which is no name of a function")
    tests = [f"try:\n    _called = {function}\nexcept NameError:\n    _called = Solution().{function}"]
    tests += [f"assert _same(_called(*{list(given)!r}), {right!r})" for given, right in zip(inputs, outputs)]
    return Tests("\n".join(tests) + "\n", SAME)


def _lines(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]} …"


@lru_cache(4096)
def _code_in(prompt: str, name: str) -> str:
    """The part of a prompt that is Python with the head of the function, if there is one."""
    blocks = [block for _, block in FENCED.findall(prompt)]
    for text in (prompt, *blocks):
        if _defines(text, name):
            try:
                ast.parse(text)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
            return text
    return ""


def _defines(text: str, name: str | None) -> bool:
    return name is not None and re.search(rf"^(?:async\s+)?(?:def|class)\s+{re.escape(name)}\b", text, re.M) is not None


def programs(answer: str, code: str = "", name: str | None = None) -> tuple[str, ...]:
    """What the program of an answer may be, the likeliest first; the first that is Python is meant.

    A fenced block, of several the last that defines ``name`` or is said to be Python; without one the whole answer, or
    what it makes of ``code`` (the head of a function) as its completion, cut where the next piece begins if need be.
    """
    found: list[str] = []
    marked = re.search(r"\[BEGIN\](.*?)(?:\[DONE\]|\Z)", answer, re.DOTALL)
    answer = marked[1] if marked else answer.split("[DONE]")[0]
    blocks = [(language.lower(), block) for language, block in FENCED.findall(answer)]
    defining = [block for _, block in blocks if _defines(block, name)]
    fitting = [block for language, block in blocks if language in PYTHON] or [block for _, block in blocks]
    preamble = code[: _start_of(code, name)]
    if defining or fitting:
        chosen = (defining or fitting)[-1]
        whole = not code or _defines(chosen, name)
        found.append(preamble + chosen if whole else code + chosen)
    if not blocks or (not defining and code):
        if code and not _defines(answer, name):
            ends = [at for stop in COMPLETION_STOPS if (at := answer.find(stop)) >= 0]
            found += [code + answer, code + answer[: min(ends, default=len(answer))]]
        else:
            found.append(preamble + answer)
    return tuple(dict.fromkeys(found))


def _start_of(code: str, name: str | None) -> int:
    """Where the function begins, with its decorators; an answer that writes it anew needs what stands before it."""
    found = re.search(rf"^(?:@.*\n)*(?:async\s+)?(?:def|class)\s+{re.escape(name or '')}\b", code, re.M)
    return found.start() if found and name else len(code)


def same_output(written: str, right: str) -> bool:
    """Whether a program wrote what it should: line by line, without blanks at the ends of lines and of the text."""
    return [line.rstrip() for line in written.rstrip().splitlines()] == [
        line.rstrip() for line in right.rstrip().splitlines()
    ]


@dataclass(frozen=True)
class Code:
    """1 if the program in the answer passes all tests, else 0; or the share of the tests that it passes (``share``).
    Time, memory or output beyond the limits is no pass. Threads may share it."""

    sandbox: Sandbox
    share: bool = False

    def __call__(self, asked: Asked, given: Given) -> float:
        """See ``Judge``."""
        tests = read_tests(asked)
        try:
            results = self.results(tests, given.text)
        except SandboxFailed as error:
            raise JudgeFailed(f"the tests of {asked.where} cannot be run: {error}") from None
        if isinstance(tests, Pairs):
            right = sum(
                result.status == "passed" and same_output(result.output, output)
                for result, output in zip(results, tests.outputs)
            )
            return right / len(tests.outputs) if self.share else float(right == len(tests.outputs))
        return results[0].share if self.share else float(results[0].status == "passed")

    def results(self, tests: Tests | Pairs, answer: str) -> list[SandboxResult]:
        """What came of the answer's program: one result, or one for each input, up to the first that is wrong if the
        share does not count. Raises SandboxFailed."""
        if isinstance(tests, Tests):
            source, *others = programs(answer, tests.code, tests.entry_point)
            job = Tested(source, tests.tests, tests.setup, tests.entry_point, not self.share, tuple(others))
            return [self.sandbox.run(job)]
        source, *others = programs(answer)
        found: list[SandboxResult] = []
        for given, right in zip(tests.inputs, tests.outputs):
            found.append(self.sandbox.run(Script(source, given, tuple(others))))
            if not self.share and not (found[-1].status == "passed" and same_output(found[-1].output, right)):
                break
        return found
