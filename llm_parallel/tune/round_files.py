"""What a round leaves on disk, so that a run that is interrupted goes on in the middle of it.

``rounds/000012/`` holds ``round.json`` (which weights answer which prompts, and how answers are judged),
``answers-N.jsonl`` (one line for each answer, by the process of replica N that wrote it, as soon as it is complete),
``scores-N.jsonl`` (what the judge said of it), ``log_probs.npy`` (of every token of every answer, under the weights
that answered) and, if a critic is trained, ``values.npy`` (what that expected before each token). Answers are known by
prompt and sample, not by the process that made them, so that a round goes on in any layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_parallel.files import atomic_write
from llm_parallel.jsonlines import JsonLines

LOG_PROBS, VALUES = "log_probs.npy", "values.npy"
Key = tuple[int, int]
"""Number of a prompt in the run, and of a sample of its answers."""


@dataclass(frozen=True)
class Answered:
    """One answer. tokens: with the one that ended it; log_probs: of each, as it was sampled; reason: why it ended."""

    prompt: int
    sample: int
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    reason: str

    @property
    def key(self) -> Key:
        """Prompt and sample."""
        return self.prompt, self.sample

    @property
    def complete(self) -> bool:
        """Whether the model ended it."""
        return self.reason == "stop"


class RoundFolder:
    """The files of one round."""

    def __init__(self, run_dir: str | Path, number: int) -> None:
        self.number = number
        self.path = Path(run_dir) / "rounds" / f"{number:06d}"

    @property
    def about(self) -> dict[str, Any]:
        """What ``round.json`` says; empty if it is not there."""
        with suppress(OSError, ValueError):
            found = json.loads((self.path / "round.json").read_text(encoding="utf-8"))
            if isinstance(found, dict):
                return found
        return {}

    def begin(self, about: Mapping[str, Any]) -> None:
        """Makes the folder anew for other weights or prompts. One process calls this."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path / "round.json") as handle:
            json.dump(dict(about), handle)

    def judge_again(self, about: Mapping[str, Any]) -> None:
        """Forgets the scores. One process calls this."""
        for path in self.path.glob("scores-*.jsonl"):
            path.unlink(missing_ok=True)
        with atomic_write(self.path / "round.json") as handle:
            json.dump(dict(about), handle)

    def answers(self) -> dict[Key, Answered]:
        """All answers that are known."""
        found = {}
        for line in self._lines("answers"):
            with suppress(KeyError, TypeError, ValueError):
                tokens, log_probs = tuple(map(int, line["tokens"])), tuple(map(float, line["log_probs"]))
                if tokens and len(tokens) == len(log_probs):
                    answer = Answered(int(line["prompt"]), int(line["sample"]), tokens, log_probs, str(line["reason"]))
                    found[answer.key] = answer
        return found

    def scores(self) -> dict[Key, float]:
        """All scores that are known."""
        found = {}
        for line in self._lines("scores"):
            with suppress(KeyError, TypeError, ValueError):
                found[int(line["prompt"]), int(line["sample"])] = float(line["score"])
        return found

    def writer(self, kind: str, replica: int) -> JsonLines:
        """Appends lines of answers or scores. One process of a replica has one."""
        return JsonLines(self.path / f"{kind}-{replica}.jsonl")

    def _lines(self, kind: str) -> Iterator[dict[str, Any]]:
        for path in sorted(self.path.glob(f"{kind}-*.jsonl")):
            with path.open(encoding="utf-8", errors="replace") as handle:
                for text in handle:
                    with suppress(ValueError):  # the last line of a process that was killed
                        line = json.loads(text)
                        if isinstance(line, dict):
                            yield line

    def numbers(self, name: str, tokens: int) -> NDArray[np.float32] | None:
        """Numbers of all ``tokens`` tokens of the answers under the weights that answered, such as log-probabilities
        (``LOG_PROBS``), in the order of their keys; None if they are not known."""
        try:
            found = np.load(self.path / name, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return found if found.shape == (tokens,) and found.dtype == np.float32 else None

    def write_numbers(self, name: str, values: NDArray[np.float32]) -> None:
        """Writes them, whole or not at all. One process calls this."""
        with atomic_write(self.path / name, "wb") as handle:
            np.save(handle, values)


def forget_rounds(run_dir: str | Path, before: int) -> None:
    """Removes the files of rounds before one that nothing needs any more."""
    folder = Path(run_dir) / "rounds"
    for path in sorted(folder.glob("[0-9]" * 6)):
        if int(path.name) < before and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
