"""What SLURM says of a run's job, asked from any machine that has SLURM's commands, and the word for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from llm_launch.job_record import JobRecord
from llm_launch.slurm import SlurmAway, SlurmError, call, parse_record
from llm_parallel.errors import EXIT_STOPPED

WAITING = ("pending", "requeued")
"""States of a run that SLURM starts when it has nodes."""
AT_WORK = ("starting", "suspended", "ending")
"""States of a run that has nodes, and of whose launcher nothing is heard."""
_QUEUED = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING")
_LOST = {
    "NODE_FAIL": "one of its nodes failed, and SLURM did not put it back into the queue",
    "BOOT_FAIL": "a node could not be started",
    "OUT_OF_MEMORY": "a process needed more of the host's memory than the job was given (sbatch --mem)",
}
_TIME = {"TIMEOUT": "its time limit", "DEADLINE": "its deadline"}


@dataclass(frozen=True)
class JobView:
    """One job, or one task of an array. tasks: numbers of the tasks of an array that it stands for, as ``3`` or
    ``1-4,7``; starts: when SLURM expects to start it."""

    state: str
    restarts: int = 0
    reason: str = ""
    exit_code: str = "0:0"
    nodes: str = ""
    starts: str = ""
    tasks: str = ""

    def is_task(self, number: int) -> bool:
        """Whether it stands for this task."""
        for part in self.tasks.split("%")[0].strip("[]").split(","):
            first, _, last = part.partition("-")
            if first.isdecimal() and int(first) <= number <= int(last if last.isdecimal() else first):
                return True
        return False


def look(job: str, environment: Mapping[str, str]) -> tuple[list[JobView], str]:
    """What is known of a job, of an array one view for each group of tasks; and why nothing is, for people. slurmctld
    forgets a job some minutes after its end; the accounting, where there is one, does not."""
    try:
        return [_of_scontrol(line) for line in _lines(call(["scontrol", "show", "job", job, "-o"], environment))], ""
    except SlurmAway:
        complaint = f"slurmctld does not answer, so nothing is known of job {job} but what the files say"
    except SlurmError as error:
        complaint = f"SLURM knows no job {job} any more"
        if "is not installed" in str(error):
            return [], f"SLURM's commands are not installed here, so nothing is known of job {job} but what files say"
    fields = "JobID,State,ExitCode,NodeList"
    try:
        text = call(["sacct", "-X", "-n", "-P", "-j", job, "-o", fields], environment)
    except SlurmError:
        return [], complaint
    views = [_of_sacct(line) for line in _lines(text)]
    return views, "" if views else complaint


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _of_scontrol(line: str) -> JobView:
    found = parse_record(line)
    empty = ("(null)", "None", "Unknown", "N/A")
    reason, nodes, starts = (found.get(name, "") for name in ("Reason", "NodeList", "StartTime"))
    return JobView(
        found.get("JobState", ""),
        int(found.get("Restarts") or 0),
        "" if reason in empty else reason,
        found.get("ExitCode", "0:0"),
        "" if nodes in empty else nodes,
        "" if starts in empty else starts,
        found.get("ArrayTaskId", ""),
    )


def _of_sacct(line: str) -> JobView:
    name, state, exit_code, nodes = (line.split("|") + [""] * 4)[:4]
    tasks = name.partition("_")[2]
    return JobView(state.split()[0] if state else "", 0, "", exit_code, nodes, "", tasks)


def word(view: JobView, record: JobRecord, alive: bool, local: tuple[str, str]) -> tuple[str, str]:
    """State of a run and what is to say about it. ``alive``: whether this job's launcher gives signs of life;
    ``local``: the same two by the run's files alone."""
    state, why = local
    start = max(view.restarts, record.start)
    if view.state in _QUEUED or (view.state == "COMPLETING" and view.restarts > record.start):
        return ("requeued" if start else "pending"), _waits(view, record, start)
    if view.state in ("SUSPENDED", "STOPPED"):
        return "suspended", "SLURM has stopped its processes, and scontrol resume lets them go on"
    if view.state in ("RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "RESIZING"):
        if alive:
            return state, why
        if view.restarts > record.start or not (record.begun or record.ended):
            return ("starting" if view.state == "RUNNING" else "ending"), ""
        if view.state != "RUNNING" or record.ended:
            return "ending", record.ended
        return "running", "its launcher gives no sign of life; SLURM has not missed its node yet"
    if state == "finished":
        return local
    if view.state == "CANCELLED":
        return "cancelled", UNMET if "Dependency" in view.reason else ""
    if view.state == "PREEMPTED":
        return "preempted", "SLURM gave its nodes to another job, and did not put it back into the queue"
    if view.state in _TIME:
        return "stopped", f"SLURM ended the job at {_TIME[view.state]}"
    if view.state in _LOST:
        return "failed", _LOST[view.state]
    if view.state == "FAILED":
        status = view.exit_code.partition(":")[0]
        if status == str(EXIT_STOPPED):
            return "stopped", record.ended or why
        said = record.ended or (why if state == "failed" else "")
        return "failed", said or f"exit status {status}; see its log"
    return local if view.state == "COMPLETED" else (view.state.lower(), "")


UNMET = "a job that it was to start after has not made all its steps"


def _waits(view: JobView, record: JobRecord, start: int) -> str:
    """Of a job in the queue: what it waits for, and why it is there."""
    reason = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", view.reason).lower()
    for_what = "another job" if view.reason.startswith("Dependency") else "its nodes"
    parts = [f"waits for its start {start + 1}" if start else f"waits for {for_what}"]
    parts[0] += f" ({reason})" if reason else ""
    if "held" in view.reason.lower():
        parts.append(f"on hold: scontrol release {record.job} lets it run")
    elif view.starts:
        parts.append(f"expected at {view.starts.replace('T', ' ')}")
    ended = record.ended.removeprefix("requeued: ")
    return ", ".join(parts) + (f"; its last start ended: {ended}" if ended and start else "")
