"""One process of an evaluation by a model that several hold together: ``python -m llm_parallel.evaluate REQUEST``.

Started by ``llm-parallel evaluate`` with ``--tp`` or ``--pp``. REQUEST is the command's request as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from llm_launch.worker import report_error, worker_environment
from llm_parallel.evaluate.request import EvaluateRequest
from llm_parallel.quiet import quiet_libraries


def main() -> None:
    """Ends the process at once with its status: after a failure other ranks may hang in a collective."""
    quiet_libraries()
    given = json.loads(sys.argv[1])
    logs = Path(given.pop("logs"))
    for name in ("data_dir", "out", "compare", "tokenizer"):
        given[name] = None if given[name] is None else Path(given[name])
    given["tasks"] = tuple(given["tasks"])
    environment = worker_environment()
    assert environment is not None, "llm-parallel evaluate starts this"
    environment.export()
    try:
        from llm_parallel.evaluate.command import evaluate_here
        from llm_parallel.generate.load import Member

        member = Member(environment.rank, environment.local_rank, environment.world_size)
        status = evaluate_here(EvaluateRequest(**given), member)
    except Exception as error:
        status = report_error(logs, environment.rank, error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
