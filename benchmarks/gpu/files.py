"""The suite's files: one record for each stage while it runs, and what goes home.

A loan brings home at most 8 files of at most 16 MiB: summary.md (to read), suite.json (every number) and details.tar.gz
(logs, reports of tests and profilers). Each is replaced whole, so a run cut at any moment leaves the last whole state.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import NAMES

MOST_FILES = 8
MOST_BYTES = 16 << 20
# Of a member of the archive: what comes after is cut off.
MEMBER_BYTES = 4 << 20
DETAILS = "details"


def read(path: Path) -> Any:
    """Content of a JSON file; None if it is not there or not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def replace(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def write(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    replace(path, json.dumps(value, indent=1, default=str))


def records(work: Path) -> dict[str, dict[str, Any]]:
    """Stage → its record, of those that have one, in the stages' order."""
    found = {path.stem: read(path) for path in work.glob("*.json")}
    known = {name: record for name, record in found.items() if isinstance(record, dict) and "state" in record}
    return {name: known[name] for name in sorted(known, key=lambda name: (*NAMES, name).index(name))}


def take_over(work: Path, suite: Path) -> None:
    """Makes an earlier run's suite.json this one's records, where the work folder has none of its own."""
    for name, record in (read(suite) or {}).items():
        if name in NAMES and isinstance(record, dict) and not (work / f"{name}.json").exists():
            write(work / f"{name}.json", record)


def forget(work: Path) -> None:
    """Removes what an earlier run left in the work folder."""
    for path in [*(work / f"{name}.json" for name in records(work)), work / "suite.json", *work.glob("*.log")]:
        path.unlink(missing_ok=True)
    shutil.rmtree(work / DETAILS, ignore_errors=True)


def publish(work: Path, out: Path, summary: str, found: Mapping[str, Any], archive: bool) -> None:
    """Brings ``out`` up to date; the archive, which takes longer, only if asked for."""
    out.mkdir(parents=True, exist_ok=True)
    text = summary.encode()[:MOST_BYTES].decode(errors="ignore")
    replace(out / "summary.md", text)
    write(out / "suite.json", found)
    write(work / "suite.json", found)
    if archive:
        pack(work, out / "details.tar.gz")


def pack(work: Path, target: Path) -> None:
    """Archives logs and details. What would break the limit is left out, the largest first."""
    members = [*sorted(work.glob("*.log")), *sorted(p for p in (work / DETAILS).rglob("*") if p.is_file())]
    while True:
        temporary = work / "archive.tmp"
        with tarfile.open(temporary, "w:gz") as archive:
            for path in members:
                _add(archive, path, path.relative_to(work).as_posix())
        if temporary.stat().st_size <= MOST_BYTES or not members:
            break
        members.remove(max(members, key=lambda path: path.stat().st_size))
    waiting = target.with_name(f"{target.name}.tmp")
    shutil.copyfile(temporary, waiting)
    waiting.replace(target)
    temporary.unlink()


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    try:
        size = min(path.stat().st_size, MEMBER_BYTES)
        with path.open("rb") as handle:
            member = tarfile.TarInfo(name)
            member.size = size
            member.mtime = int(path.stat().st_mtime)
            archive.addfile(member, handle)
    except OSError as error:  # a file that its writer is just replacing
        print(f"{name} is not in the archive: {os.strerror(error.errno or 0)}")
