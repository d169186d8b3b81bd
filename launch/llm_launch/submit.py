"""``llm-parallel submit``: a run as a SLURM job, by a batch file that its user can read, change and submit again."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from llm_launch.job_record import JobRecord
from llm_launch.slurm import parse_time
from llm_launch.submit_request import SubmitRequest
from llm_parallel.config.rules import check_config
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write, refuse_strangers

FILE_NAME = "submit.sbatch"
STARTS = 3
_NOT_IN_NAME = re.compile(r"[^A-Za-z0-9._,@+-]")
_NAME = re.compile(r"[A-Za-z0-9._,@+-]+")


def check_request(request: SubmitRequest, config: RunConfig) -> None:
    """Raises UserError for what SLURM or the run would refuse."""
    for name, value, least in (
        ("nodes", request.nodes, 1), ("gpus-per-node", request.gpus_per_node, 0), ("spares", request.spares, 0),
        ("warning-s", request.warning_s, 10),
    ):  # fmt: skip
        if value < least:
            raise UserError(f"--{name} {value} must be at least {least}")
    if request.min_nodes is not None and not 1 <= request.min_nodes <= request.nodes:
        raise UserError(f"--min-nodes {request.min_nodes} must be at least 1 and at most --nodes {request.nodes}")
    if request.time is not None:
        seconds = parse_time(request.time)
        if seconds is None or seconds <= 0:
            raise UserError(f"--time {request.time} is no time limit; write days-hours:minutes:seconds, as 3-00:00:00")
        if seconds <= request.warning_s:
            raise UserError(
                f"--time {request.time} leaves no time before the warning {request.warning_s} s earlier; give more "
                "time or a smaller --warning-s"
            )
    for name in ("partition", "account", "qos", "name"):
        text = getattr(request, name)
        if text is not None and not _NAME.fullmatch(text):
            raise UserError(f"--{name} {text!r} has characters that SLURM does not take; use letters, digits, . _ -")
    folder = str(Path(config.run_dir).resolve())
    if not folder.isprintable() or '"' in folder or "\\" in folder:
        raise UserError(
            f"run_dir = {config.run_dir!r} has a line break or another character that a batch file's options cannot"
            " hold; give a folder without it"
        )
    for option in request.options:
        if not option.startswith("-") or not option.isprintable():
            raise UserError(f"--sbatch {option!r} is no option of sbatch; write it as --sbatch=--constraint=h100")
    if request.gpus_per_node:
        check_config(config, request.nodes * request.gpus_per_node, "cuda", uneven=True)


def batch_file(request: SubmitRequest, config: RunConfig, run_file: Path, overrides: Sequence[str]) -> str:
    """Text of the batch file. Raises UserError if the user's template lacks a placeholder."""
    run_dir = Path(config.run_dir).resolve()
    command = " ".join(
        shlex.quote(part)
        for part in (sys.executable, "-m", "llm_parallel.cli", "launch", str(run_file), *overrides,
                     f"elastic.spare_nodes={request.spares}")
    )  # fmt: skip
    values = ""
    if request.sweep:
        values = f"values=({' '.join(map(shlex.quote, request.sweep))})"
        command += f' "${{values[$SLURM_ARRAY_TASK_ID]}}" run_dir={shlex.quote(str(run_dir))}/"$SLURM_ARRAY_TASK_ID"'
    options = _options(request, run_dir)
    if request.template is None:
        starts = " ".join(map(str, range(1, STARTS + 1)))
        sweep = f"# What differs between the runs of the array.\n{values}\n\n" if values else ""
        return _TEXT.format(options=options, command=command, starts=starts, sweep=sweep)
    try:
        text = Path(request.template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--template {request.template} cannot be read: {error}") from None
    for name in ("{options}", "{command}", *(("{values}",) if values else ())):
        if name not in text:
            raise UserError(f"--template {request.template} has no {name}; it stands for what submit fills in")
    return text.replace("{options}", options).replace("{values}", values).replace("{command}", command)


def _options(request: SubmitRequest, run_dir: Path) -> str:
    name = request.name or _NOT_IN_NAME.sub("-", run_dir.name)
    log = str(run_dir).replace("%", "%%")
    fewest, most = request.min_nodes or request.nodes, request.nodes + request.spares
    nodes = str(most) if fewest == most else f"{fewest}-{most}"
    spares = f", {request.spares} of {most} as spares" if request.spares else ""
    gpus = [f"#SBATCH --gpus-per-node={request.gpus_per_node}"] if request.gpus_per_node else []
    named = {"partition": request.partition, "account": request.account, "qos": request.qos, "time": request.time}
    sweep = request.sweep
    array = [f"#SBATCH --array=0-{len(sweep) - 1}    # one run for each value, in folders 0, 1, …"] if sweep else []
    lines = [
        f"#SBATCH --job-name={name}",
        *array,
        f"#SBATCH --nodes={nodes}    # the launcher takes what it gets{spares}",
        *gpus,
        "#SBATCH --exclusive",
        *(f"#SBATCH --{option}={value}" for option, value in named.items() if value is not None),
        "#SBATCH --no-kill    # the loss of a node is the run's matter, not the end of the job",
        "#SBATCH --requeue    # it comes back after a node of its own died, and after its time limit",
        "#SBATCH --open-mode=append    # the log of every start in one file",
        f"#SBATCH --output={_quoted(log + '/logs/slurm-' + ('%A_%a' if sweep else '%j') + '.out')}",
        f"#SBATCH --signal=B:USR1@{request.warning_s}    # before the time limit: save, requeue, go on later",
        *(f"#SBATCH {option}" for option in request.options),
    ]
    return "\n".join(lines)


def _quoted(path: str) -> str:
    """A path in an option of a batch file, where a space or ``#`` would end it."""
    return path if re.fullmatch(r"[\w./%+@,:=-]+", path) else f'"{path}"'


_TEXT = """\
#!/bin/bash
{options}

{sweep}# The launcher runs here, on the job's first node, and starts an agent on every node by srun.
# Signals for this script are meant for it.
trap 'asked=USR1; kill -USR1 "$launcher" 2>/dev/null' USR1
trap 'asked=TERM; kill -TERM "$launcher" 2>/dev/null' TERM
for start in {starts}; do
    LLM_PARALLEL_ASKED=$asked {command} &
    launcher=$!
    # A trapped signal ends `wait`.
    while kill -0 "$launcher" 2>/dev/null; do wait "$launcher"; done
    wait "$launcher"
    status=$?
    # A launcher that was killed is started again, and finds the state that its workers left in memory; not in a job
    # that is being ended. One that the time limit's warning met before it listened hears of it now.
    [ "$status" -gt 128 ] && [ "$asked" != TERM ] || break
done
exit "$status"
"""


def submit(text: str, run_dir: Path, sweep: Sequence[str] = ()) -> str:
    """Writes the batch file into the run folder and hands it to sbatch; the job's id. ``sweep``: what differs between
    the runs of an array.

    Raises UserError if there is no sbatch, or it refuses."""
    path = run_dir / FILE_NAME
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        refuse_strangers(run_dir, run_dir.stat())
        with atomic_write(path) as handle:
            handle.write(text)
    except OSError as error:
        raise UserError(f"run_dir = {run_dir} cannot be written ({error.strerror}); give a shared folder") from None
    try:
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise UserError(f"sbatch is not installed here; submit {path} where it is, or see --dry-run") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"sbatch did not answer within 60 s; is slurmctld up? The batch file is {path}") from None
    if done.returncode:
        raise UserError(f"sbatch refused {path}: {done.stderr.strip()}")
    job = done.stdout.strip().split(";")[0]
    with contextlib.suppress(OSError):  # the job is in the queue, whether or not `status` can find it
        JobRecord(job, sweep=list(sweep)).write(run_dir)
    return job
