"""What a run has to know besides weights and optimizer to go on exactly where it stopped."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from llm_parallel.data.segments import Segment
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write, read_json

STATE_NAME = "train_state.json"
ADDED = ("best_eval_loss", "evaluations_since_best", "evaluated_step", "stopped_early", "segments")
"""Fields that the first checkpoints do not have."""


@dataclass
class TrainState:
    """Counters of a run. ``guard`` holds the guard's windows; ``stopped_early``: whether the held-out loss ended it
    (``train.early_stop_evaluations``). ``segments``: the settings under which samples of token files were drawn; with
    ``consumed_samples`` they say where each source stands."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    num_skipped: int = 0
    consecutive_skips: int = 0
    guard: dict[str, list[float]] = field(default_factory=dict)
    elapsed_s: float = 0.0
    best_eval_loss: float | None = None
    evaluations_since_best: int = 0
    evaluated_step: int = 0
    stopped_early: bool = False
    segments: tuple[Segment, ...] = ()

    def finished(self, steps: int) -> bool:
        """Whether a run of ``steps`` steps has nothing left to do."""
        return self.step >= steps or self.stopped_early

    def evaluated(self, loss: float, patience: int | None) -> None:
        """Counts an evaluation; the run is over when ``patience`` of them in a row have found no lower loss."""
        self.evaluated_step = self.step
        if self.best_eval_loss is None or loss < self.best_eval_loss:
            self.best_eval_loss, self.evaluations_since_best = loss, 0
            return
        self.evaluations_since_best += 1
        self.stopped_early = patience is not None and self.evaluations_since_best >= patience

    def write(self, folder: Path) -> None:
        """Writes the state into a checkpoint folder."""
        with atomic_write(folder / STATE_NAME) as handle:
            json.dump(self.record(), handle)

    @classmethod
    def read(cls, folder: Path) -> TrainState:
        """State of a checkpoint folder. Raises UserError if it is damaged."""
        try:
            return cls.from_record(read_json(folder / STATE_NAME))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder / STATE_NAME} is missing or damaged ({error}); load another checkpoint"
            ) from error

    def record(self) -> dict[str, Any]:
        """For JSON."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        guard = {name: list(window) for name, window in self.guard.items()}
        return {**values, "guard": guard, "segments": [segment.record for segment in self.segments]}

    @classmethod
    def from_record(cls, values: dict[str, Any]) -> TrainState:
        """What ``record`` gave. Raises KeyError and TypeError if something is missing or wrong."""
        names = [item.name for item in fields(cls)]
        known = {name: values[name] for name in names if name in values or name not in ADDED}
        return cls(**{**known, "segments": tuple(map(Segment.from_record, known.get("segments", ())))})
