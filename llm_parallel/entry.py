"""Where the script ``llm-parallel`` begins: a Ctrl-C while modules are loaded ends the command, without a traceback."""

from __future__ import annotations

import signal


def main() -> None:
    """Runs the command; see ``llm_parallel.cli.main``."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # and not a shell's request to ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from llm_parallel import cli

    signal.signal(signal.SIGINT, before)
    cli.main()
