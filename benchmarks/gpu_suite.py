"""Measures everything that a short loan of a GPU allows, in one command whose results stay usable if it is cut short.

    python benchmarks/gpu_suite.py --out FOLDER [--wheels FOLDER] [--resume] [--only operators,step,…] [--rehearse]

Needs torch, triton, numpy, pytest and transformers; Liger, megatron-core and what that needs may be carried as wheels
(benchmarks/README.md). The stages run in order of worth, each with its share of the time (benchmarks/gpu/plan.py).
FOLDER/summary.md, suite.json and details.tar.gz are what to take home; --resume goes on where an earlier run was cut.
--rehearse runs every stage's code on a CPU, on tiny shapes, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Ignored by git, so a machine that is still warm keeps it between two commands.
WORK = ROOT / "runs" / "gpu"
REHEARSAL_BUDGET_S = 3600.0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line. Exits with status 2 and one sentence if it is wrong."""
    from benchmarks.gpu.plan import BUDGET_S, NAMES, STAGES

    stages = "\n".join(f"  {stage.name:12} {stage.what}" for stage in STAGES)
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{stages}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the three files that go home")
    parser.add_argument("--work", type=Path, default=WORK, help=f"folder for everything else; {WORK.relative_to(ROOT)}")
    parser.add_argument("--budget-s", type=float, help=f"seconds for everything; {BUDGET_S:g}")
    parser.add_argument("--only", default=",".join(NAMES), help="stages, with commas")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install for this run")
    parser.add_argument("--resume", action="store_true", help="keep what --work has, its suite.json too; do the rest")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny")
    parser.add_argument("--commit", help="of the code, where there is no repository to ask")
    parser.add_argument("--break", dest="broken", default="", help="stages to make fail, with commas; with --rehearse")
    found = parser.parse_args(arguments)
    found.budget_s = found.budget_s or (REHEARSAL_BUDGET_S if found.rehearse else BUDGET_S)
    found.only = found.only.split(",")
    found.broken = found.broken.split(",") if found.broken else []
    if not 60 <= found.budget_s <= 86400:
        parser.exit(2, f"error: --budget-s {found.budget_s:g} is not between 60 and 86400 seconds\n")
    for option, names in (("--only", found.only), ("--break", found.broken)):
        unknown = [name for name in names if name not in NAMES]
        if unknown:
            parser.exit(2, f"error: {option} {unknown[0]} is no stage; there are {', '.join(NAMES)}\n")
    if found.broken and not found.rehearse:
        parser.exit(2, f"error: --break {found.broken[0]} is for rehearsals; add --rehearse\n")
    if found.wheels is not None and not found.wheels.is_dir():
        parser.exit(2, f"error: --wheels {found.wheels} is no folder; benchmarks/README.md says how to fill one\n")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Runs the suite; exit status 0 if every stage finished."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.gpu import files
    from benchmarks.gpu.plan import STAGES
    from benchmarks.gpu.suite import Suite, run_suite, stop_on_signal

    found = parse(arguments)
    work = found.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if found.resume:
        files.take_over(work, work / "suite.json")
    else:
        files.forget(work)
    stop_on_signal()
    options = {
        "commit": found.commit,
        "command": shlex.join(
            ["python", "benchmarks/gpu_suite.py", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "break": found.broken,
    }
    stages = [stage for stage in STAGES if stage.name in found.only]
    suite = Suite(found.out.resolve(), work, found.budget_s, stages, found.rehearse, options)
    return run_suite(suite, found.wheels.resolve() if found.wheels else None)


if __name__ == "__main__":
    raise SystemExit(main())
