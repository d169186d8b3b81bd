"""The documentation's generated pages: every command, option and field is on one, and links lead to what there is."""

from __future__ import annotations

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from llm_parallel import cli
from llm_parallel.command_help import COMMANDS
from llm_parallel.config.aliases import ALIASES
from llm_parallel.config.fields import describe_fields

DOCS = Path(__file__).parents[2] / "docs"


def load_hooks() -> Any:
    spec = spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = load_hooks()
PAGES: dict[str, str] = HOOKS.pages()
LEAVES = dict(HOOKS.commands(typer.main.get_command(cli.app)))


def test_every_command_has_a_page() -> None:
    assert {path for path in PAGES if path.startswith("commands/")} == {HOOKS.path_of(name) for name in COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_page_has_what_help_shows(name: str) -> None:
    page, command = PAGES[HOOKS.path_of(name)], LEAVES[name]
    assert page.startswith(f"# {name}\n")
    assert all(f"llm-parallel {name} {example}".rstrip() in page for example in COMMANDS[name].examples)
    for option in command.params:
        if option.param_type_name == "option":
            assert all(f"`{spelling}`" in page for spelling in option.opts)
        assert HOOKS.prose(" ".join(option.help.split())) in page


def test_every_field_is_on_the_page_of_fields() -> None:
    page = PAGES["fields.md"]
    for doc in describe_fields():
        if doc.is_section and "." not in doc.name:
            assert f"\n## {doc.name}\n" in page
        else:
            assert page.count(f"`{doc.name}` {{ #{HOOKS.anchor(doc.name)} }}") == 1
        assert HOOKS.prose(doc.doc) in page


def test_every_other_name_leads_to_its_field() -> None:
    anchors = set(re.findall(r"\{ #(\S+) \}", PAGES["fields.md"])) | set(re.findall(r"\n## (\w+)", PAGES["fields.md"]))
    rows = re.findall(r"^\[`(.+?)`\]\(fields\.md#(\S+)\)\n:   (.*)$", PAGES["names.md"], re.MULTILINE)
    targets = {name: alias.target for name, alias in ALIASES.items()}
    assert {target for target, _, _ in rows} == set(targets.values())
    assert {place for _, place, _ in rows} <= anchors
    for name, target in targets.items():
        assert any(f"`{name}`" in names for row, _, names in rows if row == target)


def test_prose_is_read_as_it_is_written() -> None:
    assert HOOKS.prose("`a|b` x|y <|z|> 2*3 ``c_d`` [e]") == "`a|b` x\\|y \\<\\|z\\|> 2\\*3 ``c_d`` \\[e]"


def test_the_site_takes_nothing_from_a_network() -> None:
    settings = yaml.safe_load((DOCS / "mkdocs.yml").read_text(encoding="utf-8"))
    assert settings["theme"]["font"] is False and "offline" in settings["plugins"]
    assert all((DOCS / "pages" / path).is_file() for path in settings["extra"]["polyfills"] + settings["extra_css"])
    for path in DOCS.rglob("*"):
        if path.suffix in (".js", ".css"):
            assert "//" not in re.sub(r"https?://", "//", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("page", sorted((DOCS / "pages").glob("*.md")), ids=lambda page: page.stem)
def test_what_pages_name_exists(page: Path) -> None:
    """Commands, and fields in ``section.field=value``, are spelt as the program has them."""
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"^\s*\$ llm-parallel ((?:bench )?\w+)", text, re.MULTILINE))
    assert named <= COMMANDS.keys()
    fields = {doc.name for doc in describe_fields()}
    sections = "|".join(sorted({name.split(".")[0] for name in fields if "." in name}))
    assert set(re.findall(rf"\b((?:{sections})(?:\.\w+)+)=", text)) <= fields


def test_every_benchmark_is_listed() -> None:
    folder = DOCS.parent / "benchmarks"
    text = (folder / "README.md").read_text(encoding="utf-8")
    programs = {path.name for path in folder.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    assert programs <= set(re.findall(r"`(\w+\.py)`", text))
