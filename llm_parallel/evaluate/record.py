"""What a model has answered so far, in a file that an evaluation which was killed goes on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_parallel.checkpoint.integrity import SMALL_FILES, SUFFIX
from llm_parallel.generate.requests import Finished, Request
from llm_parallel.jsonlines import JsonLines, read_jsonlines

WHOLE_BYTES = 4 << 30
"""Files of weights up to this size together are read whole for a model's mark: 4 GB take about 3 s."""
PART_BYTES = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """What is kept of an answer. tokens: what was written; scores: as ``Finished.prompt_scores``, of which the
    likeliest token alone (-1 where it was not asked for); reason: why the answer ended."""

    tokens: tuple[int, ...]
    scores: tuple[tuple[float, int], ...]
    reason: str

    @staticmethod
    def of(answer: Finished) -> Outcome:
        """Of a finished answer."""
        scores = tuple((log_prob, top[0][0] if top else -1) for log_prob, top in answer.prompt_scores)
        return Outcome(answer.tokens, scores, answer.reason.value)


class Record:
    """Outcomes by the key of their request. ``path``: the file they are appended to, one complete line each; None to
    keep them in memory. ``mark``: what tells the model from others. Raises UserError if the file cannot be used."""

    def __init__(self, path: Path | None, mark: str) -> None:
        self._mark, self._known = mark, dict[str, Outcome]()
        self.num_found = 0
        if path is not None and path.exists():
            for line in read_jsonlines(path):
                if isinstance(line.get("key"), str) and isinstance(line.get("tokens"), list):
                    scores = tuple((float(score), int(best)) for score, best in line["scores"])
                    self._known[line["key"]] = Outcome(tuple(line["tokens"]), scores, line["reason"])
            self.num_found = len(self._known)
        self._file = JsonLines(path) if path is not None else None

    def key(self, request: Request) -> str:
        """A hash of everything that an answer depends on: the model and the request but for its number."""
        settings: list[Any] = [
            self._mark, asdict(request.sampling), sorted(request.ends), request.stop, request.stream,
            request.prompt_log_probs, request.scores_from, request.candidates,
        ]  # fmt: skip
        digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
        digest.update(np.asarray(request.prompt, dtype=np.int64).tobytes())
        return digest.hexdigest()

    def get(self, key: str) -> Outcome | None:
        """The outcome of a request that was answered before."""
        return self._known.get(key)

    def add(self, key: str, outcome: Outcome) -> None:
        """Keeps an outcome."""
        self._known[key] = outcome
        if self._file is not None:
            self._file.append({"key": key, **asdict(outcome)})

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def model_mark(folder: Path, settings: Sequence[object]) -> str:
    """A hash of a model's files and of how they are held. Checkpoints have checksums of their files; of other folders
    the weights are read, whole up to ``WHOLE_BYTES`` together, else the beginning and end of each file."""
    digest = hashlib.blake2b(json.dumps([str(one) for one in settings]).encode(), digest_size=16)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    sums = [path for path in files if path.suffix == SUFFIX or path.name == SMALL_FILES]
    files = sums or files
    whole = sum(path.stat().st_size for path in files) <= WHOLE_BYTES
    for path in files:
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}".encode())
        with path.open("rb") as handle:
            if whole or path.stat().st_size <= 2 * PART_BYTES:
                while part := handle.read(PART_BYTES):
                    digest.update(part)
                continue
            digest.update(handle.read(PART_BYTES))
            handle.seek(-PART_BYTES, 2)
            digest.update(handle.read(PART_BYTES))
            digest.update(str(path.stat().st_mtime_ns).encode())
    return digest.hexdigest()
