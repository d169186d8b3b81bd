"""``llm-parallel drill``: random faults in real runs, and whether they were survived and blamed rightly.

Two kinds. A *blame* drill is a short run with one scenario whose culprit is known: no healthy device may be removed and
every bad one must be. A *soak* is one long run with a fault every so often, which has to end by itself with every step
made from the right samples. Both print what happened and give exit status 1 if something was not as it has to be.
"""

from __future__ import annotations

import random
from pathlib import Path

from llm_launch.drill_blame import blame_drill
from llm_launch.drill_request import DrillRequest
from llm_launch.drill_scenes import SCENES
from llm_launch.drill_soak import SoakPlan, soak
from llm_parallel.errors import UserError
from llm_parallel.lines import say


def drill_command(request: DrillRequest) -> int:
    """Runs the drills and prints what came out; exit status 1 if any was not survived as it has to be. Raises UserError
    for numbers that make no drill, and a run file that is not there."""
    _check(request)
    run_file, folder = Path(request.run_file), Path(request.folder)
    rng, failed = random.Random(request.seed), 0
    skipped = 0
    for number in range(request.blame):
        finding = blame_drill(run_file, folder, number, rng, _kinds(request))
        failed += bool(finding.wrong)
        skipped += bool(finding.skipped)
        verdict = f"skipped, {finding.skipped}" if finding.skipped else "; ".join(finding.wrong) or "right"
        say(f"blame {finding.scenario}: {verdict} ({finding.seconds:.0f} s)")
    if request.blame:
        right = request.blame - failed - skipped
        say(f"{request.blame} blame drills, seed {request.seed}: {right} right, {failed} wrong, {skipped} skipped")
    if request.soak_s:
        result = soak(run_file, folder, SoakPlan(request.soak_s, request.every_s, request.pair_ms), rng)
        failed += bool(result.finding.wrong)
        for line in result.lines():
            say(line)
    return int(failed > 0)


def _check(request: DrillRequest) -> None:
    for name in ("blame", "soak_s", "pair_ms"):
        if (value := getattr(request, name)) < 0:
            raise UserError(f"--{name.replace('_', '-')} {value:g} must not be negative; 0 means none")
    for name in _kinds(request):
        if name not in SCENES:
            raise UserError(f"--kinds {name!r} is unknown; take some of: {', '.join(sorted(SCENES))}")
    if request.every_s <= 0:
        raise UserError(f"--every-s {request.every_s:g} must be over 0: the mean seconds between faults")
    if not Path(request.run_file).is_file():
        raise UserError(f"{request.run_file} does not exist; give a run file whose data is here")


def _kinds(request: DrillRequest) -> list[str]:
    return [name.strip() for name in request.kinds.split(",") if name.strip()]
