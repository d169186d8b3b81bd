"""Reads a YAML file and ``section.field=value`` overrides into a validated configuration, and writes one as YAML.

Where several of these give a value, the last one counts: defaults of tree.py, the model preset, the file, the
overrides.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from llm_parallel.config.aliases import ALIASES
from llm_parallel.config.defaults import followed, others
from llm_parallel.config.derived import DERIVED
from llm_parallel.config.fields import (
    FieldDoc,
    describe_fields,
    field_at,
    section_at,
    type_in_words,
)
from llm_parallel.config.names import Key, dotted, is_flag, show, takes_several, understood, unknown
from llm_parallel.config.presets import MODEL_PRESETS
from llm_parallel.config.schema import config_schema
from llm_parallel.config.tree import RunConfig
from llm_parallel.config.yaml_numbers import Dumper, Loader
from llm_parallel.errors import UserError
from llm_parallel.lines import note

__all__ = ["FieldDoc", "config_schema", "describe_fields", "dump_config", "load_config", "load_with_origins"]

MAX_DEPTH = 20
CRITIC = ("method", "critic")
PATH_LISTS = (("data", "train"), ("data", "eval"), ("chat", "train"), ("chat", "eval"))
"""Lists of sections whose items may be given as their path alone."""
NULL_TAG = "tag:yaml.org,2002:null"


@dataclass
class _Given:
    """What a file and overrides say: values by key, where each was given, and what is wrong with them."""

    values: dict[Key, Any] = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    derived: dict[str, tuple[Key, Any, str]] = field(default_factory=dict)
    """Settings whose value follows from others: name → key, value and origin, the last one given."""
    used: set[str] = field(default_factory=set)
    """Names of other systems that were understood."""

    def complain(self, problem: str) -> None:
        """Adds a problem, once."""
        if problem not in self.problems:
            self.problems.append(problem)

    def known(self, name: str) -> Any:
        """The value of a field by its dotted name: what was given, or the default."""
        key = tuple(name.split("."))
        info = field_at(key)
        if info is None:  # a setting of another system, from which a value follows together with others
            return self.derived[name][1] if name in self.derived else None
        return self.values.get(key, info.default)

    def origin(self, key: Key) -> str:
        """Where the value at ``key`` was given, or else the nearest section or list that contains it."""
        while key and key not in self.origins:
            key = key[:-1]
        return self.origins.get(key, "")

    def put(self, key: Key, value: Any, origin: str) -> None:
        """Sets one value; it replaces earlier values at its key, below it and above it."""
        for old in [old for old in self.values if old[: len(key)] == key or key[: len(old)] == old]:
            if old != key and isinstance(self.values[old], list) and len(old) < len(key):
                self._put_in_list(old, key, value, origin)
                return
            before = self.origins.get(old, "")
            if before.startswith("override") and origin.startswith("override") and before != origin:
                self.notices.append(f"{before} does not count, since {origin} comes after it")
            del self.values[old]
        self.values[key] = value
        self.origins[key] = origin

    def _put_in_list(self, list_key: Key, key: Key, value: Any, origin: str) -> None:
        inside: Any = self.values[list_key]
        for part in key[len(list_key) : -1]:
            inside = _child(inside, part)
        if isinstance(inside, list) and _child(inside, key[-1]) is not None:
            inside[int(key[-1])] = value
        elif isinstance(inside, dict):
            inside[str(key[-1])] = value
        else:
            size = len(self.values[list_key])
            self.problems.append(f"{origin}: {dotted(key)} does not exist; {dotted(list_key)} has {size} items from 0")
            return
        self.origins[key] = origin

    def nested(self) -> dict[str, Any]:
        """The values as nested dictionaries."""
        root: dict[str, Any] = {}
        for key, value in self.values.items():
            inside = root
            for part in key[:-1]:
                inside = inside.setdefault(str(part), {})
            inside[str(key[-1])] = value
        return root


def load_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    notice: Callable[[str], None] = lambda text: note(text),
) -> RunConfig:
    """Reads a run file and overrides into a validated configuration.

    ``overrides`` are ``section.field=value``, ``--section.field=value`` or ``--section.field value``, values in YAML;
    ``--data-path 0.3 a 0.7 b`` has four. Hyphens in names are underscores, in the file too.
    ``notice`` is called with one line for each name of another system that was understood (see aliases.py). The limits
    of single fields are checked here, rules between fields in rules.py.

    Raises UserError that lists everything that is wrong, one line each, with file, line, key, value and what is right.
    """
    return load_with_origins(path, overrides, notice)[0]


def load_with_origins(
    path: str | Path | None, overrides: Sequence[str], notice: Callable[[str], None]
) -> tuple[RunConfig, dict[str, str]]:
    """The configuration as ``load_config`` reads it, and where each value was given, by dotted name: file and line, an
    override, or a preset."""
    given = _Given()
    if path is not None:
        _read_file(Path(path), given)
    for key, text in _split_overrides(overrides, given):
        _read_override(key, text, given)
    _fill_preset(given)
    _derive(given)
    for key, value, why in [*followed(given.values)]:
        given.notices.append(f"{dotted(key)} = {value}: {why}")
        given.put(key, value, "derived")
    given.notices += others(given.values, given.used)
    config = _validate(given)
    if given.problems or config is None:
        raise UserError("\n".join(given.problems))
    for text in given.notices:
        notice(text)
    return config, {dotted(key): where for key, where in given.origins.items()}


def dump_config(config: RunConfig) -> str:
    """YAML with every field, which ``load_config`` reads back into an equal tree."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def dump_given(config: RunConfig) -> str:
    """YAML of the fields that were given, by a file, an override or a preset, which ``load_config`` reads back into an
    equal tree that knows which fields were given."""
    values = config.model_dump(mode="json", exclude_unset=True)
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def _read_file(path: Path, given: _Given) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if str(path).startswith("-"):
            raise UserError(
                f"{path} is no run file; write the run file first, and options and overrides after it; where they say "
                "everything, an empty file will do"
            ) from None
        raise UserError(f"configuration file {path} does not exist; give the path of a YAML file") from None
    except IsADirectoryError:
        raise UserError(f"configuration file {path} is a folder; give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"configuration file {path} cannot be read as a YAML text file: {error}") from None
    _read_yaml(text, (), str(path), given)


def _read_yaml(text: str, key: Key, source: str, given: _Given) -> None:
    """Adds everything that the YAML ``text`` says below ``key``; ``source`` is the file, or the override."""
    is_file = not key
    origin = f"{source}:1" if is_file else source
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if is_file and (node is None or node.tag == NULL_TAG):
            return
        if is_file and not isinstance(node, yaml.MappingNode):
            raise UserError(f"{origin}: a configuration file must consist of `section:` or `field: value` lines")
        _Walk(loader, source, given, is_file).visit(node, key)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        if mark and is_file:
            origin = f"{source}:{mark.line + 1}"
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).splitlines()[0]
        raise UserError(f"{origin}: not valid YAML ({problem})") from None
    except UserError:
        raise
    except ValueError as error:  # an impossible date, for example
        raise UserError(f"{origin}: not valid YAML ({error})") from None


