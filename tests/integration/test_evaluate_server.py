"""An evaluation of a model behind an address gives what the engine gives, and one that is killed is gone on with."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from llm_parallel.evaluate.results import read_results
from tests.support.commands import COMMAND, environment
from tests.support.served import running_server, served_folder

pytestmark = [pytest.mark.slow, pytest.mark.processes]
if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed (pip install 'llm-parallel[evaluate]')", allow_module_level=True)


def evaluate(*arguments: str | Path) -> None:
    command = [*COMMAND, "evaluate", *map(str, arguments)]
    done = subprocess.run(command, env=environment(None), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_a_server_is_evaluated_as_the_engine(tmp_path: Path) -> None:
    model = served_folder(tmp_path / "model")
    common = ["--demo", "--tasks", "boolq,winogrande,nq_open", "--limit", "3", "--new-tokens", "6", "--shots", "0"]
    evaluate(model, *common, "--out", tmp_path / "engine", "--device", "cpu")
    with running_server(model) as server:
        evaluate(server.base, *common, "--out", tmp_path / "server", "--tokenizer", model)
    ours, served = read_results(tmp_path / "engine"), read_results(tmp_path / "server")
    for task, samples in ours["samples"].items():
        for one, other in zip(samples, served["samples"][task], strict=True):
            assert one["prompt_hash"] == other["prompt_hash"]
            for mine, theirs in zip(one["resps"], other["resps"], strict=True):
                if isinstance(mine[0], str):
                    assert mine == theirs
                else:
                    assert mine[0][0] == pytest.approx(theirs[0][0], abs=1e-4) and mine[0][1] == theirs[0][1]


def test_a_killed_evaluation_repeats_no_request(tmp_path: Path) -> None:
    model, out = served_folder(tmp_path / "model", context=700, hidden=128, layers=6), tmp_path / "out"
    arguments = [model, "--demo", "--tasks", "agieval_en,hellaswag,quac", "--out", out, "--device", "cpu"]
    process = subprocess.Popen(
        [*COMMAND, "evaluate", *map(str, arguments)], env=environment(None), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    record = out / "requests.jsonl"
    deadline = time.monotonic() + 300
    while not (record.exists() and len(record.read_bytes().splitlines()) > 40):
        assert process.poll() is None and time.monotonic() < deadline, "it did not get so far"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = len(record.read_bytes().splitlines())
    evaluate(*arguments)
    keys = [json.loads(line)["key"] for line in record.read_bytes().splitlines() if line.endswith(b"}")]
    assert len(keys) == len(set(keys)) > before
    assert read_results(out)["llm_parallel"]["tokens"]["known"] >= before - 1
