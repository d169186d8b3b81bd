"""Training on the model's own answers: the same answers, scores and losses in every layout and after every stop; a
judge that fails is an error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_parallel.tasks.sandbox import Sandbox, SandboxFailed
from tests.integration.test_prefer import start  # noqa: F401 (a fixture)
from tests.support import four_digits
from tests.support.commands import events, losses, read_records, train_in_ranks
from tests.support.fake_openai import fake_openai

pytestmark = pytest.mark.gloo
STEPS_OF_ROUND = 2


def write_prompts(path: Path, count: int, seed: int = 7) -> Path:
    asked = islice(four_digits.problems(seed), count)
    lines = ({"prompt": four_digits.question(a, b), "answer": four_digits.right_answer(a, b)} for a, b in asked)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_run(start_: Path, folder: Path, kind: str, name: str = "run", **sections: dict[str, Any]) -> Path:
    """Four answers to six prompts a round, in two steps; the more digits an answer has of the right one, the better."""
    judge = folder / "judge.py"
    judge.write_text("def reward(answer, record, **_):\n    return len(set(answer) & set(record['answer']))\n")
    rollout = {
        "prompts": 6, "answers": 4, "max_new_tokens": 6, "judges": [{"kind": "function", "file": str(judge)}],
        "held_out_prompts": 4, "held_out_interval": 2, "unfinished_score": None,
    }  # fmt: skip
    tree: dict[str, Any] = {
        "run_dir": str(folder / name), "device": "cpu",
        "method": {"kind": kind, "rollout": rollout, "reject": {"keep": "above", "least_score": 2}},
        "checkpoint": {"load": str(start_ / "run")},
        "data": {"seq_length_tokens": 64},
        "chat": {"train": [str(write_prompts(folder / "prompts.jsonl", 40))], "eval_fraction": 0.1},
        "train": {"global_batch_size": 12, "micro_batch_size": 2, "steps": 6, "threads_per_process": 1},
        "optim": {"lr": 1e-3, "schedule": "constant", "weight_decay": 0.0},
        "log": {"tensorboard": False, "plots": False},
    }  # fmt: skip
    if kind != "reject":
        del tree["method"]["reject"]
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def task(start: Path, tmp_path: Path) -> Callable[..., Path]:  # noqa: F811
    """Writes a run file of a method in rounds."""
    return partial(write_run, start, tmp_path)


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    return [record for record in read_records(run_dir / "metrics.jsonl") if "train/loss" in record]


def lines_of(run_dir: Path, kind: str, number: int) -> list[dict[str, Any]]:
    folder = run_dir / "rounds" / f"{number:06d}"
    return [json.loads(line) for path in sorted(folder.glob(f"{kind}-*.jsonl")) for line in path.open()]


def test_a_layout_and_a_stop_in_the_middle_of_a_round_change_nothing(task: Callable[..., Path], tmp_path: Path) -> None:
    assert train_in_ranks(task("grpo", "alone"), 1) == [6]
    run_file = task("grpo", "many", parallel={"tp": 2})
    assert train_in_ranks(run_file, 2, stop_at=3) == [3] * 2
    assert train_in_ranks(run_file, 2) == [6] * 2
    alone, many = tmp_path / "alone", tmp_path / "many"
    assert losses(many) == pytest.approx(losses(alone), abs=1e-5)
    for number in range(3):
        one, other = (
            {(line["prompt"], line["sample"]): line["tokens"] for line in lines_of(run_dir, "answers", number)}
            for run_dir in (alone, many)
        )
        assert one == other and len(one) == 24
        assert len(lines_of(many, "answers", number)) == len(lines_of(many, "scores", number)) == 24
    for record in steps_of(alone):
        first = (record["step"] - 1) % STEPS_OF_ROUND == 0
        assert (record["train/policy/ratio_error"] == 0.0) == first, (
            "the model that answered is the one that is trained"
        )
        assert ("train/reward" in record) == first
        if first:
            assert record["train/sampling/sampling_logp_difference/max"] <= 2e-5
    assert [record["step"] for record in steps_of(alone) if "train/held_out/reward" in record] == [1, 5]
    rounds = events(many, "round")
    assert [event["number"] for event in rounds] == [0, 1, 2]
    for event in rounds:
        assert len(event["reward_max_by_k"]) == 4 and event["reward_max_by_k"][0] == pytest.approx(event["reward"])
        assert event["reward_max_by_k"][-1] == pytest.approx(event["reward_best"])
        assert event["reward_median_by_k"][-1] == pytest.approx(event["reward_median"])
    one, other = (
        [(record["step"], record["prompt"], record["answer"]) for record in read_records(run_dir / "metrics.jsonl")
         if record.get("event") == "answer" and record["answer"].startswith("[held out, score ")]
        for run_dir in (alone, many)
    )  # fmt: skip
    assert one == other and [step for step, *_ in one] == [0, 0, 4, 4]
    assert [prompt for _, prompt, _ in one[:2]] == [prompt for _, prompt, _ in one[2:]], "before and after"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "reject"])
def test_answers_and_scores_that_are_known_are_not_made_again(
    kind: str, task: Callable[..., Path], tmp_path: Path
) -> None:
    """As after a kill while a round is answered, and while it is judged: with half of the answers, the last line torn,
    and without scores."""
    train_in_ranks(task(kind, "whole"), 1)
    run_file = task(kind, "torn", parallel={"pp": 2})
    folder = tmp_path / "torn" / "rounds" / "000000"
    shutil.copytree(tmp_path / "whole" / "rounds" / "000000", folder)
    (folder / "log_probs.npy").unlink(missing_ok=True)
    kept = (folder / "answers-0.jsonl").read_text().splitlines(keepends=True)[:13]
    (folder / "answers-0.jsonl").write_text("".join(kept[:12]) + kept[12][:40])
    scores = (folder / "scores-0.jsonl").read_text().splitlines(keepends=True)[:5]
    (folder / "scores-0.jsonl").write_text("".join(scores))
    about = json.loads((folder / "round.json").read_text())
    (folder / "round.json").write_text(json.dumps(about))
    train_in_ranks(run_file, 2)
    assert losses(tmp_path / "torn") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
    found = (folder / "answers-0.jsonl").read_text().splitlines(keepends=True)
    assert found[:12] == kept[:12] and len(found) == 25, "24 answers and a torn line"
    assert (folder / "scores-0.jsonl").read_text().splitlines(keepends=True)[:5] == scores
    assert len(lines_of(tmp_path / "torn", "scores", 0)) == 24


@pytest.mark.slow
def test_a_judge_that_fails_is_an_error_and_what_it_judged_is_kept(task: Callable[..., Path], tmp_path: Path) -> None:
    """Never a score of 0; when it is mended, the same command goes on with the answers and scores of before."""
    run_file, judge = task("grpo", "run"), tmp_path / "judge.py"
    mended = judge.read_text()
    judge.write_text(
        # Four held-out prompts are judged first.
        "calls = []\ndef reward(answer, record, **_):\n    calls.append(1)\n    if len(calls) > 11:\n"
        "        raise ValueError('no answer from the judge')\n    return 1.0\n"
    )
    with pytest.raises(AssertionError, match=r"raised ValueError: no answer from the judge \(for .*prompts.jsonl"):
        train_in_ranks(run_file, 1)
    answers = lines_of(tmp_path / "run", "answers", 0)
    assert len(answers) == 24 and len(lines_of(tmp_path / "run", "scores", 0)) == 7
    judge.write_text(mended)
    assert train_in_ranks(run_file, 1) == [6]
    assert lines_of(tmp_path / "run", "answers", 0) == answers
    assert [line["score"] for line in lines_of(tmp_path / "run", "scores", 0)][:7] == [1.0] * 7


@pytest.mark.slow
def test_another_judge_judges_again_and_a_reference_is_the_same_in_a_layout(
    task: Callable[..., Path], tmp_path: Path
) -> None:
    """After a stop in the middle of a round. The answers are kept; nothing of the old scores is trained on."""
    for name, processes, parallel in (("alone", 1, {}), ("many", 2, {"pp": 2})):
        run_file = task("grpo", name, parallel=parallel)
        tree = yaml.safe_load(run_file.read_text())
        tree["method"]["grpo"] = {"kl_weight": 0.1}
        run_file.write_text(yaml.safe_dump(tree))
        assert train_in_ranks(run_file, processes, stop_at=3) == [3] * processes
        answers, before = (lines_of(tmp_path / name, kind, 1) for kind in ("answers", "scores"))
        tree["method"]["rollout"]["judges"][0]["weight"] = 2.0
        run_file.write_text(yaml.safe_dump(tree))
        assert train_in_ranks(run_file, processes) == [6] * processes
        assert lines_of(tmp_path / name, "answers", 1) == answers
        after = {(line["prompt"], line["sample"]): line["score"] for line in lines_of(tmp_path / name, "scores", 1)}
        assert after == {(line["prompt"], line["sample"]): 2 * line["score"] for line in before}
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
    divergences = [record["train/kl"] for record in steps_of(tmp_path / "alone")]
    assert divergences[0] == 0.0 and divergences[-1] > 0


def no_room(kind: str, rank: int, loop: Any) -> None:
    """As if the disk were full when the second replica writes."""
    from llm_parallel.errors import UserError
    from llm_parallel.jsonlines import JsonLines

    append = JsonLines.append

    def failing(self: JsonLines, record: dict[str, Any], at: Any = None) -> None:
        if self.path.name == f"{kind}-1.jsonl":
            raise UserError(f"cannot write {self.path}: No space left on device; make room there")
        append(self, record, at)

    JsonLines.append = failing  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["answers", "scores"])
def test_a_full_disk_of_one_process_ends_all_with_its_sentence(kind: str, task: Callable[..., Path]) -> None:
    """Whichever process is the first to say why it ended; one that waited for the other would not end at all."""
    run_file = task("grpo", "run", parallel={"dp": 2})
    with pytest.raises(AssertionError, match=r"rank [01] failed(?s:.*)-1.jsonl: No space left on device"):
        train_in_ranks(run_file, 2, prepare=partial(no_room, kind), timeout_s=60.0)


@pytest.mark.slow
def test_programs_and_a_model_judge_in_every_process(task: Callable[..., Path], tmp_path: Path) -> None:
    """Two replicas, each with a sandbox and requests of its own; the same run again asks the model nothing new."""
    try:
        Sandbox(workers=1).close()
    except SandboxFailed as error:
        pytest.skip(str(error))
    write = partial(task, "grpo", parallel={"dp": 2})
    with fake_openai(lambda body, number: str(len(body["messages"][0]["content"]) % 5)) as fake:
        judges = [
            {"kind": "code", "pays": "share", "at_once": 2},
            {
                "kind": "model", "url": fake.base, "model": "m", "scale": [0, 4], "template": "{answer}",
                "cache": str(tmp_path / "cache"), "weight": 10.0,
            },
        ]  # fmt: skip
        found, asked = [], []
        for name in ("first", "second"):
            run_file = write(name)
            tree = yaml.safe_load(run_file.read_text())
            tree["method"]["rollout"]["judges"] = judges
            run_file.write_text(yaml.safe_dump(tree))
            prompts = Path(tree["chat"]["train"][0])
            lines = [json.loads(line) | {"test_list": ["assert 1 == 1", "assert 1 == 2"]} for line in prompts.open()]
            prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
            train_in_ranks(run_file, 2)
            scores = lines_of(tmp_path / name, "scores", 0)
            found.append({(line["prompt"], line["sample"]): line["score"] for line in scores})
            asked.append(len(fake.asked))
        assert found[0] == found[1] and len(found[0]) == 24
        assert 0 < asked[0] == asked[1], "replies are in the cache"
        programs = {score % 2.5 for score in found[0].values()}
        assert programs <= {0.0, 0.5}, "half of the tests pass for what is Python"
