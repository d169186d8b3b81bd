"""One process of a server that several hold together: ``python -m llm_parallel.serve REQUEST``.

Started by ``llm-parallel serve`` with ``--tp`` or ``--pp``. REQUEST is the command's request as JSON. SIGTERM is for
rank 0, which tells the others when it has finished.
"""

from __future__ import annotations

import os
import signal
import sys

from llm_launch.worker import report_error, worker_environment
from llm_parallel.options import from_json
from llm_parallel.quiet import quiet_libraries
from llm_parallel.serve.request import ServeRequest


def main() -> None:
    """Ends the process at once with its status: after a failure other ranks may hang in a collective."""
    quiet_libraries()
    request, environment = from_json(ServeRequest, sys.argv[1]), worker_environment()
    assert environment is not None and request.logs is not None, "llm-parallel serve starts this"
    environment.export()
    if environment.rank > 0:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    try:
        from llm_parallel.generate.load import Member
        from llm_parallel.serve.command import read_keys, serve_here

        keys = read_keys(request.api_key_file, os.environ.get("LLM_PARALLEL_API_KEYS", ""))
        member = Member(environment.rank, environment.local_rank, environment.world_size)
        status = serve_here(request, keys, member)
    except Exception as error:
        status = report_error(request.logs, environment.rank, error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
