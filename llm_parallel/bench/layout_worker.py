"""One process of ``bench step`` on a layout: trains as ``pretrain`` does, but saves nothing."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from llm_launch.worker import WorkerEnv
from llm_parallel.bench.rank import run_plan
from llm_parallel.config.tree import RunConfig
from llm_parallel.quiet import quiet_libraries
from llm_parallel.train.loop import Place, Run, pretrain
from llm_parallel.train.watch import Watch


class BenchWatch(Watch):
    """Leaves after the last step without a checkpoint, and traces that step into ``trace`` if a folder is given."""

    def __init__(self, steps: int, trace: Path | None) -> None:
        self._steps, self._trace = steps, trace
        self._done = 0
        self._profiler: Any = None

    def opened(self, run: Run) -> None:
        """The count begins at the state's step."""
        self._done = run.state.step

    def before_step(self, run: Run) -> None:
        """Starts the trace where it is due."""
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
        """Writes the trace."""
        self._done = run.state.step
        if self._profiler is not None:
            assert self._trace is not None
            self._profiler.stop()
            run.comm.annotate = False
            self._trace.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self._trace / f"rank_{run.engine.groups.rank:04d}.json"))


def train(plan: dict[str, Any], place: WorkerEnv, folder: Path) -> None:
    """plan: the configuration, the steps and the folder of traces. The launcher's terminal is for the result."""
    quiet_libraries()
    place.export()
    config = RunConfig.model_validate(plan["config"])
    watch = BenchWatch(plan["steps"], Path(plan["trace"]) if plan["trace"] else None)
    with (folder / f"output_{place.rank}.log").open("w") as log, contextlib.redirect_stdout(log):
        pretrain(config, Place(place.rank, place.world_size, place.local_rank), watch=watch)


if __name__ == "__main__":
    run_plan(train)
