"""The text of the batch file that ``llm-parallel submit`` hands to sbatch; its user can read and change it.

What a user gives may have spaces, ``%``, ``#`` and letters of any language: in options of sbatch it is quoted, in
commands too, and what would end a line is refused (``check_request``).
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import sys
from pathlib import Path

from llm_launch.agent_step import AgentStep
from llm_launch.submit_request import SubmitRequest
from llm_parallel.errors import UserError

STARTS = 3
CODE_LETTERS = 6
FOLDER_LETTERS = 80
_NOT_IN_NAME = re.compile(r"[^A-Za-z0-9._,@+-]")
_NOT_IN_FOLDER = re.compile(r"[^\w.,@+=-]")
_PLAIN = re.compile(r"[^\s\"'#\\]+")


def job_name(request: SubmitRequest, run_dir: Path) -> str:
    """The name of the job. No two run folders have the same: jobs of one name start one after the other."""
    code = hashlib.sha256(str(run_dir).encode()).hexdigest()[:CODE_LETTERS]
    return request.name or f"{_NOT_IN_NAME.sub('-', run_dir.name).strip('-') or 'run'}-{code}"


def batch_file(request: SubmitRequest, step: AgentStep, run_dir: Path, frozen: Path) -> str:
    """Text of the batch file of a run in ``run_dir`` (absolute), each start of which reads the run file ``frozen``.
    Raises UserError if the user's template lacks a placeholder."""
    gpus = [f"--gpus-per-node={request.gpus}"] if request.gres == "none" and request.gpus else []
    command = [
        shlex.join([sys.executable, "-m", "llm_parallel.cli", "launch", str(frozen)]),
        *map(shlex.quote, [*gpus, *step.options()]),
    ]
    values = ""
    if request.sweep:
        folders = [f"run_dir={json.dumps(str(run_dir / name), ensure_ascii=False)}" for name in sweep_folders(request)]
        values = f"values=({shlex.join(request.sweep)})\nfolders=({shlex.join(folders)})"
        command += [f'"${{{name}[$SLURM_ARRAY_TASK_ID]}}"' for name in ("values", "folders")]
    parts = {"{options}": _options(request, run_dir), "{values}": values, "{setup}": "\n".join(request.setup)}
    if request.template is not None:
        return _filled(request.template, {**parts, "{command}": " ".join(command)})
    setup = f"# Set-up of this site.\n{parts['{setup}']}\n\n" if request.setup else ""
    return _TEXT.format(
        options=parts["{options}"],
        command="\n".join(f"    {line}" for line in command),
        starts=" ".join(map(str, range(1, STARTS + 1))),
        leftovers=" ".join(["${!SLURM_STEP*}", "${!SRUN_*}", *([] if values else ["${!SLURM_ARRAY*}"])]),
        setup=setup,
        sweep=f"# What differs between the runs of the array.\n{values}\n\n" if values else "",
    )


def sweep_folders(request: SubmitRequest) -> list[str]:
    """Names of the folders of an array's runs, by the value that differs, as ``optim.lr=1e-4``. Raises UserError if
    two runs would have the same."""
    names = [_NOT_IN_FOLDER.sub("_", value)[:FOLDER_LETTERS] for value in request.sweep]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--array {request.array!r} has two values for the folder {twice}; give each value once")
    return names


def _filled(template: str, parts: dict[str, str]) -> str:
    try:
        text = Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--template {template} cannot be read: {error}") from None
    for name, part in parts.items():
        if name not in text and (part or name in ("{options}", "{command}")):
            raise UserError(f"--template {template} has no {name}; it stands for what submit fills in")
    # In one go, so that a placeholder in what is filled in stays as it is.
    return re.sub("|".join(map(re.escape, parts)), lambda found: parts[found[0]], text)


def _options(request: SubmitRequest, run_dir: Path) -> str:
    log = str(run_dir).replace("%", "%%") + "/logs/slurm-" + ("%A_%a" if request.sweep else "%j") + ".out"
    fewest, most = request.min_nodes or request.nodes, request.nodes + request.spares
    nodes = str(most) if fewest == most else f"{fewest}-{most}"
    spares = f", {request.spares} of {most} as spares" if request.spares else ""
    throttle = f"%{request.throttle}" if request.throttle else ""
    last = len(request.sweep) - 1
    names = ("partition", "account", "qos", "reservation", "constraint", "time", "segment", "switches")
    named = {name: getattr(request, name) for name in names}
    lines = [
        option("job-name", job_name(request, run_dir)),
        option("comment", f"llm-parallel run in {run_dir}"),
        option("chdir", str(Path.cwd())) + "    # from where relative paths of the run file begin",
        *([f"--array=0-{last}{throttle}    # one run for each value, in a folder named after it"] if last >= 0 else []),
        f"--nodes={nodes}    # the launcher takes what it gets{spares}",
        *_gpus(request),
        *_share(request),
        *(option(name, str(value)) for name, value in named.items() if value is not None),
        "--no-kill    # the loss of a node is the run's matter, not the end of the job",
        "--requeue    # it comes back after a node of its own died, and after its time limit",
        "--dependency=singleton    # two jobs of this name never run at once",
        "--open-mode=append    # the log of every start in one file",
        option("output", log),
        f"--signal=B:USR1@{request.warning}    # before the time limit: save, requeue, go on later",
        *map(_as_given, request.options),
    ]
    return "\n".join(f"#SBATCH {line}" for line in lines)


def _gpus(request: SubmitRequest) -> list[str]:
    if request.gres is not None or not request.gpus:
        return [] if request.gres in (None, "none") else [option("gres", request.gres)]
    return [f"--gpus-per-node={request.gpu_type + ':' if request.gpu_type else ''}{request.gpus}"]


def _share(request: SubmitRequest) -> list[str]:
    if request.shared:
        return ["--ntasks-per-node=1", f"--cpus-per-task={request.cpus}", f"--mem={request.mem}"]
    return ["--exclusive", f"--mem={request.mem or '0    # all of each node'}"]


def option(name: str, value: str) -> str:
    """An option of sbatch in a batch file. Where a space, ``#`` or quote would end or change the value, it is
    quoted."""
    return f"--{name}={value}" if _PLAIN.fullmatch(value) else f'--{name}="{value}"'


def _as_given(text: str) -> str:
    """An option as the user gave it. The user's shell has taken the quotes away that a space needs."""
    name, equals, value = text.partition("=")
    return option(name.removeprefix("--"), value) if equals and text.startswith("--") and '"' not in value else text


_TEXT = """\
#!/bin/bash
{options}

# Signals for this script are meant for the launcher, also those that come before it listens.
trap 'asked=USR1; kill -USR1 "$launcher" 2>/dev/null' USR1
trap 'asked=TERM; kill -TERM "$launcher" 2>/dev/null' TERM
# What a job or step that this one was submitted from may have left in the environment.
unset {leftovers} SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU SLURM_CPUS_PER_GPU

{setup}{sweep}# The launcher runs here, on the job's first node, and starts an agent on every node by srun.
run=(
{command}
)
for start in {starts}; do
    LLM_PARALLEL_ASKED=$asked "${{run[@]}}" &
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
