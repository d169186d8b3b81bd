"""``llm-parallel evaluate``."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from llm_launch.local import launch_local
from llm_parallel.errors import UserError
from llm_parallel.evaluate.request import EvaluateRequest
from llm_parallel.generate.load import Member, describe_folder, newest_said
from llm_parallel.lines import note, say
from llm_parallel.screen import say_next, show_table

if TYPE_CHECKING:
    from llm_parallel.evaluate.tasks import Found, Tasks

RECORD = "requests.jsonl"
NEEDED = ("lm_eval",)
FOUND_HEADS = ("task", "split", "rows", "files", "remark")


def evaluate_command(request: EvaluateRequest) -> int:
    """Evaluates a model, or compares two results; returns the exit status. Raises UserError."""
    if request.compare is not None:
        from llm_parallel.evaluate.compare import compare_command

        return compare_command(request.compare, Path(request.model))
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError("evaluate needs lm-eval, which is not installed; pip install 'llm-parallel[evaluate]'")
    if request.curve:
        from llm_parallel.evaluate.curve import curve_command

        return curve_command(request, evaluate_command)
    if not request.is_server:
        request = replace(request, out=out_folder(request), model=newest_said(request.model))
    if request.num_processes == 1:
        return evaluate_here(request, Member())
    logs = Path(tempfile.mkdtemp(prefix="llm-parallel-evaluate-"))
    note(f"[{request.num_processes} processes; their logs are in {logs}]")
    content = json.dumps({"logs": str(logs), **asdict(request)}, default=str)
    status = launch_local(request.num_processes, ["-m", "llm_parallel.evaluate", content], logs)
    if status == 0:
        shutil.rmtree(logs, ignore_errors=True)
    return status


def evaluate_here(request: EvaluateRequest, member: Member) -> int:
    """One process of an evaluation: rank 0 runs the harness, the others follow it."""
    from llm_parallel.evaluate.open import follow_rank_0, open_engine, open_server

    if member.rank > 0:
        follow_rank_0(request, member)
        return 0
    if not (request.is_server or request.data_dir or request.demo):
        describe_folder(request.model)  # before data are asked for over the network, which may take a minute
    folder = made_folder(out_folder(request))
    programs, tasks = open_tasks(request, folder)
    show_found(tasks.found)
    try:
        kinds = {task.task_name: task.OUTPUT_TYPE for task in tasks.leaves}
        engine = open_engine(request, member, folder / RECORD)
        opened = open_server(request, kinds) if request.is_server else engine
        with opened as (lm, told):
            results = _run(request, tasks, lm)
            facts = {**told(), "sandbox": programs.mode}
    finally:
        programs.close()
    finish(results, facts, folder)
    return 0


def _run(request: EvaluateRequest, tasks: Tasks, lm: Any) -> dict[str, Any]:
    from llm_parallel.evaluate.harness import Settings, run_harness

    settings = Settings(request.limit, request.seed, request.new_tokens, request.chat, request.system)
    return run_harness(lm, tasks, settings)


def finish(results: dict[str, Any], facts: dict[str, Any], folder: Path) -> None:
    """Writes and shows results."""
    from llm_parallel.evaluate.harness import merged
    from llm_parallel.evaluate.results import show_results, write_results
    from llm_parallel.evaluate.safety import BIAS

    results = merged(results, facts)
    path = write_results(folder, results)
    show_results(results)
    if "xstest" in results["results"]:
        say(BIAS)
    say(f"Results and samples are in {folder}.")
    say_next(f"llm-parallel evaluate --compare {quote(str(path))} OTHER/results.json")


def out_folder(request: EvaluateRequest) -> Path:
    """Where the results go."""
    if request.out is not None:
        return request.out
    from llm_parallel.serve.command import model_name

    name = (
        request.model.split("//")[-1].strip("/").replace("/", "-") if request.is_server else model_name(request.model)
    )
    return Path("runs/evaluate") / name


def made_folder(folder: Path) -> Path:
    """The folder of the results, made. Raises UserError before anything is computed if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror}; give another folder") from None
    return folder


def open_tasks(request: EvaluateRequest, folder: Path) -> tuple[Any, Tasks]:
    """The tasks that are asked for, over their data. Raises UserError."""
    from llm_parallel.evaluate.catalog import expanded
    from llm_parallel.evaluate.demo import write_demo
    from llm_parallel.evaluate.files import DataFolder
    from llm_parallel.evaluate.humaneval import Programs
    from llm_parallel.evaluate.quiet import apart
    from llm_parallel.evaluate.tasks import Builder

    data = DataFolder(request.data_dir) if request.data_dir is not None else None
    if request.demo:
        data = DataFolder(write_demo(folder / "demo"))
    programs = Programs(request.sandbox)
    with apart():
        return programs, Builder(data, request.shots, programs).build(expanded(request.names))


def show_found(found: list[Found]) -> None:
    """Prints which files were found for the tasks, and what is missing; the tasks of one set share a row."""
    rows: dict[tuple[str, ...], list[tuple[Found, str]]] = {}
    missing: dict[str, list[Found]] = {}
    for one in found:
        for split in one.files:
            rows.setdefault((one.set, split, one.remark), []).append((one, split))
        if one.missing:
            missing.setdefault(one.set, []).append(one)
    shown = []
    for (name, split, remark), members in rows.items():
        files = list(dict.fromkeys(file.within for one, _ in members for file in one.files[split]))
        named = ", ".join(files[:2]) + (f" and {len(files) - 2} more" if files[2:] else "")
        tasks = members[0][0].task if len(members) == 1 else f"{name}: {len(members)} tasks"
        shown.append((tasks, split, str(sum(one.rows.get(split, 0) for one, _ in members)), named, remark))
    if shown:
        show_table("Data", FOUND_HEADS, shown)
    for name, without in missing.items():
        others = f", and {len(without) - 1} more of {name} the like" if without[1:] else ""
        note(f"[left out: {without[0].missing}{others}]")
