"""Ways in which a run ends, each caused in a real run of two processes, and what the next start of that run finds.

python -m tests.launch.endings FOLDER [WAY …]      prints the table of launch/README.md; all ways take half an hour
"""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_launch import wire
from llm_launch.copy_files import forget_run
from llm_launch.live_run import LiveRun, read_lines
from llm_parallel.config.tree import ElasticConfig
from llm_parallel.errors import EXIT_STOPPED
from tests.support.commands import Corpus, prepare_corpus, write_run_file
from tests.support.disks import grow, small_disk_at

LIMIT_S = 240.0
"""A hang ends here; nothing is measured by it."""
AT = 6
"""Step after which the run is ended."""
PATIENT = ("elastic.hang_deviations=100", "elastic.slow_ratio=1000", "elastic.strikes=1000")


@dataclass
class Ending:
    """How one run ended, and what came of it."""

    way: str
    killed: bool
    status: int = -1
    made: int = 0
    """The last step that was made."""
    saved: int = 0
    """Step of the newest checkpoint."""
    went_on: int = -1
    """Step from which the next start went on."""
    source: str = ""
    log: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def lost(self) -> int:
        """Steps that the next start made again."""
        return self.made - self.went_on


@dataclass
class Scene:
    """One run in a folder, and how it is started."""

    folder: Path
    run_file: Path
    overrides: list[str] = field(default_factory=list)
    pipe: str = ""
    """Command to which the output goes."""
    terminal: bool = False
    run: LiveRun | None = None
    master: int = -1
    secret: str = field(default_factory=wire.new_secret)

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    def start(self) -> LiveRun:
        """Starts the run in a session of its own, as a terminal's shell does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run_dir.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "llm_parallel.cli", "launch", str(self.run_file), f"run_dir={self.run_dir}"]
        command += ["elastic.drills=true", "--processes", "2", *PATIENT, *self.overrides]
        log = (self.folder / "launch.log").open("ab")
        streams: dict[str, Any] = {"stdout": log, "stderr": log}
        if self.pipe:
            quoted = " ".join(command)
            command = ["bash", "-c", f"{quoted} | {self.pipe}; exit ${{PIPESTATUS[0]}}"]
        if self.terminal:
            self.master, slave = pty.openpty()
            streams = {"stdout": slave, "stderr": slave}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "LLM_PARALLEL_SECRET": self.secret},
            preexec_fn=_as_a_shell, **streams,
        )  # fmt: skip
        log.close()
        if self.terminal:
            os.close(slave)
        (self.run_dir / "launch.log").touch()
        self.run = LiveRun(self.run_dir, process, self.secret)
        return self.run

    def launcher(self) -> int:
        """Process of the launcher, which is the shell's child in a pipe."""
        assert self.run is not None
        if not self.pipe:
            return self.run.process.pid
        children = Path(f"/proc/{self.run.process.pid}/task/{self.run.process.pid}/children").read_text().split()
        return next(int(pid) for pid in children if b"llm_parallel" in Path(f"/proc/{pid}/cmdline").read_bytes())

    def kill_worker(self) -> None:
        """One worker, at this moment."""
        assert self.run is not None
        with suppress(KeyError, ProcessLookupError, IndexError, StopIteration):
            self.run.cause("kill", 1)


def _as_a_shell() -> None:
    """Signals as an interactive shell hands them on; whoever runs this test in the background ignores some."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


Act = Callable[[Scene], None]


def _signal(*numbers: int, pause_s: float = 0.0) -> Act:
    def act(scene: Scene) -> None:
        for number in numbers:
            os.kill(scene.launcher(), number)
            time.sleep(pause_s)

    return act


def _twice_with_one_stopped(scene: Scene) -> None:
    assert scene.run is not None
    scene.run.cause("stop", 1)
    _signal(signal.SIGINT, signal.SIGINT, pause_s=0.5)(scene)


def _interrupt_group(scene: Scene) -> None:
    """Ctrl-C: every process in the foreground gets it, ``tee`` too."""
    assert scene.run is not None
    children = Path(f"/proc/{scene.run.process.pid}/task/{scene.run.process.pid}/children").read_text().split()
    for pid in map(int, children):
        os.kill(pid, signal.SIGINT)


def _hang_up(scene: Scene) -> None:
    """The terminal's window is closed."""
    assert scene.run is not None
    os.close(scene.master)
    os.kill(scene.run.process.pid, signal.SIGHUP)


