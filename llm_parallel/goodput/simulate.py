"""Simulates a job with failures event by event, to check the closed form and to count where the time goes."""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass, field

from llm_parallel.goodput.closed_form import shares_of_nodes_out
from llm_parallel.goodput.rates import Job

BATCHES, BATCH_FAILURES = 20, 200
"""Fewest batches of failures, and fewest failures of a batch, whose scatter gives a standard error."""
MOST_EVENTS = 400_000
"""Failures and resizings after which a simulation ends, whatever its standard error."""


@dataclass
class Ledger:
    """Where the seconds of a simulated job went; they add up to ``elapsed_s``."""

    elapsed_s: float = 0.0
    useful_s: float = 0.0
    """Training that was kept, counted at full speed."""
    checkpoint_s: float = 0.0
    """Stops for the checkpoints of that training."""
    lost_s: float = 0.0
    """Training and checkpoints after the last complete checkpoint before a failure."""
    down_s: float = 0.0
    """Detection and restart."""
    waiting_s: float = 0.0
    """Waiting because too few nodes are left."""
    shrunken_s: float = 0.0
    """What training on fewer replicas lacked compared with full speed."""
    failures: int = 0
    resizes: int = 0
    """Planned restarts because a node came back."""

    @property
    def goodput(self) -> float:
        """Training at full speed, as a share of the elapsed time."""
        return self.useful_s / self.elapsed_s if self.elapsed_s else 0.0


@dataclass
class Outcome:
    """What a simulation found."""

    ledger: Ledger
    goodput: float
    """Training done, relative to no failures and no checkpoints."""
    standard_error: float
    """Of ``goodput``, over batches of failures; NaN with a single batch."""
    settled: bool
    """Whether the standard error became as small as was asked, over many repairs one after the other, before the most
    events were simulated."""


@dataclass
class _Cluster:
    job: Job
    draw: random.Random
    ledger: Ledger = field(default_factory=Ledger)
    now_s: float = 0.0
    returns_s: list[float] = field(default_factory=list)
    """Heap of the times at which nodes in repair come back."""

    def age(self) -> None:
        """Puts as many nodes into repair as are there after a long time; how much longer each takes is exponential
        too."""
        if self.job.policy == "restart":
            return
        found = shares_of_nodes_out(self.job)
        (nodes_out,) = self.draw.choices([number for number, _ in found], [share for _, share in found])
        self.returns_s = sorted(self.draw.expovariate(1.0 / self.job.repair_s) for _ in range(nodes_out))

    def take_back(self) -> None:
        while self.returns_s and self.returns_s[0] <= self.now_s:
            heapq.heappop(self.returns_s)

    def span(self, start_s: float) -> float:
        """Simulates from the beginning of a restart to the next failure or resizing; returns the seconds of the next
        restart."""
        job, ledger = self.job, self.ledger
        self.take_back()
        while job.nodes_at_work(len(self.returns_s)) == 0:
            ledger.waiting_s += self.returns_s[0] - self.now_s
            self.now_s = self.returns_s[0]
            self.take_back()
        capacity = job.capacity(len(self.returns_s))
        failure_s = self.now_s + self.draw.expovariate(job.failures_per_s * capacity)
        if failure_s <= self.now_s + start_s:
            ledger.down_s += failure_s - self.now_s
            return self._fail(failure_s)
        ledger.down_s += start_s
        up_s = self.now_s + start_s
        cycle_s = job.interval_s + job.write_s
        if capacity < 1.0:  # nodes that are back join after the next checkpoint, once they are enough for a replica
            cycles = max(1, math.ceil((self._grows_at() - up_s) / cycle_s))
            if up_s + cycles * cycle_s < failure_s:
                self._keep(cycles, capacity)
                self.now_s = up_s + cycles * cycle_s
                ledger.resizes += 1
                return job.restart_s
        cycles = int((failure_s - up_s) / cycle_s)
        self._keep(cycles, capacity)
        ledger.lost_s += failure_s - up_s - cycles * cycle_s
        return self._fail(failure_s)

    def _grows_at(self) -> float:
        """When enough nodes are back for one more replica."""
        needed = self.job.returns_to_grow(len(self.returns_s))
        return self.returns_s[0] if needed == 1 else heapq.nsmallest(needed, self.returns_s)[-1]

    def _keep(self, cycles: int, capacity: float) -> None:
        self.ledger.useful_s += cycles * self.job.interval_s * capacity
        self.ledger.shrunken_s += cycles * self.job.interval_s * (1.0 - capacity)
        self.ledger.checkpoint_s += cycles * self.job.write_s

    def _fail(self, failure_s: float) -> float:
        self.now_s = failure_s
        self.ledger.failures += 1
        if self.job.policy != "restart" and self.draw.random() < self.job.hardware_share:
            heapq.heappush(self.returns_s, failure_s + self.draw.expovariate(1.0 / self.job.repair_s))
        return self.job.down_s


def simulate(job: Job, seed: int = 0, *, relative_error: float = 0.002, most_events: int = MOST_EVENTS) -> Outcome:
    """Simulates ``job`` until one standard error of its goodput is at most ``relative_error`` of it, or for
    ``most_events``.

    Failures are a Poisson process in proportion to the GPUs at work, except while the job waits; repair times are
    exponential. It begins with as many nodes in repair as a job that has run for long has, and a batch lasts as long as
    a repair, so that batches are nearly independent. The same seed gives the same result.
    """
    cluster = _Cluster(job, random.Random(seed))
    cluster.age()
    ledger = cluster.ledger
    in_a_repair = 0 if job.policy == "restart" else math.ceil(job.failures_per_s * job.repair_s)
    # A failure is followed by one resizing at most, so that there are BATCHES of them at least.
    batch = min(max(BATCH_FAILURES, in_a_repair), max(1, most_events // (2 * BATCHES)))
    batches: list[tuple[float, float]] = []
    useful_s, began_s, start_s, settled = 0.0, 0.0, 0.0, False
    for _ in range(most_events):
        start_s = cluster.span(start_s)
        if ledger.failures < batch * (len(batches) + 1):
            continue
        batches.append((ledger.useful_s - useful_s, cluster.now_s - began_s))
        useful_s, began_s = ledger.useful_s, cluster.now_s
        settled = len(batches) >= BATCHES and _ratio_error(batches) <= relative_error * useful_s / began_s
        if settled:
            break
    settled &= batch >= in_a_repair
    ledger.elapsed_s = cluster.now_s
    return Outcome(ledger, ledger.goodput, _ratio_error(batches), settled)


def _ratio_error(batches: list[tuple[float, float]]) -> float:
    """Standard error of sum(useful) / sum(elapsed) over independent batches."""
    if len(batches) < 2:
        return math.nan
    elapsed = sum(second for _, second in batches)
    ratio = sum(first for first, _ in batches) / elapsed
    residual = sum((first - ratio * second) ** 2 for first, second in batches)
    return math.sqrt(residual * len(batches) / (len(batches) - 1)) / elapsed
