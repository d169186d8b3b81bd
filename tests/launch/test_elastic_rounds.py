"""A run in rounds loses a process while answers are judged and then a node while a round is answered, and ends with the
answers and losses of the undisturbed run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_launch.live_run import LiveRun
from llm_parallel.errors import EXIT_STOPPED
from tests.integration.test_rounds import lines_of, write_run
from tests.integration.test_sft import write_run as write_sft
from tests.launch.elastic_runs import ENDLESS, LIMIT_S, runs_of, undisturbed, worst
from tests.support import four_digits
from tests.support.commands import train_in_ranks

pytestmark = [pytest.mark.gloo, pytest.mark.slow]
LAYOUT = ("parallel.tp=2", "parallel.dp=2")
ANSWERS = 24


def partly(run: LiveRun, kind: str) -> bool:
    """Whether the newest round has some of its answers or scores."""
    rounds = sorted((run.run_dir / "rounds").glob("[0-9]*"))
    try:
        return bool(rounds) and 0 < len(lines_of(run.run_dir, kind, int(rounds[-1].name))) < ANSWERS
    except json.JSONDecodeError:  # a line that is being written
        return False


def test_a_killed_worker_and_a_lost_node_in_a_round_change_nothing(tmp_path: Path) -> None:
    four_digits.write_conversations(tmp_path / "train.jsonl", 400)
    train_in_ranks(write_sft(tmp_path, train={"steps": 2}, optim={"warmup_steps": 0}), 1)
    run_file = write_run(tmp_path, tmp_path, "grpo", "rounds", train={"global_batch_size": 12, "micro_batch_size": 2})
    judge = tmp_path / "judge.py"
    judge.write_text("import time\n" + judge.read_text().replace("    return", "    time.sleep(0.02)\n    return"))
    with runs_of(run_file) as start:
        run = start(*LAYOUT, ENDLESS, name="disturbed")
        run.reach(3, LIMIT_S)
        run.until(lambda: partly(run, "scores"), LIMIT_S, "scores of a round")
        run.first_step_after(run.cause("kill", 1), LIMIT_S)
        at = run.steps()[-1]["step"]
        run.until(lambda: partly(run, "answers") or partly(run, "scores"), LIMIT_S, "answers of a round")
        run.first_step_after(run.cause("node", 3), LIMIT_S)
        run.reach(run.steps()[-1]["step"] + 3, LIMIT_S)
        run.stop()
        assert run.wait() == EXIT_STOPPED
        last = run.steps()[-1]["step"]
        losses = undisturbed(start, last, *LAYOUT)
        assert worst(run, losses, last=at) <= 1e-5 and worst(run, losses, first=at) <= 1e-4
        for folder in sorted((run.run_dir / "rounds").glob("[0-9]*"))[:-1]:
            number = int(folder.name)
            for kind in ("answers", "scores"):
                keys = [(line["prompt"], line["sample"]) for line in lines_of(run.run_dir, kind, number)]
                assert len(keys) == len(set(keys)) == ANSWERS, "nothing is made or judged twice"
