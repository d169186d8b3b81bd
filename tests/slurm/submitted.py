"""Runs that ``llm-parallel submit`` handed to a cluster."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from llm_launch.drill import read_lines
from tests.slurm.cluster import Cluster
from tests.support.commands import Corpus, write_run_file


class Submitted:
    """A run of four nodes that ``llm-parallel submit`` handed to Slurm."""

    def __init__(self, cluster: Cluster, corpus: Corpus, steps: int, *options: str) -> None:
        self.cluster = cluster
        self.folder = cluster.folder / "job"
        train, data = {"steps": steps, "global_batch_size": 8}, {"eval_fraction": 0.0}
        run_file = write_run_file(corpus, self.folder, parallel={"dp": 4}, train=train, data=data)
        command = [sys.executable, "-m", "llm_parallel.cli", "submit", str(run_file), "--nodes", "4"]
        command += ["--gpus-per-node", "0", *options]
        printed = cluster.run(["env", "OMP_NUM_THREADS=1", *command], timeout_s=60)
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
        self._until(lambda: max(self.steps(), default=0) >= step, 120, f"step {step}")

    def _until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        over = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")
        deadline = time.monotonic() + timeout_s
        while not condition():
            job = self.cluster.job(self.job)
            done = job["JobState"] in over and not condition()
            assert not done and time.monotonic() < deadline, f"{what} did not happen: {job}\n{self.log()}"
            time.sleep(0.1)

    def log(self) -> str:
        """End of what the job printed."""
        path = self.run / "logs" / f"slurm-{self.job}.out"
        return path.read_text(errors="replace")[-3000:] if path.exists() else ""

    def finish(self, timeout_s: float = 200.0) -> dict[str, str]:
        """Waits for the end; the job's record."""
        self._until(lambda: self.cluster.job(self.job)["JobState"] == "COMPLETED", timeout_s, "the job's end")
        return self.cluster.job(self.job)

    def events(self, kind: str) -> list[dict[str, object]]:
        """Events of one kind."""
        return [record for record in read_lines(self.run / "events.jsonl") if record["event"] == kind]
