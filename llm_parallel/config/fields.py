"""The fields of the configuration tree as data: names, types in words, defaults and meanings, for help and messages."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from llm_parallel.config.node import Node
from llm_parallel.config.tree import RunConfig


@dataclass(frozen=True)
class FieldDoc:
    """One field of the tree for people."""

    name: str
    """Dotted name, for example ``train.micro_batch_size``; ``N`` stands for a position in a list."""
    type: str
    """What values are allowed, in words."""
    default: Any
    """Default value; ``...`` where there is none."""
    doc: str
    """Meaning and unit."""
    is_section: bool
    """Whether the field has fields of its own."""


def section_of(annotation: Any) -> type[Node] | None:
    """The node class of a field that is a section, or a section or null; else None."""
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, Node):
            return None if get_origin(annotation) is tuple else option
    return None


def items_of(annotation: Any) -> type[Node] | None:
    """The node class of the items of a field that is a list of sections, else None."""
    if get_origin(annotation) is tuple:
        return section_of(get_args(annotation)[0])
    return None


def field_at(path: Sequence[str | int], root: type[Node] = RunConfig) -> FieldInfo | None:
    """The field at ``path`` (names, and positions in lists), or None if the tree has none there, or ``path`` is an item
    of a list."""
    node: type[Node] | None = root
    for depth, part in enumerate(path):
        field = node.model_fields.get(str(part)) if node else None
        if field is None:
            return None
        if depth == len(path) - 1:
            return field
        item = items_of(field.annotation)
        if item:
            rest = path[depth + 2 :]
            return field_at(rest, item) if rest else None
        node = section_of(field.annotation)
    return None


def section_at(path: Sequence[str | int]) -> type[Node] | None:
    """The node class that holds the fields under ``path``, or None where ``path`` is not a section."""
    if not path:
        return RunConfig
    field = field_at(path)
    if field is not None:
        return section_of(field.annotation)
    parent = field_at(path[:-1])
    return items_of(parent.annotation) if parent is not None else None


def type_in_words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a field accepts, for example ``a whole number over 0, or null``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        options = [type_in_words(option, metadata) for option in arguments if option is not type(None)]
        return " or ".join(options) + (", or null" if type(None) in arguments else "")
    if origin is Literal:
        return "one of " + ", ".join(str(value) for value in arguments)
    if origin is tuple:
        return "a list, each item " + type_in_words(arguments[0])
    if origin is not None:  # Annotated: PositiveInt inside a list or an option
        return type_in_words(arguments[0], [*metadata, *getattr(annotation, "__metadata__", ())])
    if isinstance(annotation, type) and issubclass(annotation, Node):
        return "a section with " + ", ".join(annotation.model_fields)
    base = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[annotation]
    return " ".join([base, *_bounds(metadata)])


def _bounds(metadata: Sequence[Any]) -> Iterator[str]:
    words: tuple[tuple[Any, str, str], ...] = (
        (annotated_types.Gt, "gt", "over"),
        (annotated_types.Ge, "ge", "of at least"),
        (annotated_types.Lt, "lt", "below"),
        (annotated_types.Le, "le", "up to"),
    )
    found = [
        f"{word} {getattr(item, name)}" for kind, name, word in words for item in metadata if isinstance(item, kind)
    ]
    if found:
        yield " and ".join(found)


def describe_fields(root: type[Node] = RunConfig, prefix: str = "") -> Iterator[FieldDoc]:
    """Every field of the tree, sections before their fields, in the order of the file."""
    for name, field in root.model_fields.items():
        default = ... if field.is_required() else field.default
        node = section_of(field.annotation)
        item = items_of(field.annotation)
        if node:
            doc = field.description or (node.__doc__ or "").strip()
            if default is not None:
                default = {}
        else:
            doc = field.description or ""
        yield FieldDoc(
            prefix + name, type_in_words(field.annotation, field.metadata), default, " ".join(doc.split()), bool(node)
        )
        if node or item:
            yield from describe_fields(node or item, f"{prefix}{name}." + ("N." if item else ""))  # type: ignore[arg-type]


@lru_cache
def known_names() -> tuple[str, ...]:
    """Dotted names of all fields, sections included."""
    return tuple(field.name for field in describe_fields())


def nearest_name(path: Sequence[str | int]) -> str:
    """The known dotted name that an unknown one most likely means: the same field of another section, then a similar
    one of its own section, then the most similar of all."""
    section = section_at(path[:-1])
    leaf = str(path[-1])
    elsewhere = [name for name in known_names() if name.rpartition(".")[2] == leaf]
    if section is not None and not elsewhere:
        close = difflib.get_close_matches(leaf, section.model_fields, n=1, cutoff=0.6)
        if close:
            return ".".join([*map(str, path[:-1]), close[0]])
    dotted = ".".join(map(str, path))

    def likeness(name: str) -> float:
        by_leaf = difflib.SequenceMatcher(None, leaf, name.rpartition(".")[2]).ratio()
        by_name = difflib.SequenceMatcher(None, dotted, name).ratio()
        return max(by_leaf, by_name) + by_name / 10

    return max(elsewhere or known_names(), key=likeness)
