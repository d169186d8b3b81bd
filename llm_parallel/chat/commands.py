"""The lines that a user writes: messages, and commands that begin with a slash."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace

from llm_parallel.chat.request import Settings
from llm_parallel.errors import UserError

HELP = {
    "system": ("[TEXT | off]", "show the system message, set it, or remove it"),
    "regenerate": ("", "answer the last question again"),
    "edit": ("[TEXT]", "change the last question and ask it again"),
    "new": ("", "begin a new conversation"),
    "save": ("FILE", "write the conversation as JSON"),
    "load": ("FILE", "go on with a conversation that was saved"),
    "params": ("[NAME=VALUE …]", "show or set temperature, top_p, max_new_tokens, seed; NAME= resets one"),
    "model": ("[NAME | FOLDER | http://…]", "show the models, or speak with another one"),
    "help": ("", "show this list"),
    "quit": ("", "end"),
}
"""Commands: what they take, and what they do."""
KEYS = {
    "Alt-Enter, Ctrl-J": "begin a new line of the message",
    "Ctrl-C": "stop the answer; at the prompt, leave the line",
    "Ctrl-D": "end",
}
"""Keys on a terminal, and what they do."""
ALIASES = {"exit": "quit", "retry": "regenerate", "clear": "new", "?": "help"}
WITHOUT_TEXT = {name for name, (takes, _) in HELP.items() if not takes}
OTHER_NAMES = {"max_tokens": "max_new_tokens"}


@dataclass(frozen=True)
class Line:
    """What a line means: a command and the text behind it, or a message, for which ``command`` is None."""

    command: str | None
    text: str


def parse(line: str) -> Line | None:
    """The meaning of a line; None for an empty one. ``//`` begins a message that begins with a slash. Raises UserError
    for a command that there is not."""
    stripped = line.strip()
    if not stripped:
        return None
    if stripped.startswith("//"):
        return Line(None, stripped[1:])
    if not stripped.startswith("/"):
        return Line(None, stripped)
    name, text = stripped[1:], ""
    for place, letter in enumerate(name):
        if letter.isspace():
            name, text = name[:place], name[place:].strip()
            break
    name = ALIASES.get(name, name)
    if name not in HELP:
        near = difflib.get_close_matches(name, HELP, n=1)
        meant = f"/{near[0]} is the nearest" if near else "/help lists the commands"
        raise UserError(f"there is no command /{name}; {meant}; a message that begins with a slash begins with //")
    if text and name in WITHOUT_TEXT:
        raise UserError(f"/{name} takes nothing behind it, and {text!r} is given; leave it out")
    if not text and HELP[name][0] and not HELP[name][0].startswith("["):
        raise UserError(f"/{name} needs a file; write /{name} conversation.json")
    return Line(name, text)


def with_params(settings: Settings, text: str) -> Settings:
    """Settings with the values of ``name=value …``; ``name=`` resets one. Raises UserError."""
    kinds = {one.name: int if one.name in ("max_new_tokens", "seed") else float for one in fields(Settings)}
    changed: dict[str, float | int | None] = {}
    for part in text.replace(",", " ").split():
        name, separator, value = part.partition("=")
        name = name.replace("-", "_")
        name = OTHER_NAMES.get(name, name)
        if name not in kinds or not separator:
            raise UserError(f"{part!r} is no setting; write NAME=VALUE, with a name of {', '.join(kinds)}")
        try:
            changed[name] = kinds[name](value) if value else None
        except ValueError:
            wanted = "a whole number" if kinds[name] is int else "a number"
            raise UserError(f"{name} is {value!r}; it must be {wanted}") from None
    return replace(settings, **changed)  # type: ignore[arg-type]


def params_text(settings: Settings, defaults: dict[str, object]) -> str:
    """Settings as ``/params`` takes them, and what holds where none is set."""
    shown = []
    for one in fields(Settings):
        value, default = getattr(settings, one.name), defaults[one.name]
        if value is not None:
            shown.append(f"{one.name}={value}")
        elif isinstance(default, str):
            shown.append(f"{one.name}: {default}")
        else:
            shown.append(f"{one.name}={default} (default)")
    return "\n".join(shown)


def help_text() -> str:
    """What ``/help`` shows: names with what they do, below each other."""
    rows = [(f"/{name} {takes}".rstrip(), does) for name, (takes, does) in HELP.items()]
    return "\n".join(f"{name}\n    {does}" for name, does in [*rows, *KEYS.items()])
