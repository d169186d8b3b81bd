"""lm-eval's tasks over local data: which files hold which split, and the task objects that the harness runs."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from lm_eval.api.group import Group, GroupConfig
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from llm_parallel.errors import UserError
from llm_parallel.evaluate import follow, humaneval, ifeval, quac, safety
from llm_parallel.evaluate.catalog import PLACES, SETS, place_of
from llm_parallel.evaluate.files import DataFile, DataFolder, Row
from llm_parallel.evaluate.forms import FORMS, Form, own_form

OURS: dict[str, Callable[[], dict[str, Any]]] = {"quac": quac.task, "xstest": safety.task, "follow": follow.task}
"""Tasks that lm-eval has not."""
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
SHOTS_FILE = "mmlu/flan_cot_fewshot/_cot_prompts.json"
"""Among lm-eval's files: the official examples of MMLU, with explanations."""


@dataclass
class Found:
    """What was found for a task of a set. files: by split; rows: of each split; remark: what is missing or was
    replaced; missing: why the task cannot run, None if it can."""

    task: str
    set: str
    files: dict[str, list[DataFile]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    remark: str = ""
    missing: str | None = None

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of the files, by their paths in the folder."""
        return {file.within: file.fingerprint for files in self.files.values() for file in files}


@dataclass
class _Split:
    """Rows of a subject's split, the files that they are from, and what is to be said of the first that is wrong."""

    rows: list[Row] = field(default_factory=list)
    files: list[DataFile] = field(default_factory=list)
    error: UserError | None = None


@dataclass
class Tasks:
    """Tasks and groups of the harness, and what was found for each task."""

    items: list[ConfigurableTask | Group]
    found: list[Found]

    @property
    def leaves(self) -> list[ConfigurableTask]:
        """All tasks."""
        return [task for one in self.items for task in (one.get_all_tasks() if isinstance(one, Group) else [one])]


def lm_eval_folder() -> Path:
    """Where lm-eval's task files are."""
    spec = importlib.util.find_spec("lm_eval.tasks")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


class Builder:
    """Builds tasks over the files of a folder, or over lm-eval's own sources if there is none. shots: examples for all
    tasks, None for those that ``build`` gives or the tasks have."""

    def __init__(self, data: DataFolder | None, shots: int | None, programs: humaneval.Programs) -> None:
        self._data, self._shots, self._programs = data, shots, programs
        self._indices: dict[str, dict[str, Entry]] = {}
        self._rows: dict[str, dict[str | None, dict[str, _Split]]] = {}
        self._read: dict[str, set[str]] = {}
        self.found: list[Found] = []

    def build(self, wanted: Mapping[str, int | None], every: bool = False) -> Tasks:
        """The tasks by name, with their numbers of examples. A task without data is left out and noted; raises
        UserError if a name is unknown, or nothing is left, with ``every`` of one of the names."""
        items: list[Any] = []
        for name, shots in wanted.items():
            before = len(self.found)
            made = self._named(name, self._shots if self._shots is not None else shots)
            members = made if isinstance(made, list) else [made] if made is not None else []
            if every and not members:
                reason = next((one.missing for one in self.found[before:] if one.missing), "it has no members")
                raise UserError(f"--tasks names {name}, which cannot run: {reason}")
            items += members
        tasks = Tasks(items, self.found)
        if not tasks.leaves:
            reasons = "; ".join(sorted({one.missing for one in self.found if one.missing}))
            raise UserError(f"no task can run: {reasons}")
        names = [task.task_name for task in tasks.leaves]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"--tasks gives {twice} twice, alone and in a group; leave one of them out")
        return tasks

    def _named(self, name: str, shots: int | None) -> Any:
        if name in OURS:
            return self._task(name, OURS[name](), shots)
        if name.endswith((".yaml", ".yml")):
            return self._own(Path(name), shots)
        index = self._index(name)
        if any(mark in name for mark in "*?["):
            return self._matching(name, index, shots)
        if name not in index:
            from difflib import get_close_matches

            near = get_close_matches(name.lower(), [*index, *PLACES, *SETS], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"--tasks names {name!r}, which is no task or group of lm-eval{hint}")
        return self._entry(index[name], index, shots)

    def _own(self, path: Path, shots: int | None) -> Any:
        """A task or a group of the user's own. Members of a group are lm-eval's, or lie in the same folder."""
        if not path.is_file():
            raise UserError(f"--tasks names {path}, which is no file; give a task of lm-eval or its YAML file")
        try:
            config = load_yaml(path)
        except Exception as error:  # of YAML, of a file that it includes, or of the user's own functions
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path} cannot be read as a task of lm-eval: {reason}") from None
        if isinstance(config.get("group"), str) and isinstance(config.get("task"), list):
            folder = str(path.parent.absolute())
            index = dict(TaskManager(include_defaults=False, include_path=folder).task_index)
            return self._group(Entry(config["group"], Kind.GROUP, None, config), index, shots)
        if not isinstance(config.get("task"), str):
            raise UserError(
                f"{path} describes no task; its key task must be a name, or a list of tasks beside the key group"
            )
        return self._task(config["task"], config, shots)

    def _matching(self, pattern: str, index: dict[str, Entry], shots: int | None) -> list[Any]:
        """Tasks whose names match a pattern such as ``mmlu_*``, or groups if none do."""
        names = [name for name in [*index, *OURS] if fnmatchcase(name, pattern)]
        single = [name for name in names if name not in index or index[name].kind is Kind.TASK]
        if not names:
            raise UserError(f"--tasks names {pattern!r}, which no task of lm-eval matches")
        made = [self._named(name, shots) for name in sorted(single or names)]
        return [one for part in made for one in (part if isinstance(part, list) else [part]) if one is not None]

    def _index(self, name: str) -> dict[str, Entry]:
        """The task files among which a name is looked up: those of its set, which takes 0.1 s, or all, which takes
        9 s."""
        place = place_of(name.lower())
        folder = "" if place is None or place.folder is None else place.folder
        if folder not in self._indices:
            path = str(lm_eval_folder() / folder)
            self._indices[folder] = dict(TaskManager(include_defaults=False, include_path=path).task_index)
        return self._indices[folder]

    def _entry(self, entry: Entry, index: dict[str, Entry], shots: int | None, changes: Row | None = None) -> Any:
        """What an entry of the index describes. changes: what a group that it is in sets otherwise."""
        if entry.kind is Kind.TAG:
            made = [self._entry(index[name], index, shots, changes) for name in sorted(entry.tags)]
            return [one for one in made if one is not None]
        if entry.kind is Kind.GROUP:
            return self._group(entry, index, shots, changes)
        if entry.yaml_path is None or entry.kind is Kind.PY_TASK:
            raise UserError(f"--tasks names {entry.name}, a task of lm-eval that is a Python class; leave it out")
        if entry.name == "ifeval":
            ifeval.prepare()
        config = self._humaneval(entry) if entry.name == "humaneval" else load_yaml(entry.yaml_path)
        return self._task(entry.name, {**config, **(changes or {}), "task": entry.name}, shots)

    def _humaneval(self, entry: Entry) -> dict[str, Any]:
        assert entry.yaml_path is not None
        return humaneval.task(load_yaml(entry.yaml_path, resolve_func=False), self._programs)

    def _group(
        self, entry: Entry, index: dict[str, Entry], shots: int | None, changes: Row | None = None
    ) -> Group | None:
        config = load_yaml(entry.yaml_path) if entry.yaml_path else dict(entry.cfg or {})
        fields = GroupConfig.__dataclass_fields__
        group = Group.from_config(GroupConfig(**{key: value for key, value in config.items() if key in fields}))
        changes = {**{key: value for key, value in config.items() if key not in fields}, **(changes or {})}
        members = config["task"] if isinstance(config.get("task"), list) else [config.get("task")]
        for member in members:
            made = self._member(entry.name, member, index, shots, changes)
            for one in made if isinstance(made, list) else [made]:
                if one is not None:
                    group.add(one)
        return group if len(group) else None

    def _member(self, group: str, member: Any, index: dict[str, Entry], shots: int | None, changes: Row) -> Any:
        """A member of a group: a name; a task or group with what it sets otherwise; or one that is described there."""
        given = member if isinstance(member, dict) else {"task": member}
        kind = "group" if "group" in given else "task"
        if not isinstance(given.get(kind), str):
            raise UserError(f"group {group} has the member {member!r}, which names no task or group")
        name = given[kind]
        more = {**changes, **{key: value for key, value in given.items() if key != kind}}
        if name in OURS:
            return self._task(name, {**OURS[name](), **more}, shots)
        if kind == "group" and "task" in given:
            return self._group(
                Entry(f"{group}::{name}", Kind.GROUP, None, {**given, "group": name}), index, shots, changes
            )
        known = index if name in index else self._index(name)
        if name in known:
            return self._entry(known[name], known, shots, more)
        if not isinstance(member, dict) or "doc_to_text" not in member:
            raise UserError(f"group {group} has the member {name}, which is no task or group of lm-eval")
        return self._task(f"{group}::{name}", {**more, "task": f"{group}::{name}"}, shots)

    def _task(self, name: str, config: dict[str, Any], shots: int | None) -> ConfigurableTask | None:
        config = {key: value for key, value in config.items() if key not in ("tag", "group", "task_list", "include")}
        place = place_of(name)
        found = Found(name, name if place is None else place.form)
        if shots is not None and config.get("num_fewshot") != 0:
            config["num_fewshot"] = shots
        elif shots:
            found.remark = "it is asked without examples whatever --shots says"
        self.found.append(found)
        if name == "follow":
            rows = {"test": follow.documents()}
        elif self._data is None:
            return self._from_hub(config)
        else:
            rows = self._splits(name, config, found)
        if found.missing is not None:
            return None
        found.rows = {split: len(held) for split, held in rows.items()}
        content = DatasetDict({split: Dataset.from_list(held) for split, held in rows.items() if held})
        source = {key: config.pop(key, None) for key in ("dataset_path", "dataset_name", "dataset_kwargs")}
        config["metadata"] = {**(config.get("metadata") or {}), **_described(found, source)}
        try:
            return prepared_once(ConfigurableTask(config={**config, "custom_dataset": lambda **_: content}))
        except Exception as error:  # of the task's own templates and functions, over rows with other fields
            raise UserError(_unfit(found, content, error)) from None

    @staticmethod
    def _from_hub(config: dict[str, Any]) -> ConfigurableTask:
        if config.get("dataset_path") is None:
            raise UserError(f"{config['task']} has no source in the network; give --data-dir with its files, or --demo")
        try:
            return prepared_once(ConfigurableTask(config=config))
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"the data of {config['task']} ({config['dataset_path']}) cannot be had: {reason}; give --data-dir "
                "with its files, or --demo"
            ) from None

    def _splits(self, name: str, config: dict[str, Any], found: Found) -> dict[str, list[Row]]:
        """Rows of each split that the task uses. Splits without rows are taken out of its configuration."""
        place = place_of(name)
        wanted = [config[key] for key in SPLITS if config.get(key)]
        evaluated = config.get("test_split") or config.get("validation_split") or "test"
        form_name = place.form if place is not None else name
        form = FORMS[form_name] if place is not None else own_form(name, evaluated, wanted)
        subject = _subject(name, place.form if place is not None else "", config)
        held = self._of_form(form_name, form, wanted).get(subject if form.by else None, {})
        for split in wanted:
            if split in held and (error := held[split].error) is not None:
                raise error
        rows = {split: held[split].rows for split in dict.fromkeys(wanted) if split in held and held[split].rows}
        found.files = {split: held[split].files for split in rows}
        if evaluated not in rows:
            found.missing = f"{name} needs rows for its split {evaluated}, and --data-dir has none"
            return {}
        if name == "truthfulqa_mc2" and "mc2_targets" not in rows[evaluated][0]:
            found.missing = "truthfulqa_mc2 needs mc2_targets, and --data-dir has the right answers of mc1 alone"
            return {}
        if form_name == "mmlu" and "dev" not in rows and config.get("num_fewshot"):
            rows["dev"] = _official_shots(name)
            config["num_fewshot"] = min(config["num_fewshot"], len(rows["dev"]))
            found.remark = f"dev is missing: {config['num_fewshot']} examples from lm-eval's own files"
        for key in SPLITS:
            if config.get(key) and config[key] not in rows:
                config[key] = None
        self._check_shots(config, found, rows[evaluated])
        return rows

    @staticmethod
    def _check_shots(config: dict[str, Any], found: Found, rows: list[Row]) -> None:
        """Whether there are examples enough. Without a split for them lm-eval takes other evaluated documents."""
        shots, fixed = config.get("num_fewshot") or 0, (config.get("fewshot_config") or {}).get("samples")
        if not shots or fixed:
            return
        if not any(config.get(key) for key in ("fewshot_split", "training_split")):
            found.remark = "no split for examples: they are other evaluated documents"
            if len(rows) <= shots:
                found.missing = f"{found.task} needs {shots} examples, and --data-dir has {len(rows)} rows in all"

    def _of_form(self, name: str, form: Form, splits: Iterable[str]) -> dict[str | None, dict[str, _Split]]:
        """Rows and files of a set by subject and split. Files of other splits are not read."""
        assert self._data is not None
        made = self._rows.setdefault(name, {})
        read = self._read.setdefault(name, set())
        for file in self._data.files:
            if not form.holds(file) or file.within in read or (split := form.split(file)) not in splits:
                continue
            read.add(file.within)
            for subject, row in form.converted(file):
                held = made.setdefault(subject, {}).setdefault(split, _Split())
                if isinstance(row, UserError):
                    held.error = held.error or row
                    continue
                held.rows.append(row)
                if not held.files or held.files[-1] is not file:
                    held.files.append(file)
        return made


