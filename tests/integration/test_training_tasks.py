"""Benchmarks that a run scores while it trains (``evaluate.tasks``): losses do not depend on them, every step is scored
once, in every layout alike, and as ``llm-parallel evaluate`` scores the checkpoint."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from llm_parallel.errors import EXIT_STOPPED
from llm_parallel.evaluate.demo import write_demo
from llm_parallel.generate.load import Member
from llm_parallel.metrics.history import read_history
from tests.launch.elastic_runs import LIMIT_S, runs_of
from tests.support.commands import events, losses, train_in_ranks
from tests.support.data_helpers import write_token_file
from tests.support.harness import run_ranks
from tests.support.in_process import in_process
from tests.support.served import served_folder

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed (pip install 'llm-parallel[evaluate]')", allow_module_level=True)

pytestmark = pytest.mark.gloo
TASKS = ["hellaswag", "nq_open"]
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file without tasks, tokens that mean nothing, and the demo's sets."""
    made = tmp_path_factory.mktemp("tasks")
    served_folder(made / "model")
    rng = np.random.default_rng(5)
    write_token_file(made / "tokens", [rng.integers(3, 259, 60) for _ in range(40)])
    write_demo(made / "sets", 4)
    shutil.rmtree(made / "sets/winogrande")
    tree = {
        "device": "cpu",
        "model": {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4,
                  "num_query_groups": 2, "max_seq_length_tokens": 600, "init_std": 0.1},
        "data": {"train": [str(made / "tokens")], "tokenizer": str(made / "model"), "seq_length_tokens": 32,
                 "eval_fraction": 0.0},
        "train": {"global_batch_size": 4, "steps": STEPS, "threads_per_process": 1},
        "optim": {"lr": 3e-3, "min_lr": 3e-4},
        "log": {"tensorboard": False, "plots": False},
        "checkpoint": {"asynchronous": False},
    }  # fmt: skip
    (made / "run.yaml").write_text(yaml.safe_dump(tree))
    return made


def scored(folder: Path, run: str, **more: Any) -> list[str]:
    """Overrides of a run that scores its tasks every second step."""
    fields = {"tasks": TASKS, "data_dir": str(folder / "sets"), "interval_steps": 2, "samples": 3, "new_tokens": 4}
    chosen = [f"evaluate.{name}={json.dumps(value)}" for name, value in {**fields, **more}.items()]
    return [f"run_dir={folder / run}", *chosen]


def train(folder: Path, processes: int, *overrides: str, **how: Any) -> None:
    train_in_ranks(folder / "run.yaml", processes, *overrides, **how)


def samples(folder: Path, run: str, step: int) -> dict[str, Any]:
    """Answers of the tasks at a step, by task and document."""
    found = {}
    for task in TASKS:
        lines = (folder / run / f"evaluations/step_{step:07d}/samples_{task}.jsonl").read_text().splitlines()
        found.update({(task, row["doc_hash"]): row["resps"] for row in map(json.loads, lines)})
    return found


