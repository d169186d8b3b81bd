"""The suite's files: a record for each stage while it runs, and the results that are brought back.

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
    """Content of a JSON file; None if it is missing or incomplete."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def replace(path: Path, text: str) -> None:
    """Writes a whole file or none."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def write(path: Path, value: Any) -> None:
    """Writes a whole JSON file or none."""
    replace(path, json.dumps(value, indent=1, default=str))


def records(work: Path) -> dict[str, dict[str, Any]]:
    """Records by stage, in the order of the stages; stages without a record are left out."""
    found = {path.stem: read(path) for path in work.glob("*.json")}
    known = {name: record for name, record in found.items() if isinstance(record, dict) and "state" in record}
    return {name: known[name] for name in sorted(known, key=lambda name: (*NAMES, name).index(name))}


def take_over(work: Path, suite: Path) -> None:
    """Takes records from an earlier run's suite.json for stages that have none in the work folder."""
    for name, record in (read(suite) or {}).items():
        if name in NAMES and isinstance(record, dict) and not (work / f"{name}.json").exists():
            write(work / f"{name}.json", record)


def forget(work: Path) -> None:
    """Removes what an earlier run left in the work folder."""
    for path in [*(work / f"{name}.json" for name in records(work)), work / "suite.json", *work.glob("*.log")]:
        path.unlink(missing_ok=True)
    shutil.rmtree(work / DETAILS, ignore_errors=True)


def publish(work: Path, out: Path, summary: str, found: Mapping[str, Any], archive: bool) -> None:
    """Updates the results in ``out``; the archive, which takes longer, only if asked for."""
    out.mkdir(parents=True, exist_ok=True)
    text = summary.encode()[:MOST_BYTES].decode(errors="ignore")
    replace(out / "summary.md", text)
    write(out / "suite.json", found)
    write(work / "suite.json", found)
    if archive:
        pack(work, out / "details.tar.gz")


def pack(work: Path, target: Path) -> None:
    """Archives logs and details; the largest files are left out if the archive would exceed its limit."""
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
