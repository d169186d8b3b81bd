"""A run of PPO loses a process, and then a node, while it generates, judges or makes steps. It ends with the answers,
scores and losses of the undisturbed run: both models come back from the copies in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_launch.live_run import LiveRun
from llm_parallel.errors import EXIT_STOPPED
from tests.integration.test_ppo import changed
from tests.integration.test_rounds import lines_of, write_run
from tests.integration.test_sft import write_run as write_sft
from tests.launch.elastic_runs import ENDLESS, LIMIT_S, runs_of
from tests.support import four_digits
from tests.support.commands import train_in_ranks

pytestmark = [pytest.mark.gloo, pytest.mark.slow]
LAYOUT = ("parallel.tp=2", "parallel.dp=2")
PROMPTS, SAMPLES, EPOCHS, STEPS = 16, 4, 4, 8
ANSWERS = PROMPTS * SAMPLES
"""Answers of a round, in two steps an epoch."""


def newest(run: LiveRun, kind: str) -> int:
    """Answers or scores that the newest round has."""
    rounds = sorted((run.run_dir / "rounds").glob("[0-9]*"))
    try:
        return len(lines_of(run.run_dir, kind, int(rounds[-1].name))) if rounds else 0
    except (json.JSONDecodeError, FileNotFoundError):  # a line that is being written, a round that begins
        return 0


PHASES: dict[str, Callable[[LiveRun], bool]] = {
    "generating": lambda run: 0 < newest(run, "answers") < ANSWERS,
    "judging": lambda run: 0 < newest(run, "scores") < ANSWERS,
    "stepping": lambda run: run.steps()[-1]["step"] % STEPS in range(1, STEPS - 2),
}


def numbers(run: LiveRun) -> dict[int, tuple[float, float]]:
    """Losses of policy and critic by step, as each was made last."""
    return {one["step"]: (one["train/loss"], one["train/loss/value_avg"]) for one in run.steps()}


def records(run_dir: Path, number: int) -> dict[Any, Any]:
    """Tokens and score of each answer of a round, each of which was made and judged once."""
    lines = {kind: lines_of(run_dir, kind, number) for kind in ("answers", "scores")}
    found = {}
    for kind, field in (("answers", "tokens"), ("scores", "score")):
        for line in lines[kind]:
            key = (line["prompt"], line["sample"], kind)
            assert key not in found, "nothing is made or judged twice"
            found[key] = line[field]
    return found


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_worker_and_a_lost_node_change_nothing(phase: str, tmp_path: Path) -> None:
    four_digits.write_conversations(tmp_path / "train.jsonl", 400)
    train_in_ranks(write_sft(tmp_path, train={"steps": 2}, optim={"warmup_steps": 0}), 1)
    run_file = write_run(tmp_path, tmp_path, "ppo", "rounds", train={"global_batch_size": 32, "micro_batch_size": 2})
    rollout = {
        "prompts": PROMPTS, "answers": SAMPLES, "epochs": EPOCHS, "max_running": 4, "keep_rounds": 1000,
        "held_out_interval": None,
    }  # fmt: skip
    changed(run_file, rollout=rollout, ppo={"entropy_weight": 0.01, "kl_weight": 0.05}, critic={"lr": 2e-3})
    judge = tmp_path / "judge.py"
    judge.write_text("import time\n" + judge.read_text().replace("    return", "    time.sleep(0.02)\n    return"))
    with runs_of(run_file) as start:
        run = start(*LAYOUT, ENDLESS, name="disturbed")
        run.reach(STEPS + 1, LIMIT_S)
        for kind, rank in (("kill", 1), ("node", 3)):
            run.until(lambda: PHASES[phase](run), LIMIT_S, f"a round that is {phase}")
            run.first_step_after(run.cause(kind, rank), LIMIT_S)
            at = run.steps()[-1]["step"]
            run.reach(at + 2, LIMIT_S)
        run.reach(at + STEPS, LIMIT_S)
        run.stop()
        assert run.wait() == EXIT_STOPPED
        last = run.steps()[-1]["step"]
        whole = start(*LAYOUT, f"train.steps={last}", nodes=1, name="undisturbed")
        assert whole.wait() == 0
        found, wanted = numbers(run), numbers(whole)
        assert found.keys() == wanted.keys()
        assert all(found[step] == pytest.approx(wanted[step], abs=1e-4) for step in wanted)
        made = [record["step"] for record in run.steps()]
        assert len(made) - len(set(made)) <= 2, "of each fault, at most the step that it struck is made again"
        complete = last // STEPS
        assert complete >= 2
        for number in range(complete):
            assert len(records(run.run_dir, number)) == 2 * ANSWERS
            assert records(run.run_dir, number) == records(whole.run_dir, number)
