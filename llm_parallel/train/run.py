"""What one process of a run holds from its first step to its last."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch.distributed as dist

from llm_parallel.checkpoint.state import TrainState
from llm_parallel.checkpoint.store import CheckpointStore
from llm_parallel.config.tree import RunConfig
from llm_parallel.metrics.record import Basis
from llm_parallel.metrics.run import Metrics
from llm_parallel.objectives.base import Objective
from llm_parallel.parallel import comm_time
from llm_parallel.parallel.engine import POLICY, Engine, Models, Network
from llm_parallel.parallel.groups import Groups
from llm_parallel.parallel.layout import Layout
from llm_parallel.train.feed import Feed, HeldOut
from llm_parallel.train.guard import Guard


@dataclass(frozen=True)
class Place:
    """Which process of a run this is. ``store``: the store by which the processes find each other, if not env://;
    ``elapsed_s``: seconds that the run has had before this process began, which count towards its time limit."""

    rank: int
    world_size: int
    local_rank: int
    store: dist.Store | None = None
    elapsed_s: float = 0.0


@dataclass(frozen=True)
class AlsoTrained:
    """A model that every step trains beside the policy, on the same batches. ``rate``: its learning rate over the
    policy's."""

    objective: Objective
    rate: float = 1.0


class Scoring(Protocol):
    """Scores benchmarks with the weights of a run."""

    def score(self, run: Run) -> bool:
        """Scores them and records the scores. False if that was given up, since a process was asked to stop.
        Collective."""
        ...


@dataclass(kw_only=True)
class Run:
    """Everything that one process of a run holds.

    models: by name, the trained one is ``policy``; also: others of them that are trained, by name; besides: models that
    are neither trained nor saved, by name; objective, feed: what a step minimises, and on what; evaluation, held_out:
    the same for held-out data; evaluated: called after each evaluation; long: surrounds work that takes longer than a
    step; asked_to_stop: whether this process was; observes: whether accuracy and entropy are recorded; started_s: when
    the run began, by the monotonic clock of this process; scoring: of ``evaluate.tasks``, None if there are none."""

    config: RunConfig
    layout: Layout
    models: Models
    objective: Objective
    evaluation: Objective
    feed: Feed
    held_out: HeldOut
    evaluated: Callable[[Run], None]
    long: Callable[[], AbstractContextManager[None]]
    store: CheckpointStore
    state: TrainState
    guard: Guard
    metrics: Metrics
    basis: Basis
    comm: comm_time.Untimed
    asked_to_stop: Callable[[], bool]
    started_s: float
    observes: bool = False
    step_times_s: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    also: Mapping[str, AlsoTrained] = field(default_factory=dict)
    besides: dict[str, Network] = field(default_factory=dict)
    scoring: Scoring | None = None

    @property
    def engine(self) -> Engine:
        """The model that is trained, and its optimizer."""
        return self.engines[POLICY]

    @property
    def engines(self) -> dict[str, Engine]:
        """All models that are trained, by name."""
        return {name: model for name, model in self.models.items() if isinstance(model, Engine)}

    @property
    def all_models(self) -> Models:
        """Models that are saved, and those that are not."""
        return {**self.models, **self.besides}

    @property
    def groups(self) -> Groups:
        """Process groups, which all models share."""
        return self.engine.groups

    def wants_to_stop(self) -> bool:
        """Whether this process was asked to stop, or its time is up."""
        limit = self.config.train.time_limit_s
        return self.asked_to_stop() or (limit is not None and time.monotonic() - self.started_s > limit)
