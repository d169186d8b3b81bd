"""One process of ``bench step`` on a layout: of our trainer, which runs as in ``pretrain`` but saves nothing, or of a
peer."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from llm_launch.worker import WorkerEnv
from llm_parallel.bench.rank import run_plan
from llm_parallel.bench.replicas import run_peer
from llm_parallel.bench.rounds import Turns, leave_together
from llm_parallel.config.tree import RunConfig
from llm_parallel.quiet import quiet_libraries
from llm_parallel.train.loop import run_training
from llm_parallel.train.run import Place, Run
from llm_parallel.train.watch import Watch


class BenchWatch(Watch):
    """Ends training after the last step without a checkpoint, traces that step if a folder is given, and waits for the
    job's turns between steps."""

    def __init__(self, steps: int, trace: Path | None, turns: Turns) -> None:
        self._steps, self._trace, self._turns = steps, trace, turns
        self._done = 0
        self._profiler: Any = None

    def opened(self, run: Run) -> None:
        """Begins counting at the step of the state, and waits for this job's first turn."""
        self._done = run.state.step
        self._turns.barrier = dist.barrier
        self._turns.begin()

    def before_step(self, run: Run) -> None:
        """Starts the trace before the step that is traced."""
        if self._trace is None or not self.wants_to_pause():
            return
        run.comm.annotate = True
        cuda = run.engine.groups.platform.is_cuda
        self._profiler = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])], acc_events=True
        )
        self._profiler.start()

    def wants_to_pause(self) -> bool:
        """Whether this is the last step."""
        return self._done + 1 >= self._steps

    def after_step(self, run: Run) -> None:
        """Writes the trace, and counts the step."""
        self._done = run.state.step
        if self._profiler is not None:
            assert self._trace is not None
            self._profiler.stop()
            run.comm.annotate = False
            self._trace.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self._trace / f"rank_{run.engine.groups.rank:04d}.json"))
        self._turns.step_done()


def train(plan: dict[str, Any], place: WorkerEnv, folder: Path) -> None:
    """Trains one job as one rank. The plan has the configuration, the names of the jobs, each of ``ranks`` processes
    that are numbered job by job, the steps of each phase, and the folder for traces. Output goes to a log, since the
    terminal is for the result."""
    quiet_libraries()
    config = RunConfig.model_validate(plan["config"])
    names, ranks, phases = plan["names"], plan["ranks"], plan["phases"]
    job, rank = divmod(place.rank, ranks)
    name, steps, trace = names[job], sum(phases), Path(plan["trace"]) if plan["trace"] else None
    where = place.master_addr, place.master_port
    store = dist.TCPStore(*where, is_master=place.rank == 0, wait_for_workers=False, timeout=timedelta(minutes=10))
    # A second connection, since waiting for a turn blocks the connection that it waits on.
    waiting = dist.TCPStore(*where, is_master=False, wait_for_workers=False, timeout=timedelta(minutes=10))
    turns = Turns(waiting, names, name, phases, first=rank == 0)
    rendezvous = dist.PrefixStore(name, store)
    replace(place, rank=rank, local_rank=rank, world_size=ranks, local_world_size=ranks).export()
    with (folder / f"output_{place.rank}.log").open("w") as log, contextlib.redirect_stdout(log):
        if name == "ours":
            watch = BenchWatch(steps, trace, turns)
            run_training(config, Place(rank, ranks, rank, store=rendezvous), watch=watch)
        else:
            run_peer(name, config, rendezvous, (rank, ranks), turns, steps, trace)
    if rank == 0:
        (Path(config.run_dir) / f"turns_{name}.json").write_text(json.dumps([turns.seconds, turns.processor_seconds]))
    leave_together(waiting, place.world_size, hosts_store=place.rank == 0)


if __name__ == "__main__":
    run_plan(train)
