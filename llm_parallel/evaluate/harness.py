"""Calls lm-eval over a model and tasks, and adds to its results what they depend on."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import lm_eval
from lm_eval.api.model import LM

from llm_parallel.errors import UserError
from llm_parallel.evaluate.quiet import apart
from llm_parallel.evaluate.results import OURS
from llm_parallel.evaluate.tasks import Tasks, fingerprint_of

BOOTSTRAP = 1000
"""Rounds of the standard errors that have no closed form; lm-eval's 100,000 take minutes for some metrics."""
LIBRARIES = ("lm_eval", "torch", "tokenizers", "transformers", "datasets", "llm-parallel")


@dataclass(frozen=True)
class Settings:
    """limit, seed: how many documents of each task, or below 1 which share of them, and the seed by which they are
    drawn; new_tokens: most tokens of an answer, None for what the tasks say; chat, system: whether prompts go through
    the model's template, and the system message."""

    limit: float | None = None
    seed: int = 0
    new_tokens: int | None = None
    chat: bool = False
    system: str | None = None


def drawn(tasks: Tasks, limit: float | None, seed: int) -> dict[str, list[int]] | None:
    """The documents of each task that are evaluated, None for all. lm-eval's own limit takes the first ones, which in a
    sorted set is no sample."""
    if limit is None:
        return None
    found = {}
    for task in tasks.leaves:
        count = len(task.eval_docs)
        wanted = math.ceil(count * limit) if limit < 1 else int(limit)
        if count > wanted:
            found[task.task_name] = sorted(random.Random(f"{seed} {task.task_name}").sample(range(count), wanted))
    return found or None


def run_harness(lm: LM, tasks: Tasks, settings: Settings) -> dict[str, Any]:
    """lm-eval's results with samples, and under ``OURS`` what it does not note. Raises UserError for tasks that would
    run programs outside the sandbox."""
    check_programs(tasks)
    with apart():
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=list(tasks.items),
            task_manager=_no_index(),
            samples=drawn(tasks, settings.limit, settings.seed),
            bootstrap_iters=BOOTSTRAP,
            gen_kwargs=None if settings.new_tokens is None else {"max_gen_toks": settings.new_tokens},
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
            apply_chat_template=settings.chat,
            system_instruction=settings.system,
            log_samples=True,
            confirm_run_unsafe_code=True,
        )
    assert results is not None, "this process is rank 0"
    found: dict[str, Any] = dict(results)
    for name, config in found["configs"].items():
        config["custom_dataset"] = None
        found["configs"][name] = config
    found[OURS] = described(tasks, settings)
    return found


def check_programs(tasks: Tasks) -> None:
    """Raises UserError for tasks that would run programs outside the sandbox."""
    for task in tasks.leaves:
        if getattr(task, "UNSAFE_CODE", False) and task.task_name != "humaneval":
            raise UserError(f"{task.task_name} runs programs of answers outside the sandbox; leave it out")


def _no_index() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False)


def described(tasks: Tasks, settings: Settings) -> dict[str, Any]:
    """Settings, data and versions."""
    data = {one.task: {"files": one.fingerprints, "rows": one.rows, "remark": one.remark} for one in tasks.found}
    return {
        "limit": settings.limit,
        "seed": settings.seed,
        "new_tokens": settings.new_tokens,
        "chat": settings.chat,
        "system": settings.system,
        "data": data,
        "data_fingerprint": fingerprint_of(tasks.found),
        "missing": {one.task: one.missing for one in tasks.found if one.missing},
        "versions": dict(_versions(LIBRARIES)),
    }


def _versions(names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name in names:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def merged(results: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """The results with more facts under ``OURS``."""
    return {**results, OURS: {**results[OURS], **more}}
