"""What a job trains that ``llm-parallel submit`` made: a copy of the run file with its overrides, in the run folder.

Every start of the job reads this copy. So the run file can be changed for the next run while a job waits or runs, and
the job can be changed on purpose by its copy. Beside it stand the versions of packages and code at submit; a start that
finds others says so, since they are shared by all jobs of an installation and are not copied.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llm_parallel.config.load import dump_given
from llm_parallel.config.tree import RunConfig
from llm_parallel.files import atomic_write

RUN_FILE, FACTS = "submit.yaml", "submit.json"
UNKNOWN = "unknown"
PACKAGES = ("llm-parallel", "torch", "megatron-core", "triton")
GIT_S = 10.0
_HEAD = """\
# What the job trains: the run file and its overrides as `llm-parallel submit` found them. Every start of the job reads
# this file and not the run file. To change a job that waits or runs on purpose, change this file: its next start reads
# it.
"""


def frozen_text(config: RunConfig) -> str:
    """The copy of a run file: what it and its overrides give, without defaults."""
    return _HEAD + dump_given(config)


def freeze(run_dir: Path, text: str, asked: Mapping[str, Any]) -> None:
    """Writes the copy ``text`` and what was ``asked`` with it, and when, and the versions. Raises OSError."""
    facts = {
        **asked,
        "submitted": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "copy": _code_of(text),
        "versions": versions(),
    }
    for name, content in ((RUN_FILE, text), (FACTS, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")):
        with atomic_write(run_dir / name) as handle:
            handle.write(content)


def note_job(run_dir: Path, job: str) -> None:
    """Adds the number that SLURM gave the job."""
    facts = json.loads((run_dir / FACTS).read_text(encoding="utf-8"))
    with atomic_write(run_dir / FACTS) as handle:
        handle.write(json.dumps({"job": job, **facts}, indent=1, ensure_ascii=False) + "\n")


def changes_since(run_file: Path, now: Mapping[str, str]) -> list[str]:
    """Sentences about what has changed since a job was submitted that reads ``run_file``: the copy itself, and versions
    that are others ``now``. None for any other run file."""
    path = run_file.with_name(FACTS)
    try:
        facts, text = json.loads(path.read_text(encoding="utf-8")), run_file.read_text(encoding="utf-8")
        before, code = dict(facts["versions"]), facts["copy"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if run_file.name != RUN_FILE:
        return []
    found = (
        [f"{run_file} was changed since the job was submitted, and is what it trains"] if _code_of(text) != code else []
    )
    differ = {
        name: (str(was), now[name])
        for name, was in before.items()
        if name in now and UNKNOWN not in (was, now[name]) and was != now[name]
    }
    if differ:
        words = ", ".join(f"{name} {was} then and {is_now} now" for name, (was, is_now) in differ.items())
        found.append(f"since the job was submitted the installation has changed: {words}")
    return found


def versions() -> dict[str, str]:
    """Of Python, of packages, and the commit of this program, with ``-dirty`` if files were changed after it."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return {**found, "commit": _commit()}


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_S, stdin=subprocess.DEVNULL)
        return done.stdout.strip() or UNKNOWN
    return UNKNOWN


def _code_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
