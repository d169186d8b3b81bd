"""When benchmarks are scored within a run (``evaluate.tasks``); ``evaluate/training.py`` scores them."""

from __future__ import annotations

from llm_parallel.metrics.history import scored_steps
from llm_parallel.train.run import Run
from llm_parallel.train.watch import Watch


def is_due(run: Run) -> bool:
    """Whether tasks are scored after the present step: they are before the first one, after the last one, and every
    ``evaluate.interval_steps``."""
    step, interval = run.state.step, run.config.evaluate.interval_steps
    every = interval is not None and step % interval == 0
    return run.scoring is not None and (step == 0 or every or run.state.finished(run.config.train.steps))


def score_after_step(run: Run, watch: Watch) -> bool:
    """Scores the tasks if they are due after a step that was just made; False if that was given up."""
    if run.scoring is None or not is_due(run):
        return True
    with watch.long():
        return run.scoring.score(run)


def make_up_scores(run: Run, watch: Watch) -> bool:
    """The same for a state that was loaded, or that is the last one: a process may have ended between the step and its
    scores, or after both. Collective."""
    if not is_due(run):
        return True
    known = run.groups.is_first_rank and run.state.step in scored_steps(run.config.run_dir)
    (anywhere,) = run.groups.sum_over_world(float(known))
    return bool(anywhere) or score_after_step(run, watch)
