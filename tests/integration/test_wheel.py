"""What `python -m build` makes installs and trains outside of the checkout, with the compiled part."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.gloo, pytest.mark.slow]


def run(folder: Path, *command: str, **environment: str) -> str:
    result = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_the_wheel_trains_in_an_empty_folder(tmp_path: Path) -> None:
    """The source distribution is made first and the wheel from it, so a file that either lacks is missed here."""
    made, installed, folder = tmp_path / "made", tmp_path / "installed", tmp_path / "empty"
    folder.mkdir()
    run(folder, sys.executable, "-m", "build", "--outdir", str(made), str(ROOT))
    (wheel,) = made.glob("*.whl")
    assert list(made.glob("*.tar.gz"))
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check")
    run(folder, *pip, "--target", str(installed), str(wheel))

    paths = {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    modules = ("llm_parallel._C", "llm_kernels", "llm_launch")
    where = f"import importlib; print(*(importlib.import_module(name).__file__ for name in {modules}))"
    found = run(folder, sys.executable, "-c", where, **paths).split()
    assert len(found) == 3 and all(name.startswith(str(installed)) for name in found)

    (folder / "text.txt").write_text("\n\n".join(f"The number {n} is followed by {n + 1}." for n in range(3000)))
    ours = (sys.executable, "-m", "llm_parallel.cli")
    run(folder, *ours, "prepare", "text.txt", "--out", "data/numbers", "--train-vocab", "300", **paths)
    tokenizer = next(
        path for path in (folder / "data").rglob("*") if path.suffix in (".model", ".json") and "token" in path.name
    )
    tree = {
        "run_dir": "run",
        "device": "cpu",
        "model": {"preset": "tiny", "num_layers": 2},
        "data": {
            "train": [{"path": "data/numbers"}],
            "tokenizer": str(tokenizer),
            "seq_length_tokens": 64,
            "eval_fraction": 0,
        },
        "parallel": {"pp": 2},
        "train": {"steps": 2, "global_batch_size": 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    assert "loss" in run(folder, *ours, "pretrain", "run.yaml", **paths)
    assert (folder / "run" / "checkpoints" / "iter_0000002" / ".metadata").is_file()
