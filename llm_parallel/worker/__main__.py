"""One process of a run: ``python -m llm_parallel.worker CONFIG.yaml [section.field=value …]``.

Started by ``llm-parallel pretrain``, torchrun or srun. SIGTERM asks the run to save and end after the current step. The
exit status is 0 when all steps are done, and 3 when the run was stopped before (``EXIT_STOPPED``).
"""

from __future__ import annotations

import errno
import faulthandler
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from llm_launch.worker import WorkerEnv, report_error, worker_environment
from llm_parallel.config.load import load_config
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import EXIT_STOPPED, UserError
from llm_parallel.quiet import quiet_libraries
from llm_parallel.versions import refuse_unsupported

SINGLE = WorkerEnv(rank=0, local_rank=0, world_size=1, local_world_size=1, master_addr="127.0.0.1", master_port=0)


def run_worker(given: RunConfig | Sequence[str]) -> int:
    """Trains as the process that the environment says this is; returns the exit status. ``given``: the configuration,
    or a run file and overrides."""
    quiet_libraries()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # kill -USR1 shows where a process hangs
    environment = worker_environment() or SINGLE
    requests: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: requests.append(number))
    log_dir = Path("logs")
    try:
        refuse_unsupported()
        config = given if isinstance(given, RunConfig) else load_config(given[0], given[1:], notice=lambda _: None)
        log_dir = Path(config.run_dir) / "logs"
        if environment is not SINGLE:
            environment.export()
        if config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        from llm_parallel.train.loop import run_training
        from llm_parallel.train.run import Place
        from llm_parallel.tune.methods import method_of

        place = Place(environment.rank, environment.world_size, environment.local_rank)
        state = run_training(config, place, asked_to_stop=lambda: bool(requests), method=method_of(config))
    except Exception as error:
        return report_error(log_dir, environment.rank, explained(error, environment))
    return 0 if state.finished(config.train.steps) else EXIT_STOPPED


def explained(error: Exception, environment: WorkerEnv) -> Exception:
    """Turns the error of a rendezvous port that is in use into UserError; returns any other error as it is."""
    by_torch = type(error).__name__ == "DistNetworkError" and "EADDRINUSE" in str(error)
    if not by_torch and not (isinstance(error, OSError) and error.errno == errno.EADDRINUSE):
        return error
    return UserError(
        f"port MASTER_PORT = {environment.master_port} is in use on the machine of rank 0; set it to a free one"
    )


def main() -> None:
    """Ends the process at once with the run's status: after a failure other ranks may hang in a collective."""
    status = run_worker(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
