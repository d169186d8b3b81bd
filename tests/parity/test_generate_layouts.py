"""A file that is answered by all processes of a layout: the same answers as by one process, and after a kill the rest
of them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parity.test_generate_file import byte_folder, lines_of
from tests.support.commands import COMMAND, environment, llm_parallel
from tests.support.harness import run_ranks
from tests.support.in_process import in_process

HOW = ("--temperature", "1", "--samples", "2", "--device", "cpu")
NEW = 12


def prompts_file(path: Path, count: int) -> Path:
    draw = random.Random(3)
    lines = [{"prompt": "".join(draw.choices("abc ", k=draw.randint(1, 30))), "id": f"p{n}"} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    """Whether two files have the same answers in the same order, to the rounding of their log-probabilities."""
    rounded = {"log_probs": 0, "time": 0, "job": 0}
    return [{**line, **rounded} for line in found] == [{**line, **rounded} for line in expected] and all(
        ours == pytest.approx(theirs, abs=2e-5)
        for one, other in zip(found, expected)
        for ours, theirs in zip(one["log_probs"], other["log_probs"])
    )


def replica_job(rank: int, world_size: int, folder: str, source: str, target: str, dp: int) -> tuple[list[str], list]:
    """What the first process says, and the numbers of the prompts that this replica answered."""
    from llm_parallel.generate import file_command
    from llm_parallel.generate.load import Member
    from llm_parallel.generate.request import GenerateRequest
    from llm_parallel.parallel.groups import close_groups

    said: list[str] = []
    asked: list[int] = []
    merge = file_command.Parts.merge

    def look(parts: Any, keys: Any) -> None:
        for path in sorted(parts.folder.glob("part-*")):
            asked.append(len({json.loads(line)["number"] for line in path.open()}))
        merge(parts, keys)

    file_command.Parts.merge = look  # type: ignore[method-assign]
    close_groups(world=False)
    request = GenerateRequest(
        folder, input=Path(source), output=Path(target), max_new_tokens=NEW, temperature=1.0, samples=2, device="cpu",
        dp=dp, tp=world_size // dp, max_running=4,
    )  # fmt: skip
    assert file_command.answer_here(request, Member(rank, rank, world_size), said.append) == 0
    return said, asked


@pytest.mark.gloo
def test_two_replicas_answer_as_one_process_does(tmp_path: Path) -> None:
    folder, source = byte_folder(tmp_path / "model"), prompts_file(tmp_path / "in.jsonl", 12)
    one = in_process("generate", str(folder), "--input", source, "--output", tmp_path / "one.jsonl", *HOW,
                     "--max-new-tokens", str(NEW))  # fmt: skip
    assert one.returncode == 0, one.stderr
    target = tmp_path / "two.jsonl"
    (said, asked), (nothing, _) = run_ranks(replica_job, 2, str(folder), str(source), str(target), 2)
    expected = lines_of(tmp_path / "one.jsonl")
    assert [(line["number"], line["sample"]) for line in expected] == [(n, each) for n in range(12) for each in (0, 1)]
    assert same(lines_of(target), expected) and not (tmp_path / "two.jsonl.parts").exists()
    assert len(asked) == 2 and sum(asked) == 12 and min(asked) >= 1, "each replica has taken a part"
    tokens = sum(len(line["tokens"]) for line in expected)
    assert not nothing and said[-1].startswith(f"[24 of 24 answers, {tokens} tokens, ") and "by 2 replicas" in said[-1]


@contextlib.contextmanager
def running(arguments: list[str]) -> Any:
    process = subprocess.Popen(
        [*COMMAND, *arguments], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until(holds: Callable[[], Any]) -> Any:
    end = time.monotonic() + 120.0
    while not (found := holds()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def workers_of(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                found.append(int(folder.name))
    return sorted(found)


@pytest.mark.slow
@pytest.mark.processes
def test_a_killed_command_goes_on_under_another_layout(tmp_path: Path) -> None:
    """Killed as a whole; then one of its processes is lost; then it ends."""
    folder, source = byte_folder(tmp_path / "model"), prompts_file(tmp_path / "in.jsonl", 150)
    more = ["--input", str(source), *HOW, "--max-new-tokens", "120", "--max-running", "4"]
    target, parts = tmp_path / "out.jsonl", tmp_path / "out.jsonl.parts"
    arguments = ["generate", str(folder), *more, "--output", str(target), "--logs", str(tmp_path / "logs")]

    def complete() -> int:
        return sum(path.read_bytes().count(b"\n") for path in parts.glob("part-*"))

    with running([*arguments, "--dp", "2", "--tp", "2"]) as command:
        wait_until(lambda: complete() >= 8)
        workers = workers_of(command.pid)
        assert len(workers) == 4
        command.send_signal(signal.SIGKILL)
        command.wait()
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    before = complete()
    assert 8 <= before < 300 and not target.exists()

    with running([*arguments, "--dp", "2"]) as command:
        wait_until(lambda: complete() >= before + 8)
        os.kill(workers_of(command.pid)[1], signal.SIGKILL)
        out, err = command.communicate(timeout=120)
    assert command.returncode == 1 and f"has {before} answers already; {300 - before} are left" in out
    assert "rank 1 of 2 was ended by SIGKILL" in err
    done = complete()
    assert f"{done} of 300 answers are complete in {parts}; the same command goes on with the others" in err

    last = llm_parallel(*arguments, "--pp", "2")
    assert last.returncode == 0 and f"{300 - done} are left" in last.stdout, last.stderr
    alone = llm_parallel("generate", str(folder), *more, "--output", str(tmp_path / "alone.jsonl"))
    assert alone.returncode == 0, alone.stderr
    assert same(lines_of(target), lines_of(tmp_path / "alone.jsonl")) and not parts.exists()


@pytest.mark.slow
@pytest.mark.processes
def test_a_process_that_hangs_ends_the_command(tmp_path: Path) -> None:
    folder, source = byte_folder(tmp_path / "model"), prompts_file(tmp_path / "in.jsonl", 400)
    target, parts = tmp_path / "out.jsonl", tmp_path / "out.jsonl.parts"
    arguments = ["generate", str(folder), "--input", str(source), "--output", str(target), *HOW]
    how = ["--max-new-tokens", "120", "--tp", "2", "--hang-s", "4", "--logs", str(tmp_path / "logs")]
    with running([*arguments, *how]) as command:
        wait_until(lambda: any(parts.glob("part-*")))
        stopped = workers_of(command.pid)[1]
        os.kill(stopped, signal.SIGSTOP)
        _, err = command.communicate(timeout=120)
    assert command.returncode == 1 and "no progress for 4 s (--hang-s)" in err and "the same command goes on" in err


@pytest.mark.processes
def test_processes_that_do_not_fit_the_layout_are_refused(tmp_path: Path) -> None:
    folder, source = byte_folder(tmp_path / "model"), prompts_file(tmp_path / "in.jsonl", 1)
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}
    done = in_process(
        "generate", str(folder), "--input", source, "--output", tmp_path / "out", "--tp", "4", *HOW, env=place
    )
    assert done.returncode == 2 and "2 processes were started, and --tp 4 --pp 1 --dp 1 is a layout of 4" in done.stderr
    for wrong, named in ((("--tp", "0"), "--tp is 0"), (("--hang-s", "0"), "--hang-s is 0")):
        done = in_process("generate", str(folder), "--input", source, "--output", tmp_path / "out", *wrong)
        assert done.returncode == 2 and named in done.stderr
    done = in_process("generate", str(folder), "--prompt", "x", "--dp", "2")
    assert done.returncode == 2 and "--dp is given without --input" in done.stderr
