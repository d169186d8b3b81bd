"""The batch files that the documentation prints are those that ``submit --dry-run`` prints."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.in_process import in_process

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "pages" / "slurm.md"
HERE = "/lustre/ada/llm-parallel"
CASE = re.compile(
    r'```yaml title="(?P<where>\S+)"\n(?P<site>.*?)```\n\n```\n\$ llm-parallel (?P<command>.*?)\n```\n\n'
    r"```bash\n(?P<file>.*?)```\n",
    re.DOTALL,
)
CASES = [found.groupdict() for found in CASE.finditer(PAGE.read_text(encoding="utf-8"))]


def printed(case: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the command prints in a clone of the repository at ``HERE``, with the file of site defaults."""
    clone, home = folder / "clone", folder / "home"
    clone.mkdir()
    (clone / "configs").symlink_to(ROOT / "configs")
    path = home / case["where"].removeprefix("~/") if case["where"].startswith("~") else clone / case["where"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(case["site"], encoding="utf-8")
    monkeypatch.chdir(clone)
    home_only = {"HOME": str(home), "XDG_CONFIG_HOME": ""}
    done = in_process(*shlex.split(case["command"]), env=home_only)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and path.name in done.stderr
    return done.stdout.replace(str(clone), HERE).replace(sys.executable, f"{HERE}/.venv/bin/python")


def test_there_are_three() -> None:
    """In containers, with modules, and on shared nodes; no file stands there without its command."""
    assert len(CASES) == 3 == PAGE.read_text(encoding="utf-8").count("```bash\n")
    containers, modules, shared = CASES
    assert "--container-image" in containers["file"] and "--nodes=64-66" in containers["file"]
    assert "module load" in modules["file"] and "--exclusive" not in shared["file"]


@pytest.mark.parametrize("number", range(3))
def test_a_printed_batch_file_is_what_submit_prints(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[number]
    assert case["file"] == printed(case, tmp_path, monkeypatch)
    assert yaml.safe_load(case["site"])
    path = tmp_path / "x.sbatch"
    path.write_text(case["file"], encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
