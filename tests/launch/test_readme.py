"""launch/README.md names tests for what it says: they exist, and every threat has one."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "launch" / "README.md").read_text(encoding="utf-8")
FILES = [path for folder in ("tests", "kernels") for path in (ROOT / folder).rglob("test_*.py")]
NAMES = {name for path in FILES for name in re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))}
NAMED = re.compile(r"`((?:[\w/]+/)?test_\w+(?:\.py|…)?)`")


def unknown(text: str) -> list[str]:
    """Tests that a text names, as a file, by the whole name or by its beginning and "…", and that nobody wrote."""
    found = []
    for name in NAMED.findall(text):
        if name.endswith(".py"):
            known = any(path.as_posix().endswith(f"/{name}") for path in FILES)
        else:
            whole = name.removesuffix("…")
            known = any(one.startswith(whole) for one in NAMES) if name != whole else name in NAMES
        found += [] if known else [name]
    return found


def test_every_test_that_it_names_exists() -> None:
    assert unknown("`test_no_such_thing`, `test_no…`, `tests/unit/test_none.py`") == [
        "test_no_such_thing",
        "tests/unit/test_none.py",
    ]
    assert unknown(TEXT) == []


def test_every_threat_has_a_test() -> None:
    section = TEXT.partition("## Among strangers")[2].partition("\n##")[0]
    rows = [
        line for line in section.splitlines() if line.startswith("| ") and not line.startswith(("| who |", "| ---"))
    ]
    assert len(rows) >= 26, "a row for each item of the review, and what was found since"
    for row in rows:
        assert NAMED.search(row.rpartition("|")[0].rpartition("|")[2]), f"no test is named: {row}"
