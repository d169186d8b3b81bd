"""What a name in a run file or an override means: a field, another system's setting, or nothing that is known."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llm_parallel.config.aliases import ALIASES, Alias
from llm_parallel.config.derived import DERIVED
from llm_parallel.config.fields import field_at, nearest_name, section_at, type_in_words
from llm_parallel.config.foreign import SECTIONS, Foreign, asks_for_the_same, foreign
from llm_parallel.config.presets import MODEL_PRESETS
from llm_parallel.errors import UserError

Key = tuple[str | int, ...]

NEAR = 0.65
"""Likeness (difflib's ratio) from which an unknown name is taken for a misspelt one."""


@dataclass(frozen=True)
class Named:
    """What a name and its value are understood as."""

    key: Key | None
    """Our key; None for a setting that is left out, or whose value follows from others."""
    value: Any
    """Our value."""
    notice: str = ""
    """What to tell the user; empty where the name is ours."""
    derived: str = ""
    """Name in ``DERIVED`` if the value follows from others."""


def understood(key: Key, value: Any) -> Named:
    """The meaning of a name and its value. A name that nobody has comes back as it is. Raises UserError with what to do
    for a setting of another system that has no counterpart here."""
    if key == ("model",) and isinstance(value, str) and value not in MODEL_PRESETS:
        return _by_alias(key, value, ALIASES["model_name_or_path"])
    if field_at(key) is not None and not (key == ("optim",) and isinstance(value, str)):
        return Named(key, value)
    for name in _candidates(key):
        row, alias = foreign(name), ALIASES.get(name)
        if row is not None and asks_for_the_same(row, value):
            return Named(None, value, f"{dotted(key)} is left out: {row.advice}")
        if alias is not None:
            return _by_alias(key, value, alias)
        if name in DERIVED:
            return Named(None, value, derived=name)
        if row is not None:
            raise UserError(_advice(key, value, row))
    for end in range(1, len(key)):
        row = foreign(dotted(key[:end])) if section_at(key[:end]) is None else None
        if row is not None:
            raise UserError(_advice(key[:end], None, row))
    return Named(key, value)


def is_flag(name: str) -> bool:
    """Whether a name on a command line may stand without a value, which means true."""
    info = field_at(tuple(name.split(".")))
    if info is not None:
        return type_in_words(info.annotation, info.metadata).startswith("true or false")
    alias = ALIASES.get(name)
    if alias is not None:
        target = field_at(tuple(alias.target.split(".")))
        assert target is not None, alias
        return alias.is_flag or type_in_words(target.annotation, target.metadata).startswith("true or false")
    return False


def takes_several(name: str) -> bool:
    """Whether a name on a command line may have several values, as Megatron's ``--data-path 0.3 a 0.7 b``."""
    return name in ALIASES and ALIASES[name].several


def _candidates(key: Key) -> Iterator[str]:
    """Names under which a key may stand in the tables: with its sections, and alone where these are ours, another
    system's, or none."""
    yield dotted(key)
    if (len(key) == 2 and section_at(key[:1]) is not None) or (len(key) > 1 and key[0] in SECTIONS):
        yield str(key[-1])


def _by_alias(key: Key, value: Any, alias: Alias) -> Named:
    if alias.convert is not None:
        try:
            value = alias.convert(value)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{dotted(key)} = {show(value)} must be {alias.allowed}") from None
    return Named(tuple(alias.target.split(".")), value, f"{dotted(key)} is read as {alias.target}")


def _advice(key: Key, value: Any, row: Foreign) -> str:
    given = "" if value is None or isinstance(value, list | dict) else f" = {show(value)}"
    return f"{dotted(key)}{given} is not a field here: {row.advice}"


def unknown(key: Key) -> str:
    """What to say of a name that nobody has: the one that it is near to, if there is one."""
    leaf = str(key[-1])
    known = nearest_name(key)
    alias = difflib.get_close_matches(leaf, ALIASES, n=1, cutoff=0.85)
    likeness = _likeness(known.rpartition(".")[2], leaf)
    if alias and _likeness(alias[0], leaf) > likeness:
        known, likeness = ALIASES[alias[0]].target, 1.0
    if likeness < NEAR:
        section = tuple("N" if isinstance(part, int) else part for part in key[:-1])
        where = f" {dotted(section)}" if section and section_at(key[:-1]) is not None else ""
        return f"unknown key {dotted(key)}; `llm-parallel fields{where}` lists those that there are"
    return f"unknown key {dotted(key)}; the nearest known one is {known}"


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one.lower(), other.lower()).ratio()


def dotted(key: Key) -> str:
    """The key as it is written in messages and overrides."""
    return ".".join(map(str, key))


def show(value: Any) -> str:
    """A value in a message, shortened."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