def assert_alike(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    assert one.keys() == other.keys() and len(one) == 3 * len(TASKS)
    for key, answers in one.items():
        for wanted, got in zip(answers, other[key], strict=True):
            if key[0] == "hellaswag":
                assert float(got[0][0]) == pytest.approx(float(wanted[0][0]), abs=tolerance)
            else:
                assert got == wanted


class Killed(BaseException):
    """What a test ends a run with, as a kill would: nothing is saved."""


def trained(config: Any, place: Any, asked: Callable[[], bool] = lambda: False) -> int:
    """Trains as the worker of ``pretrain`` does; the last step that was made."""
    from llm_parallel.train.loop import run_training
    from llm_parallel.tune.methods import method_of

    return run_training(config, place, asked, method=method_of(config)).step


def of_one_process(rank: int, world_size: int, folder: Path, more: bool) -> None:
    """Runs in one process, which has imported lm-eval once: without tasks, with them, the command on the checkpoint of
    the latter, and starts that end at the moments at which scores could be lost or made twice, ``more`` or fewer."""
    from contextlib import suppress

    from llm_parallel.config.load import load_config
    from llm_parallel.evaluate.command import evaluate_here
    from llm_parallel.evaluate.in_run_file import check_tasks
    from llm_parallel.evaluate.request import EvaluateRequest
    from llm_parallel.train.preflight import preflight
    from llm_parallel.train.run import Place
    from llm_parallel.worker.command import is_finished

    def start(overrides: list[str], asked: Callable[[], bool] = lambda: False) -> int:
        config = preflight(load_config(folder / "run.yaml", overrides, notice=lambda _: None), 1)
        assert not is_finished(config)
        check_tasks(config)
        with suppress(Killed):
            return trained(config, Place(0, 1, 0), asked)
        return -1

    def nth(call: int, kill: bool) -> Callable[[], bool]:
        """Whether the run was asked to stop: at this call, of which there is one in each step and each task."""
        calls = iter(range(1, 1000))

        def asked() -> bool:
            if next(calls) != call:
                return False
            if kill:
                raise Killed
            return True

        return asked

    start([f"run_dir={folder / 'plain'}"])
    start(scored(folder, "scored"))
    run = folder / "scored"
    settings: dict[str, Any] = {"data_dir": folder / "sets", "limit": 3, "new_tokens": 4, "device": "cpu"}
    evaluate_here(EvaluateRequest(str(run), tasks=TASKS, out=run / "evaluations/step_9999999", **settings), Member())
    saves = "checkpoint.interval_steps=2"
    # Calls: 1 and 2 score step 0, then step 1, step 2, 5 and 6 score it, step 3, step 4, 9 and 10 score it.
    assert start([*scored(folder, "stopped"), saves], nth(6, kill=False)) == 2
    assert start([*scored(folder, "stopped"), saves]) == STEPS
    assert start(scored(folder, "last"), nth(9, kill=True)) == -1
    assert start(scored(folder, "last")) == STEPS
    for name, moment in {"killed": 5, "after": 7}.items() if more else ():
        assert start([*scored(folder, name), saves], nth(moment, kill=True)) == -1
        assert start([*scored(folder, name), saves]) == STEPS


@pytest.fixture(scope="module")
def runs(folder: Path, request: pytest.FixtureRequest) -> Path:
    more = any("killed" in item.name for item in request.session.items)
    run_ranks(of_one_process, 1, folder, more)
    return folder


def test_losses_stay_as_they_are_and_every_due_step_is_scored(runs: Path) -> None:
    assert losses(runs / "plain") == losses(runs / "scored"), "to the last bit"
    history = read_history(runs / "scored")
    assert [record["step"] for record in history.tasks] == [0, 2, 4]
    assert [event["step"] for event in events(runs / "scored", "tasks")] == [0, 2, 4]
    for record in history.tasks:
        assert record["tasks/hellaswag/documents"] == 3 and 0 <= record["tasks/hellaswag/acc_norm"] <= 1
        assert "tasks/nq_open/exact_match" in record


def test_scores_are_those_that_the_command_gives_the_checkpoint(runs: Path) -> None:
    assert_alike(samples(runs, "scored", 4), samples(runs, "scored", 9999999), 1e-5)
    assert samples(runs, "scored", 0) != samples(runs, "scored", 4), "the weights have changed"


@pytest.mark.parametrize(
    "run", ["stopped", "last", *(pytest.param(run, marks=pytest.mark.slow) for run in ("killed", "after"))]
)
def test_an_interrupted_run_scores_every_due_step_once(runs: Path, run: str) -> None:
    """Asked to stop while it scores; killed while it scores the last step; killed earlier; killed after scores."""
    assert [event["step"] for event in events(runs / run, "tasks")] == [0, 2, 4]
    assert [record["step"] for record in read_history(runs / run).tasks] == [0, 2, 4]
    assert losses(runs / run) == losses(runs / "plain")
    for step in (2, 4):
        assert_alike(samples(runs, "scored", step), samples(runs, run, step), 0.0)


LAYOUTS = {
    "tp 2, dp 2": ("parallel.tp=2", "parallel.dp=2"),
    "pp 2, vpp 2": ("parallel.pp=2", "parallel.vpp=2"),
    "cp 2, tp 2": ("parallel.cp=2", "parallel.tp=2"),
    "pp 2, dp 2": ("parallel.pp=2", "parallel.dp=2", "parallel.distributed_optimizer=false"),
}


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[int, dict[str, Any]]:
    train(folder, 1, *scored(folder, "alone"))
    return {step: samples(folder, "alone", step) for step in (0, 2, 4)}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_scores_alike(folder: Path, alone: dict[int, dict[str, Any]], layout: str) -> None:
    """With portions of eight requests a replica, so that there are several."""
    run, fields = layout.replace(" ", "").replace(",", "-"), LAYOUTS[layout]
    processes = 4 if "dp" in layout or "cp" in layout else 2
    train(folder, processes, *fields, f"run_dir={folder / run}-plain")
    train(folder, processes, *fields, *scored(folder, run, max_running=2))
    assert losses(folder / f"{run}-plain") == losses(folder / run), "to the last bit"
    for step, expected in alone.items():
        assert_alike(expected, samples(folder, run, step), 1e-4)


@pytest.mark.slow
def test_a_run_that_is_to_stop_before_its_first_step_saves_nothing(folder: Path) -> None:
    train(folder, 1, *scored(folder, "first"), stop_at=1)
    assert not (folder / "first/checkpoints").exists()
    assert [event["event"] for event in events(folder / "first", "stop")] == ["stop"]
    train(folder, 1, *scored(folder, "first"))
    assert [record["step"] for record in read_history(folder / "first").tasks] == [0, 2, 4]


def test_scores_are_drawn_and_stand_in_the_report(runs: Path, tmp_path: Path) -> None:
    from llm_parallel.metrics.plots import plot_run

    names = [path.name for path in plot_run(runs / "scored")]
    assert "tasks.png" in names
    shown = in_process("report", runs / "scored", runs / "plain", "--out", tmp_path / "page.html")
    assert shown.returncode == 0, shown.stderr
    page = (tmp_path / "page.html").read_text()
    assert "Scores of tasks" in page and "hellaswag by step" in page and "acc_norm" in page


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"tasks": ["mmlu_anatomie"]}, "evaluate.tasks names 'mmlu_anatomie', which is no task or group of"),
    "no rows": (
        {"tasks": ["hellaswag", "winogrande"]},
        "evaluate.tasks names winogrande, which cannot run: winogrande",
    ),
    "no folder": ({"data_dir": "/nowhere"}, "evaluate.data_dir /nowhere is no folder"),
    "no steps": ({"interval_steps": 0}, "evaluate.interval_steps"),
    "no samples": ({"samples": 0}, "evaluate.samples"),
    "shots": ({"shots": -1}, "evaluate.shots"),
    "twice": ({"tasks": ["mmlu", "mmlu_miscellaneous"]}, "evaluate.tasks gives mmlu_miscellaneous twice"),
    "too long": ({"new_tokens": 600}, "nq_open of evaluate.tasks asks for answers of 600 tokens"),
    "a file": ({"tasks": ["absent.yaml"]}, "evaluate.tasks names absent.yaml, which is no file"),
    "sandbox": ({"sandbox": "none"}, "evaluate.sandbox"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_scored_is_refused_before_a_process_starts(folder: Path, case: str) -> None:
    fields, words = REFUSED[case]
    result = in_process("pretrain", str(folder / "run.yaml"), *scored(folder, f"refused-{case}", **fields))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    (error,) = [line for line in result.stderr.splitlines() if "error: " in line]
    assert words in error
    assert not (folder / f"refused-{case}").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_fine_tuning_scores_its_model(folder: Path, tmp_path: Path, kind: str) -> None:
    """With the chat template, over conversations or pairs of answers, of adapters on TP 2."""
    train(folder, 1, f"run_dir={tmp_path / 'start'}", "train.steps=1")
    said = [{"role": "user", "content": "Count to two."}, {"role": "assistant", "content": "One, two."}]
    pair = {"prompt": said[:1], "chosen": said[1:], "rejected": [{"role": "assistant", "content": "Three."}]}
    rows = [{"messages": said} if kind == "sft" else pair for _ in range(24)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [
        f"method.kind={kind}", "data.train=[]", "data.seq_length_tokens=256", f"chat.train=[{tmp_path / 'data.jsonl'}]",
        "chat.eval_fraction=0.0", "adapter.rank=4", "parallel.tp=2", f"checkpoint.load={tmp_path / 'start'}",
    ]  # fmt: skip
    train(folder, 2, *common, f"run_dir={tmp_path / 'plain'}")
    train(folder, 2, *common, *scored(folder, "unused", chat=True), f"run_dir={tmp_path / 'scored'}")
    assert losses(tmp_path / "plain") == losses(tmp_path / "scored"), "to the last bit"
    records = read_history(tmp_path / "scored").tasks
    assert [record["step"] for record in records] == [0, 2, 4]
    assert all("tasks/hellaswag/acc" in record and "tasks/nq_open/exact_match" in record for record in records)


@pytest.mark.slow
def test_a_run_whose_workers_are_killed_while_it_scores_scores_every_due_step_once(
    folder: Path, alone: dict[int, dict[str, Any]]
) -> None:
    """Workers are killed when a due step is recorded, so that it is being scored or about to be; which of them, and
    whether the step or its scores are made again, differs from time to time, and what the run says must not."""
    due = ["evaluate.interval_steps=2", "train.steps=100000", "optim.schedule=constant"]
    with runs_of(folder / "run.yaml") as start:
        run = start("parallel.tp=2", "parallel.dp=2", *scored(folder, "elastic"), *due, name="elastic")
        for step, rank in ((2, 1), (6, 0)):
            run.reach(step, LIMIT_S)
            run.first_step_after(run.cause("kill", rank), LIMIT_S)
        run.reach(run.steps()[-1]["step"] + 3, LIMIT_S)
        run.stop()
        assert run.wait() == EXIT_STOPPED
        last = run.steps()[-1]["step"]
        history = read_history(run.run_dir)
        assert len(run.events("detect")) >= 2
        scored_at = [record["step"] for record in history.tasks]
        assert scored_at == list(range(0, scored_at[-1] + 1, 2)) and scored_at[-1] >= last - 2
        expected = losses_alone(folder, last)
        assert max(abs(loss - expected[step]) for step, loss in run.losses().items()) <= 1e-5
    assert_alike(alone[0], samples(folder, "elastic", 0), 1e-4)


def losses_alone(folder: Path, steps: int) -> dict[int, float]:
    """Losses of the run of one process to which nothing happens, with the same constant learning rate."""
    train(folder, 1, f"run_dir={folder / 'undisturbed'}", f"train.steps={steps}", "optim.schedule=constant")
    return losses(folder / "undisturbed")


def test_the_launcher_asks_every_node_for_the_data(folder: Path) -> None:
    from llm_launch.needs import needs_of
    from llm_parallel.config.load import load_config

    config = load_config(folder / "run.yaml", scored(folder, "needs"), notice=lambda _: None)
    assert [str(folder / "sets"), -1] in needs_of(config, folder / "run.yaml")["files"]
