"""Pages of the documentation that are made from the program: one for each command, from what ``--help`` shows, one of
all fields of a run file, and one of the names that other systems have for them. mkdocs calls ``on_config`` and
``on_files``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import typer

from llm_parallel.cli import app
from llm_parallel.command_help import COMMANDS
from llm_parallel.config.aliases import ALIASES
from llm_parallel.config.fields import FieldDoc, describe_fields
from llm_parallel.help_page import argument_name, default_of, kind_of

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

FIELDS, NAMES = "fields.md", "names.md"
PATTERN = re.compile(r"(``.+?``|`[^`]+`)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the generated pages to the navigation, commands by their groups."""
    groups: dict[str, list[dict[str, str]]] = {}
    for name, described in COMMANDS.items():
        groups.setdefault(described.group, []).append({name: path_of(name)})
    assert config.nav is not None
    reference = [{"Fields of a run file": FIELDS}, {"Names of other systems": NAMES}]
    config.nav += [*reference, {"Commands": [{group: pages} for group, pages in groups.items()]}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def pages() -> dict[str, str]:
    """Every generated page: its Markdown by its path."""
    found = {path_of(name): command_page(name, command) for name, command in commands(typer.main.get_command(app))}
    return found | {FIELDS: fields_page(list(describe_fields())), NAMES: names_page()}


def path_of(command: str) -> str:
    """The path of a command's page."""
    return f"commands/{command.replace(' ', '-')}.md"


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Full name and click command of every command in a group and in the groups within it."""
    for name, command in group.commands.items():
        full = f"{prefix} {name}".strip()
        if hasattr(command, "commands"):
            yield from commands(command, full)
        else:
            yield full, command


def command_page(name: str, command: Any) -> str:
    """What ``--help`` shows of a command: what it does, examples, arguments and options."""
    arguments = [option for option in command.params if option.param_type_name == "argument"]
    options = [option for option in command.params if option.param_type_name == "option"]
    usage = " ".join([f"llm-parallel {name}", *(["[OPTIONS]"] if options else []), *map(argument_name, arguments)])
    examples = [f"llm-parallel {name} {example}".rstrip() for example in COMMANDS[name].examples]
    parts = [
        f"# {name}",
        prose(" ".join((command.help or "").split())),
        _code([usage]),
        *(["## Examples", _code(examples)] if examples else []),
        *(["## Arguments", *(_entry(f"`{argument_name(one)}`", one) for one in arguments)] if arguments else []),
        *(["## Options", *(_entry(_option(one), one) for one in options)] if options else []),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _code(lines: list[str]) -> str:
    return "\n".join(["```", *lines, "```"])


def _option(option: Any) -> str:
    names, kind, default = (
        ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts)),
        kind_of(option),
        default_of(option),
    )
    return " ".join(filter(None, (names, kind))) + (f", default `{default}`" if default is not None else "")


def _entry(title: str, option: Any) -> str:
    required = " (must be given)" if option.required and option.param_type_name == "option" else ""
    return f"{title}{required}\n:   {prose(' '.join((option.help or '').split()))}"


def fields_page(fields: list[FieldDoc]) -> str:
    """All fields, by their sections."""
    parts = [
        "# Fields of a run file",
        "A run file is YAML. A section of it is a mapping, and `section.field=value` on a command line sets the same "
        "field. `N` in a name stands for an item of a list. `llm-parallel fields` prints this page in a terminal.",
    ]
    for section, members in groupby(fields, key=lambda doc: _section(doc)):
        found = list(members)
        heading = f"## {section}" if section else ("## The run" if len(parts) == 2 else "")
        parts += [heading] if heading else []
        for doc in found:
            if doc.is_section and doc.name == section:
                parts.append(prose(doc.doc))
            else:
                parts.append(f"`{doc.name}` {{ #{anchor(doc.name)} }}\n:   {_about(doc)}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(doc: FieldDoc) -> str:
    return doc.name if doc.is_section and "." not in doc.name else doc.name.rpartition(".")[0].split(".")[0]


def _about(doc: FieldDoc) -> str:
    kind = doc.type[:1].upper() + doc.type[1:]
    given = "must be given" if doc.default is ... else f"default `{_value(doc.default)}`"
    return f"{prose(doc.doc)}\n\n    {prose(kind)}; {given}." if not doc.is_section else prose(doc.doc)


def _value(default: Any) -> str:
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    if isinstance(default, tuple):
        return f"[{', '.join(map(str, default))}]"
    return str(default)


def anchor(name: str) -> str:
    """The anchor of a field on its page."""
    return name.replace(".", "-").replace("_", "-")


def names_page() -> str:
    """Names that Megatron-LM, torchtitan, NeMo, DeepSpeed, Hugging Face's trainers, LLaMA-Factory and axolotl have for
    our fields, by our field."""
    parts = [
        "# Names of other systems",
        "These names are understood in a run file and on a command line, with a notice that says what they are read "
        "as; in brackets the values of those whose values differ. Names that have no field here are answered with what "
        "to do instead.",
    ]
    names: dict[str, list[str]] = {}
    for name, alias in ALIASES.items():
        names.setdefault(alias.target, []).append(f"`{name}`" + (f" ({prose(alias.allowed)})" if alias.allowed else ""))
    for target in (doc.name for doc in describe_fields()):
        if target in names:
            parts.append(f"[`{target}`]({FIELDS}#{anchor(target)})\n:   {', '.join(names[target])}")
    return "\n\n".join(parts) + "\n"


def prose(text: str) -> str:
    """Plain text as Markdown: what is between backquotes stays as it is, and nothing else is read as marks."""
    parts = PATTERN.split(text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_|<\[\\])", r"\\\1", part) for part in parts)