@dataclass
class _Walk:
    """Walks a YAML document and adds each value with its key and line to ``given``."""

    loader: Loader
    source: str
    given: _Given
    lines: bool

    def visit(self, node: yaml.Node | None, key: Key) -> None:
        """Adds the value of ``node`` at ``key``, section by section."""
        origin = f"{self.source}:{node.start_mark.line + 1}" if self.lines and node else self.source
        if len(key) > MAX_DEPTH:
            raise UserError(f"{origin}: nested deeper than {MAX_DEPTH} levels")
        if isinstance(node, yaml.MappingNode):
            for name, child in self._pairs(node, key):
                self.visit(child, (*key, name))
            if not node.value and key and section_at(key) is not None:
                self._put(key, {}, origin)
            return
        value = self.loader.construct_object(node, deep=True) if node else None
        if isinstance(node, yaml.SequenceNode):
            self._note_lines(node, key)
        self._put(key, value, origin)

    def _pairs(self, node: yaml.MappingNode, key: Key) -> list[tuple[str, yaml.Node]]:
        seen: dict[str, int] = {}
        for name_node, _ in node.value:
            line = name_node.start_mark.line + 1
            name = str(name_node.value).replace("-", "_")
            if name in seen and name != "<<":
                where = f"{self.source}:{line}" if self.lines else self.source
                self.given.problems.append(
                    f"{where}: {dotted((*key, name))} is given twice, first in line {seen[name]}; keep one"
                )
            seen[name] = line
        self.loader.flatten_mapping(node)
        pairs = [(str(self.loader.construct_object(name, deep=True)), child) for name, child in node.value]
        return [(name.replace("-", "_"), child) for name, child in pairs]

    def _note_lines(self, node: yaml.SequenceNode, key: Key) -> None:
        if not self.lines:
            return
        for index, item in enumerate(node.value):
            item_key: Key = (*key, index)
            self.given.origins[item_key] = f"{self.source}:{item.start_mark.line + 1}"
            if isinstance(item, yaml.MappingNode):
                for name, child in item.value:
                    child_key: Key = (*item_key, str(name.value))
                    self.given.origins[child_key] = f"{self.source}:{child.start_mark.line + 1}"

    def _put(self, key: Key, value: Any, origin: str) -> None:
        try:
            named = understood(key, value)
        except UserError as error:
            self.given.complain(f"{origin}: {error}")
            return
        if named.notice or named.derived:
            self.given.used.add(str(key[-1]))
        if named.notice:
            self.given.notices.append(f"{origin}: {named.notice}")
        if named.derived:
            self.given.derived[named.derived] = (key, value, origin)
        if named.key is None:
            return
        ours, value = _in_full(named.key, named.value)
        if value is None and section_at(ours) is not None and not _may_be_null(ours):
            return  # a section whose lines are all comments
        if ours != key and value == {} and any(old[: len(ours)] == ours for old in self.given.values):
            return  # `finetuning_type: lora` after its settings
        if ours != key and self.lines and (other := self._contradicted(ours, value)):
            self.given.problems.append(
                f"{origin}: {dotted(key)} = {show(value)} and {dotted(other)}, given at {self.given.origins[other]}, "
                f"contradict each other: without the section {ours[0]} all weights are trained; keep one"
            )
            return
        if ours != key and self.lines and self.given.values.get(ours, value) != value:
            there = self.given.origins[ours]
            self.given.problems.append(
                f"{origin}: {dotted(key)} is another name of {dotted(ours)}, which is given at {there} too; keep one"
            )
            return
        self.given.put(ours, value, origin)

    def _contradicted(self, ours: Key, value: Any) -> Key | None:
        """What was given before that a section without a value (``finetuning_type: full``) leaves no room for, or that
        leaves none for a field of it."""
        values = self.given.values
        if value is None and section_at(ours) is not None:
            return next((old for old in values if len(old) > len(ours) and old[: len(ours)] == ours), None)
        return next((ours[:end] for end in range(1, len(ours)) if values.get(ours[:end], ours) is None), None)


