"""The checks of ``evaluate.tasks`` of a run file, before any process starts."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from llm_parallel.config.tree import RunConfig
from llm_parallel.config.tree_evaluate import EvaluateConfig
from llm_parallel.data.chat_open import open_encoder
from llm_parallel.errors import UserError

if TYPE_CHECKING:
    from llm_parallel.evaluate.humaneval import Programs
    from llm_parallel.evaluate.tasks import Tasks

IN_RUN_FILE = {
    ", or --demo": "",
    "--data-dir": "evaluate.data_dir",
    "--tasks": "evaluate.tasks",
    "--new-tokens": "evaluate.new_tokens",
    "leave --chat out": "set evaluate.chat to false",
}
"""What options of ``llm-parallel evaluate`` are called in a run file."""


def in_run_file(text: object) -> str:
    """A sentence about options of ``llm-parallel evaluate``, about the fields of a run file."""
    said = str(text)
    for option, field in IN_RUN_FILE.items():
        said = said.replace(option, field)
    return said


def check_tasks(config: RunConfig, notice: Callable[[str], None] = lambda _: None) -> None:
    """Checks ``evaluate.tasks`` before any process starts; ``notice`` is told of tasks of a group that are left out.
    Raises UserError for tasks that are unknown, lack data, or do not fit the model."""
    wanted = config.evaluate
    if not wanted.tasks:
        return
    named = f"evaluate.tasks = [{', '.join(wanted.tasks)}]"
    if config.data.tokenizer is None:
        raise UserError(f"{named} is text, and data.tokenizer is not given; give the tokenizer of the data")
    if find_spec("lm_eval") is None:
        raise UserError(f"{named} needs lm-eval, which is not installed; pip install 'llm-parallel[evaluate]'")
    if wanted.chat:
        open_encoder(config)
    programs, tasks = open_tasks(wanted)
    programs.close()
    check_lengths(config, tasks)
    missing: dict[str, list[str]] = {}
    for one in tasks.found:
        if one.missing:
            missing.setdefault(one.set, []).append(one.missing)
    for name, texts in missing.items():
        others = f", and {len(texts) - 1} more of {name} the like" if texts[1:] else ""
        notice(in_run_file(f"left out: {texts[0]}{others}"))


def open_tasks(wanted: EvaluateConfig) -> tuple[Programs, Tasks]:
    """The tasks over their data, and what runs programs of answers. Raises UserError."""
    from llm_parallel.evaluate.catalog import expanded
    from llm_parallel.evaluate.files import DataFolder
    from llm_parallel.evaluate.harness import check_programs
    from llm_parallel.evaluate.humaneval import Programs
    from llm_parallel.evaluate.quiet import apart
    from llm_parallel.evaluate.tasks import Builder

    programs = Programs(wanted.sandbox)
    try:
        data = DataFolder(Path(wanted.data_dir)) if wanted.data_dir is not None else None
        with apart():
            tasks = Builder(data, wanted.shots, programs).build(expanded(wanted.tasks), every=True)
        check_programs(tasks)
    except UserError as error:
        raise UserError(in_run_file(error)) from None
    return programs, tasks


def check_lengths(config: RunConfig, tasks: Tasks) -> None:
    """Raises UserError for a task whose answers may be longer than the model's context."""
    from llm_parallel.evaluate.lm import NEW_TOKENS

    context = config.model.max_seq_length_tokens
    for task in tasks.leaves:
        if task.OUTPUT_TYPE != "generate_until":
            continue
        asked = (task.config.generation_kwargs or {}).get("max_gen_toks", NEW_TOKENS)
        new = config.evaluate.new_tokens or int(asked)
        if new >= context:
            raise UserError(
                f"{task.task_name} of evaluate.tasks asks for answers of {new} tokens, and "
                f"model.max_seq_length_tokens = {context}; give evaluate.new_tokens under {context}"
            )
