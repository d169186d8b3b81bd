"""Installs packages that a lent machine lacks, offline from wheels that are brought along, into the suite's own
folder."""

from __future__ import annotations

import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gpu.processes import run


def name_in(wheel: Path) -> str:
    """Normalised name of the package in a wheel's file name."""
    return re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()


def is_installed(name: str) -> bool:
    """Whether this Python has a package, in any version."""
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def install(wheels: Path | None, site: Path, log: Path) -> dict[str, Any]:
    """Installs into ``site`` the wheels of packages that this Python lacks; installed packages are not shadowed."""
    if wheels is None:
        return {"note": "no --wheels given: Liger, megatron-core and pydantic only where this Python has them"}
    found = sorted(wheels.glob("*.whl"))
    wanted = [wheel for wheel in found if not is_installed(name_in(wheel))]
    outcome: dict[str, Any] = {
        "installed": [wheel.name for wheel in wanted],
        "had": [wheel.name for wheel in found if wheel not in wanted],
    }
    if not found:
        return outcome | {"problem": f"{wheels} holds no wheels"}
    shutil.rmtree(site, ignore_errors=True)
    if wanted:
        command = [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile",
            "--no-cache-dir", "--disable-pip-version-check", "--target", str(site), *map(str, wanted),
        ]  # fmt: skip
        done = run(command, log, 60)
        if done.exit != 0:
            outcome["problem"] = f"pip ended with {done.exit}: {done.tail(600)}"
    return outcome