def _may_be_null(key: Key) -> bool:
    info = field_at(key)
    return info is None or info.default is None


def _in_full(key: Key, value: Any) -> tuple[Key, Any]:
    """Key and value; a section that is given as a path alone becomes its field for that path."""
    if key in PATH_LISTS:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list):
            return key, [{"path": item} if isinstance(item, str) else item for item in items]
    return ((*key, "load"), value) if key == CRITIC and isinstance(value, str) else (key, value)


def _split_overrides(overrides: Sequence[str], into: _Given) -> list[tuple[Key, str]]:
    """Dotted keys and texts of values; accepts the three ways of writing an override. ``into`` gets the problems."""
    found = []
    rest = list(overrides)
    while rest:
        given = rest.pop(0)
        name, equals, text = given.removeprefix("--").partition("=")
        name = name.strip().replace("-", "_")
        if not equals and given.startswith("--") and is_flag(name) and rest[:1] not in (["true"], ["false"]):
            text = "true"
        elif not equals:
            if not given.startswith("--") or not rest or rest[0].startswith("--"):
                if not given.startswith("--") or not name or _needs_value(name):
                    into.complain(f"override {given!r} has no value; write {name or 'section.field'}=value")
                    continue
                text = "true"
            else:
                text = rest.pop(0)
                while takes_several(name) and rest and not rest[0].startswith("--") and "=" not in rest[0]:
                    text += " " + rest.pop(0)
        parts = name.split(".")
        if not all(parts):
            into.complain(f"override {given!r} names no field; write section.field=value")
            continue
        found.append((tuple(int(part) if part.isdecimal() else part for part in parts), text))
    return found


def _needs_value(name: str) -> bool:
    """Whether a name that stands without a value is one of a field, here or elsewhere, that takes one. Any other name
    may be a switch of another system, of which ``understood`` knows what it is."""
    return field_at(tuple(name.split("."))) is not None or name in ALIASES


