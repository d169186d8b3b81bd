"""Runs of the real command on a small corpus, and of its worker's code in forked ranks where a whole process for each
rank (seconds of imports) would say nothing more."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.harness import run_ranks

TIMEOUT_S = 180.0  # a hang lasts for ever; a busy machine may take a minute
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
COMMAND = [sys.executable, "-m", "llm_parallel.cli"]


@dataclass(frozen=True)
class Corpus:
    """Token files and tokenizer that ``llm-parallel prepare`` made of part of Python's library."""

    prefix: Path
    tokenizer: Path
    output: str


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment as a user's shell would have it, with one compute thread."""
    dropped = (*LAUNCHER_VARIABLES, "TRITON_INTERPRET")  # the tests' own
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | dict(extra or {})


def llm_parallel(
    *arguments: str | Path, env: Mapping[str, str] | None = None, timeout_s: float = TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end; fails if it hangs."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
    )


def prepare_corpus(folder: Path) -> Corpus:
    """Modules of Python's library from a to c, with a vocabulary of 400 words, made in ``folder``."""
    text, prefix = folder / "text", folder / "tokens"
    text.mkdir(parents=True, exist_ok=True)
    for source in Path(os.__file__).parent.glob("[a-c]*.py"):
        shutil.copy(source, text / f"{source.stem}.txt")
    result = llm_parallel("prepare", text, "--out", prefix, "--train-vocab", "400", "--workers", "1")
    assert result.returncode == 0, result.stderr
    return Corpus(prefix, folder / "tokenizer.model", result.stdout)


def write_run_file(corpus: Corpus, folder: Path, **sections: dict[str, Any]) -> Path:
    """A run file in ``folder`` of a two-layer model on the corpus, whose run folder is ``folder/run``."""
    tree: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "device": "cpu",
        "model": {"preset": "debug"},
        "data": {
            "train": [{"path": str(corpus.prefix)}],
            "tokenizer": str(corpus.tokenizer),
            "seq_length_tokens": 32,
            "eval_fraction": 0.1,
        },
        "train": {"global_batch_size": 4, "steps": 12, "eval_samples": 4, "threads_per_process": 1},
        "optim": {"lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 2},
        "log": {"tensorboard": False, "plots": False},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def read_records(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl or events.jsonl; every line has to be whole."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step."""
    return {
        record["step"]: record["train/loss"]
        for record in read_records(run_dir / "metrics.jsonl")
        if "train/loss" in record
    }


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """Events of that name."""
    return [record for record in read_records(run_dir / "events.jsonl") if record["event"] == name]


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit status 2 and, on stderr, nothing but one sentence with these words."""
    assert "Traceback" not in result.stdout + result.stderr, result.stderr
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])


def _worker(
    rank: int, world_size: int, run_file: str, overrides: Sequence[str], stop_at: int | None, prepare: Any
) -> Any:
    from llm_parallel.config.load import load_config
    from llm_parallel.train import loop
    from llm_parallel.train.preflight import preflight
    from llm_parallel.train.run import Place
    from llm_parallel.tune.methods import method_of

    config = preflight(load_config(run_file, overrides, notice=lambda _: None), world_size)
    found = prepare(rank, loop) if prepare else None
    asked = iter(range(1, config.train.steps + 1))
    # Only the last rank is asked, as a scheduler may signal one node's processes first.
    last = rank == world_size - 1
    place = Place(rank, world_size, rank)
    asks = stop_at is not None and last
    state = loop.run_training(config, place, lambda: asks and next(asked) == stop_at, method=method_of(config))
    return found if prepare else state.step


def train_in_ranks(
    run_file: Path,
    processes: int,
    *overrides: str,
    stop_at: int | None = None,
    prepare: Callable[[int, Any], Any] | None = None,
    timeout_s: float = 300.0,
) -> list[Any]:
    """Trains as ``llm-parallel pretrain`` does once its processes have started; returns the last step of each rank.

    ``stop_at``: the step in which one rank is asked to stop. ``prepare(rank, train_loop_module)``, a top-level
    function, is called before, and what it returned is returned after the run.
    """
    return run_ranks(_worker, processes, str(run_file), overrides, stop_at, prepare, timeout_s=timeout_s)