def _delete(scene: Scene) -> None:
    gone = scene.run_dir.rename(scene.folder / "gone")
    while gone.exists():  # somebody may be writing there still
        shutil.rmtree(gone, ignore_errors=True)
    time.sleep(2.5)
    _signal(signal.SIGTERM)(scene)


def _fill(scene: Scene) -> None:
    _filled(scene.run_dir)
    time.sleep(1.0)
    _signal(signal.SIGTERM)(scene)


def _filled(folder: Path) -> None:
    with suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(b"x" * 4096)


def _mistake(scene: Scene) -> None:
    """The same exception in every process."""
    assert scene.run is not None
    step = scene.run.steps()[-1]["step"] + 30
    for rank in range(2):
        scene.run.cause("raise", rank, from_step=step)


def _all(scene: Scene) -> None:
    """kill -9 of launcher, agent, zygote and workers."""
    assert scene.run is not None
    node = scene.run.status()["nodes"][0]
    for pid in (scene.launcher(), node["agent_pid"], *node["workers"].values()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _nothing(_: Scene) -> None:
    pass


@dataclass(frozen=True)
class Way:
    """act: what ends the run; statuses: exit statuses that are right; overrides, pipe, terminal, disk: how it runs;
    saves: whether all that was made has to be on disk."""

    act: Act
    statuses: tuple[int, ...]
    saves: bool = False
    overrides: tuple[str, ...] = ("train.steps=100000",)
    pipe: str = ""
    terminal: bool = False
    disk: bool = False
    at: int = AT


SAVED = (EXIT_STOPPED,)
WAYS: dict[str, Way] = {
    "all steps are made": Way(_nothing, (0,), True, ("train.steps=60",)),
    "SIGTERM": Way(_signal(signal.SIGTERM), SAVED, True),
    "SIGINT": Way(_signal(signal.SIGINT), SAVED, True),
    "SIGINT twice, a worker stopped": Way(_twice_with_one_stopped, SAVED, True),
    "train.time_limit_s": Way(_nothing, SAVED, True, ("train.steps=100000", "train.time_limit_s=45")),
    "launch | head": Way(_nothing, SAVED, True, pipe="head -n 12", at=8),
    "launch | tee, Ctrl-C": Way(_interrupt_group, SAVED, True, pipe="tee /dev/null"),
    "closed terminal": Way(_hang_up, SAVED, True, terminal=True),
    "full disk, SIGTERM": Way(_fill, (1, 2), disk=True),
    "run folder deleted, SIGTERM": Way(_delete, SAVED, True),
    "error of the program": Way(_mistake, (1,)),
    "too few devices": Way(_nothing, (75,), overrides=("train.steps=100000", "elastic.min_devices=2",
                           "elastic.strikes=1", "elastic.wait_s=30")),
    "kill -9 of all processes": Way(_all, (-signal.SIGKILL,)),
}  # fmt: skip


@contextmanager
def _disk(scene: Scene, way: Way) -> Any:
    with small_disk_at(scene.run_dir, "12m") if way.disk else nullcontext():
        yield


def drive(corpus: Corpus, folder: Path, name: str, killed: bool) -> Ending:
    """Ends one run in a way, alone or together with a killed worker, and starts it again."""
    way, ending = WAYS[name], Ending(name, killed)
    run_file = write_run_file(
        corpus, folder, train={"global_batch_size": 4}, optim={"schedule": "constant"}, data={"eval_fraction": 0.0}
    )
    scene = Scene(folder, run_file, [*way.overrides, "parallel.dp=2"], way.pipe, way.terminal)
    with _disk(scene, way):
        try:
            run = scene.start()
            _until_step(scene, way.at)
            if killed or name == "too few devices":
                scene.kill_worker()
            before = run.steps()
            way.act(scene)
            ending.status = run.wait(LIMIT_S)
            if scene.pipe and ending.status > 128:
                ending.status = 128 - ending.status
            ending.log = (folder / "launch.log").read_text(errors="replace")
            told = [int(found) for found in re.findall(r"^step +(\d+)/", ending.log, re.MULTILINE)]
            ending.made = max([*told, *(record["step"] for record in [*before, *run.steps()])], default=0)
            ending.events = read_lines(run.run_dir / "events.jsonl")
            ending.saved = _saved(run.run_dir)
            if way.disk:
                (run.run_dir / "filler").unlink(missing_ok=True)
                grow(run.run_dir, "64m")
            _again(scene, ending)
        finally:
            if scene.run is not None:
                scene.run.close()
            forget_run(Path(ElasticConfig().replica_dir), scene.run_dir)
    return ending


def _until_step(scene: Scene, step: int) -> None:
    assert scene.run is not None
    run, deadline = scene.run, time.monotonic() + LIMIT_S
    while not any(record["step"] >= step for record in run.steps()) and run.process.poll() is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"step {step}: {(scene.folder / 'launch.log').read_text(errors='replace')[-3000:]}")
        if scene.terminal:
            _drain(scene.master)
        time.sleep(0.02)


