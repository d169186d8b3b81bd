"""How the agents of a run are started on the nodes of a SLURM job; each field's docstring is the help of its option."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_parallel.errors import UserError
from llm_parallel.options import option


@dataclass(frozen=True)
class AgentStep:
    """What the step of srun that starts the agents is given."""

    srun: Sequence[str] = option(())
    """Option of srun for the step that starts the agents, as --srun=--container-image=IMAGE; may be given often."""
    agent_python: str | None = None
    """Python that trains on the nodes, as that of a container; the one that runs this command if not given."""
    agent_setup: Sequence[str] = option(())
    """Line of bash before each agent, in its container; may be given often."""

    @property
    def elsewhere(self) -> bool:
        """Whether the processes that train have another Python, and perhaps other packages, than this one."""
        return self.agent_python is not None

    def check(self) -> None:
        """Raises UserError for what srun or bash would refuse, or understand as something else."""
        for text in self.srun:
            if not text.startswith("-") or not text.isprintable():
                raise UserError(f"--srun {text!r} is no option of srun; write it as --srun=--cpu-bind=none")
        for text in self.agent_setup:
            if "\0" in text:
                raise UserError(f"--agent-setup {text!r} has a zero byte; give a line of bash")
        if self.agent_python is not None and not (self.agent_python and self.agent_python.isprintable()):
            raise UserError(f"--agent-python {self.agent_python!r} is no command; give the path of a Python")

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command that starts an agent: ``argv``, which begins with this process's Python, after the lines of
        ``agent_setup`` and with the Python that was asked for. With that it begins in this process's folder, since a
        container begins in one of its own and paths in a run file may be relative."""
        assert argv[0] == sys.executable
        command = [self.agent_python or argv[0], *argv[1:]]
        lines = [f"cd {shlex.quote(str(Path.cwd()))} || exit 2"] if self.elsewhere else []
        lines += self.agent_setup
        return ["bash", "-c", "\n".join([*lines, 'exec "$@"']), "agent", *command] if lines else command

    def options(self) -> list[str]:
        """These options, for the command line of ``llm-parallel launch``."""
        python = [] if self.agent_python is None else [f"--agent-python={self.agent_python}"]
        setup = [f"--agent-setup={text}" for text in self.agent_setup]
        return [*(f"--srun={text}" for text in self.srun), *python, *setup]
