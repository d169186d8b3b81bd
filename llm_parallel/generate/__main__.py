"""One process of a layout that answers a file: ``python -m llm_parallel.generate REQUEST``.

Started by ``llm-parallel generate --input`` with ``--tp``, ``--pp`` or ``--dp``. REQUEST is the command's request as
JSON.
"""

from __future__ import annotations

import os
import sys

from llm_launch.worker import report_error, worker_environment
from llm_parallel.generate.request import GenerateRequest
from llm_parallel.options import from_json
from llm_parallel.quiet import quiet_libraries


def main() -> None:
    """Ends the process at once with its status: after a failure other ranks may hang in a collective."""
    quiet_libraries()
    request, environment = from_json(GenerateRequest, sys.argv[1]), worker_environment()
    assert environment is not None and request.logs is not None, "llm-parallel generate starts this"
    environment.export()
    try:
        from llm_parallel.generate.file_command import answer_here
        from llm_parallel.generate.load import Member
        from llm_parallel.lines import say

        member = Member(environment.rank, environment.local_rank, environment.world_size)
        status = answer_here(request, member, say)
    except Exception as error:
        status = report_error(request.logs, environment.rank, error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