def _derive(given: _Given) -> None:
    """Fills in fields whose values follow from settings of other systems and from other fields."""
    for name, (key, value, origin) in given.derived.items():
        try:
            target, ours, how = DERIVED[name](value, given.known)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            reason = str(error) if isinstance(error, ValueError) else "it must be a number"
            given.problems.append(f"{origin}: {dotted(key)} = {show(value)}: {reason}")
            continue
        ours_key = tuple(target.split("."))
        if given.values.get(ours_key, ours) != ours:
            if given.origin(ours_key).startswith("override ") and not origin.startswith("override "):
                continue  # as every override, it takes the place of what the file says
            given.problems.append(
                f"{origin}: {dotted(key)} = {show(value)} makes {target} {show(ours)} ({how}), which is given as "
                f"{show(given.values[ours_key])} at {given.origin(ours_key)}; keep one"
            )
            continue
        given.notices.append(f"{origin}: {dotted(key)} is read as {target}={show(ours)}: {how}")
        given.put(ours_key, ours, origin)


def _read_override(key: Key, text: str, given: _Given) -> None:
    if re.search(r"\s#", text) and not text.lstrip().startswith(("'", '"', "[", "{")):
        text = json.dumps(text, ensure_ascii=False)  # `#` begins a comment in a file, and is part of a path here
    _read_yaml(text, key, f"override {dotted(key)}={text}", given)


def _fill_preset(given: _Given) -> None:
    """Fills in the fields of ``model.preset`` that neither the file nor an override gives."""
    name = given.values.get(("model", "preset"))
    if not isinstance(name, str):
        return
    if name not in MODEL_PRESETS:
        nearest = difflib.get_close_matches(name, MODEL_PRESETS, n=1, cutoff=0.0)[0]
        given.problems.append(
            f"{given.origin(('model', 'preset'))}: model.preset = {show(name)} is unknown; the nearest known one is"
            f" {nearest}, all are {', '.join(MODEL_PRESETS)}"
        )
        return
    for field_name, value in MODEL_PRESETS[name].items():
        key: Key = ("model", field_name)
        inside = {old: given.values[old] for old in given.values if old[:2] == key}
        if isinstance(value, dict) and inside and key not in inside:
            for part, part_value in value.items():
                if (*key, part) not in inside:
                    given.put((*key, part), part_value, f"preset {name}")
        elif not inside:
            given.put(key, value, f"preset {name}")


def _validate(given: _Given) -> RunConfig | None:
    """The tree, or None after adding what is wrong to ``given.problems``."""
    for key, value in given.values.items():
        info = field_at(key)
        if isinstance(value, bool) and info is not None and "number" in type_in_words(info.annotation, info.metadata):
            given.problems.append(_in_words("bool", key, value, "", given))  # pydantic would read true as 1
    try:
        return RunConfig.model_validate(given.nested())
    except ValidationError as error:
        for problem in error.errors(include_url=False, include_context=False):
            given.problems.append(_in_words(problem["type"], problem["loc"], problem["input"], problem["msg"], given))
        return None


def _in_words(kind: str, key: Key, value: Any, message: str, given: _Given) -> str:
    """One problem that pydantic found as a sentence: where, which field, which value, what would be right."""
    origin = given.origin(key) or next((where for old, where in given.origins.items() if old[: len(key)] == key), "")
    prefix = f"{origin}: " if origin else ""
    if kind == "extra_forbidden":
        return prefix + unknown(key)
    info = field_at(key)
    if kind == "missing":
        right = type_in_words(info.annotation, info.metadata) if info else "a value"
        return f"{prefix}{dotted(key)} is missing; it must be {right}"
    if kind == "finite_number":
        return f"{prefix}{dotted(key)} = {value} must be finite"
    if info is None:  # an item of a list
        parent = field_at(key[:-1])
        right = type_in_words(parent.annotation).removeprefix("a list, each item ") if parent else message
    else:
        right = type_in_words(info.annotation, info.metadata)
    return f"{prefix}{dotted(key)} = {show(value)} must be {right}"


def _child(inside: Any, part: str | int) -> Any:
    if isinstance(inside, list):
        return inside[int(part)] if isinstance(part, int) and part < len(inside) else None
    return inside.get(str(part)) if isinstance(inside, dict) else None
