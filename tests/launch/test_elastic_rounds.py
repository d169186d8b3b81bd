"""A run in rounds (GRPO, PPO) loses a process, and then a node, while it generates, judges, scores or makes steps. It
ends with the answers, scores and losses of the undisturbed run: both models come back from the copies in memory."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from llm_launch.live_run import LiveRun
from llm_parallel.errors import EXIT_STOPPED
from llm_parallel.tune.round_files import LOG_PROBS
from tests.integration.test_ppo import changed
from tests.integration.test_rounds import lines_of, write_run
from tests.integration.test_sft import write_run as write_sft
from tests.launch.elastic_runs import ENDLESS, LIMIT_S, runs_of
from tests.support import four_digits
from tests.support.commands import train_in_ranks

pytestmark = [pytest.mark.gloo, pytest.mark.slow]
LAYOUT = ("parallel.tp=2", "parallel.dp=2", "kernels.deterministic=true")
PROMPTS, SAMPLES, EPOCHS, STEPS = 16, 4, 4, 8
ANSWERS = PROMPTS * SAMPLES
"""Answers of a round, in two steps an epoch."""


def newest(run: LiveRun) -> Path | None:
    """Folder of the newest round."""
    return max((run.run_dir / "rounds").glob("[0-9]*"), default=None)


def partly(run: LiveRun, kind: str) -> bool:
    """Whether the newest round has some of its answers or scores, and not all."""
    folder = newest(run)
    try:
        return folder is not None and 0 < len(lines_of(run.run_dir, kind, int(folder.name))) < ANSWERS
    except (json.JSONDecodeError, FileNotFoundError):  # a line that is being written, a round that begins
        return False


def waits_at_pipe(run: LiveRun) -> int | None:
    """Puts a named pipe in the place of a round's log-probabilities before they are computed. Processes that look
    whether these are known wait there, until what is returned once one does is closed."""
    folder = newest(run)
    if folder is None:
        return None
    with suppress(FileExistsError, FileNotFoundError):
        os.mkfifo(folder / LOG_PROBS)
    try:
        handle = os.open(folder / LOG_PROBS, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # nobody has come there yet
        return None
    if stat.S_ISFIFO(os.fstat(handle).st_mode):
        return handle
    os.close(handle)  # the round was further than that
    return None


@contextmanager
def scoring(run: LiveRun) -> Iterator[None]:
    """Holds the run while it computes the log-probabilities of a round."""
    handle = run.until(lambda: waits_at_pipe(run), LIMIT_S, "a round that is scoring")
    yield
    (path,) = [path for path in (run.run_dir / "rounds").glob(f"*/{LOG_PROBS}") if path.is_fifo()]
    path.unlink()
    os.close(handle)


def seen(what: str, condition: Callable[[LiveRun], bool]) -> Callable[[LiveRun], Any]:
    """Waits until a run is in a phase."""

    @contextmanager
    def waited(run: LiveRun) -> Iterator[None]:
        run.until(lambda: condition(run), LIMIT_S, f"a round that is {what}")
        yield

    return waited


PHASES: dict[str, Callable[[LiveRun], Any]] = {
    "generating": seen("generating", lambda run: partly(run, "answers")),
    "judging": seen("judging", lambda run: partly(run, "scores")),
    "scoring": scoring,
    "stepping": seen("stepping", lambda run: run.steps()[-1]["step"] % STEPS in range(1, STEPS - 2)),
}


def numbers(run: LiveRun) -> dict[int, tuple[float, ...]]:
    """Losses of the policy, and of the critic if there is one, by step, as each was made last."""
    names = ("train/loss", "train/loss/value_avg")
    return {one["step"]: tuple(one[name] for name in names if name in one) for one in run.steps()}


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


def write_task(folder: Path, method: str) -> Path:
    """Run file of a method whose judge takes its time, from a model that has hardly learned the task."""
    four_digits.write_conversations(folder / "train.jsonl", 400)
    train_in_ranks(write_sft(folder, train={"steps": 2}, optim={"warmup_steps": 0}), 1)
    run_file = write_run(folder, folder, method, "rounds", train={"global_batch_size": 32, "micro_batch_size": 2})
    rollout = {
        "prompts": PROMPTS, "answers": SAMPLES, "epochs": EPOCHS, "max_running": 4, "keep_rounds": 1000,
        "held_out_interval": None,
    }  # fmt: skip
    sections: dict[str, Any] = {"grpo": {"kl_weight": 0.05}}
    if method == "ppo":
        sections = {"ppo": {"entropy_weight": 0.01, "kl_weight": 0.05}, "critic": {"lr": 2e-3}}
    changed(run_file, rollout=rollout, **sections)
    judge = folder / "judge.py"
    judge.write_text("import time\n" + judge.read_text().replace("    return", "    time.sleep(0.02)\n    return"))
    return run_file


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_a_killed_worker_and_a_lost_node_change_nothing(method: str, phase: str, tmp_path: Path) -> None:
    with runs_of(write_task(tmp_path, method)) as start:
        run = start(*LAYOUT, ENDLESS, name="disturbed")
        run.reach(STEPS + 1, LIMIT_S)
        ends = []
        for kind, rank in (("kill", 1), ("node", 3)):
            with PHASES[phase](run):
                fault = run.cause(kind, rank)
            run.first_step_after(fault, LIMIT_S)
            ends.append(run.steps()[-1]["step"])
            run.reach(ends[-1] + 2, LIMIT_S)
        run.reach(ends[-1] + STEPS, LIMIT_S)
        run.stop()
        assert run.wait() == EXIT_STOPPED
        last = run.steps()[-1]["step"]
        whole = start(*LAYOUT, f"train.steps={last}", nodes=1, name="undisturbed")
        assert whole.wait() == 0
        found, wanted = numbers(run), numbers(whole)
        assert found.keys() == wanted.keys()
        assert {step: found[step] for step in range(1, ends[0] + 1)} == {
            step: wanted[step] for step in range(1, ends[0] + 1)
        }, "in the same layout every bit is the same"
        assert all(found[step] == pytest.approx(wanted[step], abs=1e-4) for step in wanted)
        made = [record["step"] for record in run.steps()]
        assert len(made) - len(set(made)) <= 2, "of each fault, at most the step that it struck is made again"
        complete = last // STEPS
        assert complete >= 2
        for number in range(complete):
            assert len(records(run.run_dir, number)) == 2 * ANSWERS
            assert records(run.run_dir, number) == records(whole.run_dir, number)