def prepared_once(task: ConfigurableTask) -> ConfigurableTask:
    """The task, whose documents are prepared at the first call alone: lm-eval prepares a whole split at each, some ten
    times in an evaluation."""
    for name in ("training_docs", "validation_docs", "test_docs"):
        setattr(task, name, cache(getattr(task, name)))
    return task


def _subject(task: str, form: str, config: Mapping[str, Any]) -> str | None:
    """What the subject of a task is called in the files of its set."""
    if form == "agieval":
        return task.removeprefix("agieval_")
    if form in ("mmlu", "ceval", "cmmlu"):
        return str(config.get("dataset_name") or task).replace("-", "_")
    return None


def _described(found: Found, source: Mapping[str, Any]) -> dict[str, Any]:
    """What the results say about the data of a task."""
    origin = {key: value for key, value in source.items() if value is not None}
    return {"data_files": found.fingerprints, "data_rows": found.rows, "instead_of": origin}


def _unfit(found: Found, content: Mapping[str, Dataset], error: Exception) -> str:
    """What is said of rows that a task cannot be built over."""
    files = ", ".join(dict.fromkeys(file.within for files in found.files.values() for file in files)) or "its documents"
    fields = ", ".join(dict.fromkeys(name for rows in content.values() for name in rows.column_names))
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{found.task} cannot be built over {files}: {reason}; its rows have the fields {fields[:200]}"


