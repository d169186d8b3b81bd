"""What a configuration says otherwise than the defaults, field by field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from llm_parallel.config.node import Node
from llm_parallel.config.tree import RunConfig

LONGEST = 70
"""Characters of a value that are shown."""


@dataclass(frozen=True)
class Difference:
    """One field whose value is not its default."""

    name: str
    """Dotted name."""
    value: str
    """The value as it is written in an override."""
    default: str
    """The default, likewise."""


def differences(config: RunConfig) -> list[Difference]:
    """Fields of ``config`` that are not as by default, in the order of the tree."""
    return list(_walk(config, RunConfig(), ""))


def _walk(node: Node, default: Node, prefix: str) -> Iterator[Difference]:
    for name in type(node).model_fields:
        value, usual = getattr(node, name), getattr(default, name)
        if value == usual:
            continue
        if isinstance(value, Node) and isinstance(usual, Node):
            yield from _walk(value, usual, f"{prefix}{name}.")
        else:
            yield Difference(prefix + name, in_words(value), in_words(usual))


def origin_of(name: str, origins: Mapping[str, str]) -> str:
    """Where a field was given, in few words: a file's name and line, a preset, an override, or ``derived`` where it
    follows from the rest. It may have been given as a whole, in parts, or with the section that contains it."""
    part = next((origin for key, origin in origins.items() if key.startswith(name + ".")), None)
    above = (name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1))
    found = next((origins[key] for key in above if key in origins), part)
    if found is None:
        return "derived"
    return "override" if found.startswith("override ") else found.rpartition("/")[2]


def in_words(value: Any) -> str:
    """A value in YAML on one line, shortened; ``none`` for one that is not given."""
    if value is None:
        return "none"
    plain = _plain(value)
    text = yaml.safe_dump(plain, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("\n...\n").strip()
    return text if len(text) <= LONGEST else text[: LONGEST - 2] + " …"


def _plain(value: Any) -> Any:
    if isinstance(value, Node):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