def _drain(master: int) -> None:
    os.set_blocking(master, False)
    with suppress(OSError):
        while os.read(master, 65536):
            pass


def _saved(run_dir: Path) -> int:
    with suppress(OSError, ValueError):
        return int((run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    return 0


def _again(scene: Scene, ending: Ending) -> None:
    """The next start, for two steps more."""
    scene.pipe, scene.terminal = "", False
    found = len(read_lines(scene.run_dir / "events.jsonl"))
    scene.overrides = ["parallel.dp=2", f"train.steps={ending.made + 3}", "elastic.strikes=1000"]
    run = scene.start()
    run.wait(LIMIT_S)
    later = read_lines(scene.run_dir / "events.jsonl")[found:]
    begun = next((event for event in later if event["event"] == "run_start"), None)
    formed = next((event for event in later if event["event"] == "form"), {})
    if begun is not None:
        ending.went_on, ending.source = begun["step"], formed.get("cause", "")


def row(name: str, alone: Ending | None, together: Ending | None) -> str:
    """One row of the table: a way alone, and together with a killed worker; None where a run hung."""
    cells = [name]
    for ending in (alone, together):
        if ending is None:
            cells += ["hung"] * 4
            continue
        source = "memory" if ending.source == "memory" else "disk"
        cells += [str(_shell_status(ending.status)), f"{ending.made}, {ending.went_on}", str(ending.lost), source]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _shell_status(status: int) -> int:
    return 128 - status if status < 0 else status


def promised(name: str, ending: Ending | None) -> str:
    """What of a way's promises did not hold; empty if all did."""
    if ending is None:
        return "it hung"
    way, broken = WAYS[name], []
    if ending.status not in way.statuses:
        broken.append(f"status {ending.status}")
    if not 0 <= ending.lost <= 1 or not ending.made:
        broken.append(f"step {ending.made} was made, and the next start went on from {ending.went_on}")
    if way.saves and ending.saved != ending.made:
        broken.append(f"step {ending.made} was to be on disk, and step {ending.saved} is")
    if "Traceback" in ending.log and name != "error of the program":
        broken.append("a traceback on the terminal")
    return "; ".join(broken)


def main(arguments: Sequence[str]) -> int:
    """Prints one row for each way, alone and with a killed worker; the exit status is 1 where a promise was broken."""
    folder, names = Path(arguments[0]), arguments[1:]
    corpus, broken = prepare_corpus(folder / "corpus"), []
    print("| way | status | made, goes on | lost | from | with a killed worker | made, goes on | lost | from |")
    print("| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | --- |", flush=True)
    for name in names or WAYS:
        found: list[Ending | None] = []
        for killed in (False, True):
            place = folder / f"{list(WAYS).index(name)}-{int(killed)}"
            shutil.rmtree(place, ignore_errors=True)
            try:
                found.append(drive(corpus, place, name, killed))
            except TimeoutError as error:
                print(f"{name}, {killed}: {error}", file=sys.stderr)
                found.append(None)
            trouble = promised(name, found[-1])
            broken += [f"{name}{', a worker killed' if killed else ''}: {trouble}"] if trouble else []
        print(row(name, *found), flush=True)
    print("\n".join(broken) or "every promise was kept")
    return int(bool(broken))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
