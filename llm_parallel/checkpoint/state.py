"""What a run has to know besides weights and optimizer to go on exactly where it stopped."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write

STATE_NAME = "train_state.json"


@dataclass
class TrainState:
    """Counters of a run. ``guard`` holds the guard's windows; samples need no state but their count."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    num_skipped: int = 0
    consecutive_skips: int = 0
    guard: dict[str, list[float]] = field(default_factory=dict)
    elapsed_s: float = 0.0

    def write(self, folder: Path) -> None:
        """Writes the state into a checkpoint folder."""
        with atomic_write(folder / STATE_NAME) as handle:
            json.dump(asdict(self), handle)

    @classmethod
    def read(cls, folder: Path) -> TrainState:
        """State of a checkpoint folder. Raises UserError if it is damaged."""
        try:
            values = json.loads((folder / STATE_NAME).read_text())
            return cls(**{item.name: values[item.name] for item in fields(cls)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder / STATE_NAME} is missing or damaged ({error}); load another checkpoint"
            ) from error
