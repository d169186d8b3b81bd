"""Judges as a run's configuration names them."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_parallel.config.tree_online import JudgeConfig
from llm_parallel.errors import UserError
from llm_parallel.tasks.ahead import Ahead
from llm_parallel.tasks.base import Asked, Given, Judge, JudgeFailed
from llm_parallel.tasks.open_asking import open_code, open_model
from llm_parallel.tasks.reward_model import RewardModel
from llm_parallel.tasks.text import Contains, Exact, FitsSchema, Length, Number, Regex
from llm_parallel.tasks.time_limit import TimedOut, at_most


@dataclass(frozen=True)
class Function:
    """What a function of the user says."""

    name: str
    call: Callable[..., Any]
    timeout_s: float

    def __call__(self, asked: Asked, given: Given) -> float:
        """See ``Judge``."""
        try:
            with at_most(self.timeout_s):
                value = self.call(
                    prompt=[dict(message) for message in asked.messages],
                    answer=given.text,
                    record=dict(asked.fields),
                    complete=given.complete,
                )
        except TimedOut:
            raise JudgeFailed(
                f"{self.name} has not returned within {self.timeout_s:g} s (for {asked.where}); mend it, or raise its "
                "timeout_s"
            ) from None
        except (Exception, SystemExit) as error:
            raise JudgeFailed(f"{self.name} raised {type(error).__name__}: {error} (for {asked.where})") from error
        number = math.nan
        if isinstance(value, (bool, int, float)) or hasattr(value, "item"):
            with suppress(Exception):  # an array of several numbers, for one
                number = float(value)
        if not math.isfinite(number):
            said = repr(value) if len(repr(value)) <= 200 else f"{repr(value)[:200]} …"
            raise JudgeFailed(f"{self.name} returned {said}; it must return a finite number (for {asked.where})")
        return number


@dataclass(frozen=True)
class Sum:
    """The weighted sum of several judges."""

    parts: tuple[tuple[float, Judge], ...]

    def __call__(self, asked: Asked, given: Given) -> float:
        """See ``Judge``."""
        return sum(weight * judge(asked, given) for weight, judge in self.parts)

    @property
    def waits(self) -> bool:
        """Whether a judge waits for programs or a server, so that it is worth naming answers before."""
        return any(isinstance(judge, Ahead) for _, judge in self.parts)

    def prepare(self, items: Sequence[tuple[Asked, Given]]) -> None:
        """Lets judges that wait for others begin with answers that will be judged soon."""
        for _, judge in self.parts:
            if isinstance(judge, Ahead):
                judge.prepare(items)


def open_judge(judges: Sequence[JudgeConfig], field: str = "method.rollout.judges") -> Sum:
    """The judges of a configuration as one. Raises UserError that names the field."""
    if not judges:
        raise UserError(f"{field} is empty; give at least one judge, such as {{kind: exact}}")
    return Sum(tuple((one.weight, _open(one, f"{field}.{number}", number)) for number, one in enumerate(judges)))


def _open(config: JudgeConfig, field: str, number: int) -> Judge:
    if config.kind == "reward_model":
        if config.folder is None:
            raise UserError(f"{field}.folder is not given; {field}.kind = reward_model needs the folder of that model")
        return RewardModel(number, config.folder)
    if config.kind == "regex":
        return Regex(_pattern(config.pattern, field))
    if config.kind == "function":
        return _function(config, field)
    if config.kind == "length":
        return Length(config.max_tokens)
    if config.kind == "json":
        if importlib.util.find_spec("jsonschema") is None:
            raise UserError(
                f"{field}.kind = json needs the package jsonschema; install it with: pip install jsonschema"
            )
        return FitsSchema(config.field)
    if config.kind == "code":
        return open_code(config, field)
    if config.kind == "model":
        return open_model(config, field)
    if config.kind == "number":
        return Number(config.field)
    return Exact(config.field) if config.kind == "exact" else Contains(config.field)


def _pattern(pattern: str | None, field: str) -> str:
    if pattern is None:
        raise UserError(f"{field}.pattern is not given; {field}.kind = regex needs it")
    try:
        re.compile(re.sub(r"\{[A-Za-z_]\w*\}", "x", pattern))
    except re.error as error:
        raise UserError(f"{field}.pattern = {pattern!r} is no regular expression: {error}") from None
    return pattern


def _function(config: JudgeConfig, field: str) -> Judge:
    if config.file is None:
        raise UserError(f"{field}.file is not given; {field}.kind = function needs a file of Python")
    path = Path(config.file)
    spec = importlib.util.spec_from_file_location(f"judge_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"{field}.file = {config.file} is no file of Python that can be read")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{field}.file = {config.file} fails with {type(error).__name__}: {error}") from error
    call = getattr(module, config.function, None)
    if not callable(call):
        raise UserError(f"{field}.function = {config.function} is no function of {config.file}")
    return Function(f"{config.function} of {config.file}", call, config.timeout_s)
