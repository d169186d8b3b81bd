"""``llm-parallel report``: one HTML page of runs and sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from llm_parallel.bench.environment import commit
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write
from llm_parallel.lines import say
from llm_parallel.report.efficiency import read_sweep, sentence
from llm_parallel.report.figures import Picture
from llm_parallel.report.page import Section, render
from llm_parallel.report.request import ReportRequest
from llm_parallel.report.runs import read_runs
from llm_parallel.report.sections import runs_sections
from llm_parallel.report.sweep_section import scaling_section


def report_command(request: ReportRequest) -> int:
    """Writes the page, and prints where it is and the efficiency of each sweep. Raises UserError for bad input, before
    anything is written."""
    if not request.runs and not request.sweeps:
        raise UserError("report needs a run folder, or --csv with a sweep")
    runs = read_runs(request.runs)
    sweeps = [series for path in request.sweeps for series in read_sweep(path)]
    sections: list[Section] = []
    pictures: list[Picture] = []
    data = ""
    if runs:
        sections, data = runs_sections(runs, pictures)
    if sweeps:
        sections.append(scaling_section(sweeps, pictures))
    title = request.title or _title([run.name for run in runs], [series.name for series in sweeps])
    moment = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    sources = [*(str(run.folder) for run in runs), *(str(Path(path).resolve()) for path in request.sweeps)]
    made = f"Made {moment} by llm-parallel report, commit {commit()}, from {', '.join(sources)}."
    try:
        with atomic_write(request.out) as handle:
            handle.write(render(title, made, sections, data))
        for picture in pictures if request.png else ():
            with atomic_write(Path(request.png or "") / f"{picture.name}.png", "wb") as handle:
                handle.write(picture.png())
    except OSError as error:
        raise UserError(f"--out {request.out} cannot be written ({error.strerror}); name another file") from None
    for series in sweeps:
        say(sentence(series))
        for point in series.points if series.mode == "layouts" else series.best:
            for flag in series.flags(point):
                say(f"  on {point.world_size}: {flag}")
    size = Path(request.out).stat().st_size
    say(f"report: {request.out} ({size / 1024:,.0f} KiB, {len(pictures)} figures)")
    if request.png:
        say(f"figures: {', '.join(f'{request.png}/{picture.name}.png' for picture in pictures)}")
    return 0


def _title(runs: Sequence[str], series: Sequence[str]) -> str:
    names = [*runs, *series]
    return f"Report on {names[0]}" if len(names) == 1 else f"Report on {', '.join(names[:3])}{' …' * (len(names) > 3)}"
