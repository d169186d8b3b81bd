"""The memory copies of one generation, as far as the nodes have room for them.

Copies that one process cannot make are of no use to any, so all processes agree. Where they cannot be made, training
goes on: the copies of the generation before stay until a checkpoint holds as much, that checkpoint is made at once, and
then, when the launcher has removed the older copies, there is room to try again.
"""

from __future__ import annotations

from pathlib import Path

from llm_launch.member import Assignment, Member
from llm_parallel.checkpoint.copies import MemoryCopies
from llm_parallel.errors import UserError
from llm_parallel.train.loop import going_on
from llm_parallel.train.run import Run
from llm_parallel.train.watch import Watch

RETRY_STEPS = 10
"""Steps between two attempts; each is one collective."""


class Copying:
    """Makes this process's copies, or does without."""

    def __init__(self, member: Member, assignment: Assignment, every_steps: int) -> None:
        self._member, self._assignment, self._every = member, assignment, every_steps
        self._memory: MemoryCopies | None = None
        self._failed_step: int | None = None
        """Step at which copies could not be made; None while they are made."""
        self._told_step = 0
        self._told_failure = False

    @property
    def works(self) -> bool:
        """Whether this generation makes copies; the same on every process."""
        return self._memory is not None

    def open(self, run: Run) -> None:
        """Makes the first copy while the next step runs. Every process calls this at the same step."""
        if not self._every:
            return
        memory, cause = None, None
        try:
            memory = MemoryCopies(
                run.models,
                Path(self._member.copies_dir),
                self._assignment.generation,
                self._assignment.partner,
                self._member.secret,
                self._assignment.origin,
            )
        except (UserError, OSError) as error:
            cause = str(error)
        failed, *_ = run.groups.sum_over_world(float(cause is not None))
        again, step = self._failed_step is not None, run.state.step
        if failed:
            if memory is not None:
                memory.close()
            if not again:
                self._failed_step = step
            elif cause is not None:
                cause = None  # it was said at the first attempt
        elif memory is not None:
            self._memory, self._failed_step = memory, None
            memory.start(run.state)
            if again:
                run.metrics.event("copies_again", step=step)
        self._member.send({"is": "copies", "made": not failed, "cause": cause, "step": step})

    def after_step(self, run: Run, watch: Watch, pausing: bool) -> None:
        """Starts the next copy; without copies, sees to a checkpoint and tries again."""
        step = run.state.step
        if run.store.saved_step > self._told_step and run.groups.is_first_rank:
            self._told_step = run.store.saved_step
            self._member.send({"is": "saved", "step": self._told_step})
        if self._memory is not None:
            if (partner := self._member.take_partner()) is not None:
                self._memory.send_to(partner)
                self._told_failure = False
            if step % self._every == 0 or pausing:
                self._memory.start(run.state)
        elif self._failed_step is not None:
            since = step - self._failed_step
            if since == 1:
                with watch.long(), going_on(run, watch):
                    run.store.save(run.models, run.state)
            elif since % RETRY_STEPS == 0:
                self.open(run)

    def finish(self) -> None:
        """Waits until the last copy is complete. A process that waits for its partner node is not at fault, and counts
        as busy."""
        if self._memory is None:
            return
        self._memory.finish(self._member.marker.busy)
        failure = self._memory.partner_failure
        if failure is not None and not self._told_failure:
            self._told_failure = True
            self._member.send({"is": "partner_failed", "cause": failure})

    def close(self) -> None:
        """Ends the copying; finished copies stay."""
        if self._memory is not None:
            self._memory.close()
