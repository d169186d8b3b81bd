"""Why a node of the run is not there: what its agent, or srun, said. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llm_parallel.lines import printable

TRIES = 2
"""Agents of a node that must have ended by themselves before that counts as what every further one would do."""
PASSING = ("unable to contact", "timed out", "connection failure", "connection refused", "zero bytes", "not responding",
           "temporarily", "node configuration is not available", "nodes are busy", "node failure", "node fail",
           "force terminated", "cancelled", "already completing", "prolog", "credential", "killed")  # fmt: skip
"""Parts of what srun says, in lower case, where the same step may succeed later."""
SILENT = ("lacks support for cpu binding",)
"""Parts of what srun says that mean nothing here, and are not shown."""
MUTE = "its agent said nothing"
UNREACHED = "does not reach the controller at"
"""What an agent says that runs and cannot connect."""
_ENDED = re.compile(r"srun: error: (\S+): tasks? [\d,\[\]-]+: (.+)")
_UNREACHED = re.compile(r"srun: error: Task launch for \S+ failed on node ([^\s:]+): (.+)")
_CONSEQUENCES = ("Application launch failed", "Job step aborted", "Force Terminated", "Terminating", "Waiting up to")
_PREFIX = re.compile(r"^(srun|slurmstepd)[\w.-]*: (error: )?")
_MEMORY = re.compile(r"exceeded \w*\s?memory limit|oom.kill|out of memory", re.IGNORECASE)
"""What SLURM says of a step that needed more memory than its job has on the node, whoever ended what of it."""


@dataclass(frozen=True)
class Absence:
    """Why a node is not there. passing: whether another try may succeed though nothing is mended; ended: whether its
    agent has ended, and is to be started again; late: whether the loss of that agent is known already, and this is what
    became known of it afterwards."""

    node: str
    reason: str
    passing: bool = True
    ended: bool = False
    late: bool = False


def absences(names: Sequence[str], said: Sequence[str], status: int) -> list[Absence]:
    """What the end of a step with an agent on each of ``names`` means. said: the lines that it wrote to standard error;
    status: srun's. Of several nodes only those that srun names: one that cannot be reached ends the step of them all,
    and the others are well."""
    if len(names) > 1:
        named = {found[1]: (found[2], True) for line in said if (found := _UNREACHED.search(line))}
        for name in names:
            if of_memory := _of_memory([line for line in said if _is_about(line, name)]):
                named[name] = (of_memory, False)
        return [Absence(name, *named[name], ended=True) for name in names if name in named]
    (name,) = names
    how = next((found[2].strip() for line in said if (found := _ENDED.search(line))), "")
    own = [line for line in said if line.strip() and not line.startswith("srun: ")]
    of_srun = [line for line in said if line.startswith("srun: ") and not _ENDED.search(line)]
    of_srun = [line for line in of_srun if not any(words in line for words in _CONSEQUENCES)]
    unreached = next((found[2] for line in said if (found := _UNREACHED.search(line))), "")
    of_memory = _of_memory(said)
    if own or of_memory:
        reason = of_memory or _PREFIX.sub("", own[-1].strip())
    else:
        errors = [line for line in of_srun if line.startswith("srun: error: ")] or of_srun
        reason = unreached or (_PREFIX.sub("", errors[0]) if errors else MUTE)
    passing = not of_memory and any(words in line.lower() for words in PASSING for line in (*of_srun, how, unreached))
    end = how or f"srun ended with status {status}"
    return [Absence(name, f"{printable(reason)[:300]} ({printable(end)[:80]})", passing, True)]


def _of_memory(said: Sequence[str]) -> str:
    """The line of ``said`` that says most about a lack of memory, without its prefix; "" if there is none."""
    lines = [_PREFIX.sub("", line.strip()) for line in said if _MEMORY.search(line)]
    return printable(max(lines, key=len, default=""))[:300]


def _is_about(line: str, node: str) -> bool:
    """Whether srun, or the step's shepherd on the node, says this of the node."""
    return line.startswith(f"slurmstepd-{node}: ") or bool((found := _ENDED.search(line)) and found[1] == node)


def alike(absent: Sequence[Absence]) -> str:
    """What all of them said, in one sentence: the reason that all share, or the first few."""
    by_reason: dict[str, list[str]] = {}
    for item in absent:
        by_reason.setdefault(re.sub(rf"(?<!\w){re.escape(item.node)}(?!\w)", "NODE", item.reason), []).append(item.node)
    if len(by_reason) == 1:
        return f"the agents of all {len(absent)} nodes ended alike: {absent[0].reason}" if len(absent) > 1 else (
            f"the agent of {absent[0].node} ended again: {absent[0].reason}"
        )  # fmt: skip
    texts = [f"{item.node}: {item.reason}" for item in absent]
    return "no node has an agent: " + "; ".join(texts[:8]) + (f" and {len(texts) - 8} more" if len(texts) > 8 else "")
