"""Runs that ``llm-parallel submit`` handed to a cluster."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from llm_launch.live_run import read_lines
from tests.slurm.cluster import Cluster
from tests.support.commands import Corpus, write_run_file


class Submitted:
    """A run on all nodes of a cluster that ``llm-parallel submit`` handed to Slurm. It ends only by ``end_soon`` or
    ``stop``, so no fault can come too late for it."""

    def __init__(self, cluster: Cluster, corpus: Corpus, *options: str, folder: str = "job") -> None:
        self.cluster = cluster
        self.folder = cluster.folder / folder
        nodes = len(cluster.nodes)
        train, optim = {"steps": 100_000, "global_batch_size": 2 * nodes}, {"schedule": "constant"}
        self.run_file = write_run_file(
            corpus, self.folder, parallel={"dp": nodes}, train=train, optim=optim, data={"eval_fraction": 0.0}
        )
        command = [sys.executable, "-m", "llm_parallel.cli", "submit", str(self.run_file), "--nodes", str(nodes)]
        command += ["--gpus-per-node", "0", *options]
        printed = cluster.run(["env", "OMP_NUM_THREADS=1", *command], timeout_s=300)
        self.job = printed.split()[1].rstrip(";")

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    def steps(self) -> list[int]:
        """Every step that was made, in order, those made again too."""
        return [record["step"] for record in read_lines(self.run / "metrics.jsonl") if "train/loss" in record]

    def reach(self, step: int) -> None:
        """Waits for a step."""
        self._until(lambda: max(self.steps(), default=0) >= step, 300, f"step {step}")

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Waits for what happens while the job lasts."""
        self._until(condition, 300, what)

    def _until(self, condition: Callable[[], bool], timeout_s: float, what: str, ended: bool = False) -> None:
        over = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")
        deadline = time.monotonic() + timeout_s
        while not condition():
            job = self.cluster.job(self.job)
            done = job["JobState"] in over and not ended and not condition()
            assert not done and time.monotonic() < deadline, f"{what} did not happen: {job}\n{self.log()}"
            time.sleep(0.1)

    def end_soon(self) -> int:
        """Waits until the job is back in the queue; its next start ends ten steps after the last one. The last step."""
        self._until(lambda: self.cluster.job(self.job)["Restarts"] == "1", 300, "the requeue")
        path = self.run / "submit.yaml"  # what every start of the job reads
        tree = yaml.safe_load(path.read_text())
        tree["train"]["steps"] = last = max(self.steps()) + 10
        path.write_text(yaml.safe_dump(tree))
        return last

    def goes_on_with(self, world: int) -> None:
        """Waits for steps of a second generation of ``world`` ranks."""
        self._until(lambda: len(self.events("resume")) > 1, 300, "a recovery")
        assert self.events("resume")[1]["world_size"] == world, self.log()
        self.reach(max(self.steps()) + 3)

    def assert_at_most_one_step_again(self) -> None:
        """Every step was made, and one of them twice at most."""
        steps = self.steps()
        assert sorted(set(steps)) == list(range(1, max(steps) + 1)) and len(steps) <= max(steps) + 1

    def stop(self) -> dict[str, str]:
        """Asks the run to save and end; the job's record."""
        self.cluster.run(["scancel", "--signal=TERM", "--batch", self.job])
        over = ("RUNNING", "COMPLETING")
        self._until(lambda: self.cluster.job(self.job)["JobState"] not in over, 300, "the job's end", ended=True)
        return self.cluster.job(self.job)

    def again(self) -> None:
        """Submits its batch file once more, as ``status`` says of a run that has ended."""
        self.job = self.cluster.run(["sbatch", "--parsable", str(self.run / "submit.sbatch")])

    def status(self) -> str:
        """What ``llm-parallel status`` says first, on a machine that is none of the job's nodes."""
        command = [sys.executable, "-m", "llm_parallel.cli", "status", str(self.run)]
        return self.cluster.run(command, timeout_s=300).splitlines()[0].removeprefix(f"{self.run}: ")

    def log(self) -> str:
        """End of what the job printed."""
        path = self.run / "logs" / f"slurm-{self.job}.out"
        return path.read_text(errors="replace")[-3000:] if path.exists() else ""

    def finish(self, timeout_s: float = 300.0) -> dict[str, str]:
        """Waits for the end; the job's record."""
        self._until(lambda: self.cluster.job(self.job)["JobState"] == "COMPLETED", timeout_s, "the job's end")
        return self.cluster.job(self.job)

    def events(self, kind: str) -> list[dict[str, object]]:
        """Events of one kind."""
        return [record for record in read_lines(self.run / "events.jsonl") if record["event"] == kind]
