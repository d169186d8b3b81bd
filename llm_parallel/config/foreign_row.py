"""One row of the tables of other systems' settings."""

from __future__ import annotations

from dataclasses import dataclass

ANY = "*"


@dataclass(frozen=True)
class Foreign:
    """Settings of other systems that are treated alike."""

    names: tuple[str, ...]
    """The settings; ``*`` stands for any characters, and a dotted name for one section's."""
    advice: str
    """What to do here; a clause."""
    fields: tuple[str, ...] = ()
    """Our fields that the advice names."""
    same: tuple[str, ...] = ()
    """Values that ask for what happens here anyway, in lower case: such a setting is left out with a notice. ``*``
    stands for every value, for settings that change no result."""


def row(names: str, advice: str, fields: str = "", same: str = "") -> Foreign:
    """A row whose lists are given as words."""
    return Foreign(tuple(names.split()), advice, tuple(fields.split()), tuple(same.split()))
