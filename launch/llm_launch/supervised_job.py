"""The SLURM job that a launcher runs in, from the beginning of a start of it to what becomes of it."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from llm_launch.job_end import GIVEN_UP, Act, Decision, Known, decide, too_often
from llm_launch.job_record import JobRecord, read_record
from llm_launch.journal import Journal
from llm_launch.slurm import Fate, SlurmAway, SlurmError, SlurmJob
from llm_launch.states import EXIT_TOO_FEW
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import EXIT_STOPPED

REQUEUE_S = 300.0
"""How long a slurmctld that does not answer is asked to requeue the job, if the time limit is not near."""
AFTER_LIMIT_S = 60.0
"""SLURM ends a job up to this long after its time limit, and only slurmctld does."""
AGAIN_S = 2.0
TRIES = 3
"""Requests that SLURM may take without doing anything."""


class SupervisedJob:
    """Counts the starts of a job, and puts it back into the queue where that is right."""

    def __init__(self, job: SlurmJob, journal: Journal, config: RunConfig, on_disk: int) -> None:
        """``on_disk``: step of the newest complete checkpoint."""
        self.job, self.journal, self.run_dir = job, journal, Path(config.run_dir)
        self.most_fruitless = config.elastic.max_fruitless
        self.ends_at = math.inf
        with contextlib.suppress(SlurmError):
            left = job.seconds_left()
            self.ends_at = time.monotonic() + left if left is not None else math.inf
        self.record = (read_record(self.run_dir) or JobRecord(job.job_id)).begin(job, on_disk)
        self._write()
        journal.on_resume = self._keep

    def may_begin(self) -> bool:
        """Whether another start may be tried; SLURM and agents requeue too."""
        before = self.record.fruitless - 1
        if before < self.most_fruitless:
            return True
        cause = too_often(before, "the loss of the batch script's node, or a requeue by SLURM")
        self._end(Decision(Act.END, GIVEN_UP, cause, given_up=True), [])
        return False

    def settle(self, status: int, time_is_up: bool, bad: Mapping[str, str], step: int, stop_asked: bool = False) -> int:
        """Exit status of the batch script after a run that ended with ``status`` after ``step``, once the job is back
        in the queue where it belongs there, to run without the nodes ``bad``: at its time limit, when it is preempted,
        and when there were too few devices. ``stop_asked``: whether anybody has asked the run to end. To be called in
        the main thread."""
        if status in (EXIT_STOPPED, EXIT_TOO_FEW):
            self._keep(step)
        # SLURM sends TERM to all processes of a start that it ends, the commands that ask it too, and KILL only later.
        handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            return self._settle(Known(status, time_is_up, stop_asked), list(bad))
        finally:
            signal.signal(signal.SIGTERM, handler)

    def _settle(self, known: Known, bad: list[str]) -> int:
        patience_s = self._patience_s(known.time_is_up)
        known = replace(
            known, patience_s=patience_s, fruitless=self.record.fruitless, most_fruitless=self.most_fruitless
        )
        silent_since: float | None = None
        tries = 0
        while True:
            try:
                known = replace(known, fate=self.job.fate())
                decision = decide(known)
                if decision.act is Act.REQUEUE:
                    known, tries = replace(known, asked=decision.cause), tries + 1
                    if tries > TRIES:
                        raise SlurmError("it takes the request, and the job runs on all the same")
                    self.job.requeue(bad)
            except SlurmAway as error:
                if silent_since is None:
                    silent_since = time.monotonic()
                    self.journal.say(
                        f"slurmctld does not answer yet, and is asked for {known.patience_s:.0f} s: {error}"
                    )
                decision = decide(replace(known, fate=None, waited_s=time.monotonic() - silent_since))
            except SlurmError as error:
                known = replace(known, fate=Fate.RUNNING, refusal=str(error))
                decision = decide(known)
            if decision.act is Act.END:
                return self._end(decision, bad if known.asked and known.fate is Fate.QUEUED else [])
            if decision.act is Act.ASK_AGAIN:
                time.sleep(AGAIN_S)

    def _patience_s(self, time_is_up: bool) -> float:
        """How long slurmctld is asked: after the time limit's warning at least until the limit."""
        left = self.ends_at + AFTER_LIMIT_S - time.monotonic() if time_is_up and self.ends_at < math.inf else 0.0
        return max(REQUEUE_S, left)

    def _end(self, decision: Decision, bad: list[str]) -> int:
        """Says how the job ends, and lets it run again without the nodes ``bad`` if it waits."""
        why = decision.cause
        if decision.act is Act.END and decision.queued:
            why += f", without {', '.join(bad)}" if bad else ""
            self.journal.event("requeue", cause=why)
        elif decision.given_up:
            self.journal.event("not_requeued", cause=why)
        elif why:
            self.journal.say(f"{why}; it does not go back to the queue")
        self.record = self.record.end(f"requeued: {why}" if decision.queued else why, decision.counts)
        self._write()
        if bad:
            try:
                self.job.release(bad)
            except SlurmError as error:
                self.journal.say(f"the job may wait on hold, scontrol release {self.job.job_id} lets it run: {error}")
        return decision.status

    def _keep(self, step: int) -> None:
        """A step is where the next start can go on from."""
        found = self.record.keep(step)
        if found != self.record:
            self.record = found
            self._write()

    def _write(self) -> None:
        self.journal.later(partial(self.record.write, self.run_dir))