def _official_shots(task: str) -> list[Row]:
    """MMLU's official examples of a subject, read back from the prompts with explanations that lm-eval has."""
    prompts = json.loads((lm_eval_folder() / SHOTS_FILE).read_text(encoding="utf-8"))
    subject = task.removeprefix("mmlu_").removesuffix("_continuation")
    return list(shots_in(prompts.get(subject, "")))


def shots_in(prompt: str) -> Iterable[Row]:
    """The questions of a prompt of ``Q: … (A) … (B) … (C) … (D) … A: … The answer is (B).``"""
    import re

    for part in prompt.split("\n\nQ: ")[1:]:
        question, _, answer = part.partition("\nA:")
        options = re.match(r"(.*?)\s*\(A\)\s*(.*?)\s*\(B\)\s*(.*?)\s*\(C\)\s*(.*?)\s*\(D\)\s*(.*)", question, re.DOTALL)
        right = re.findall(r"answer is \(?([A-D])\)?", answer)
        if options and right:
            text, *choices = (one.strip() for one in options.groups())
            yield {"question": text, "choices": choices, "answer": "ABCD".index(right[-1])}


def fingerprint_of(found: Iterable[Found]) -> str:
    """One hash of all data."""
    content = {one.task: one.fingerprints for one in found}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
