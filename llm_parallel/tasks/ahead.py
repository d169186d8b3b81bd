"""Judging many answers at the same time, for judges that wait for others: programs, or a server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from llm_parallel.errors import UserError
from llm_parallel.tasks.base import Asked, Given, Judge


@dataclass
class Ahead:
    """A judge whose threads may judge at the same time, ``at_once`` of them."""

    judge: Judge
    at_once: int
    _known: dict[str, float | UserError] = field(default_factory=dict)

    def __call__(self, asked: Asked, given: Given) -> float:
        """See ``Judge``."""
        found = self._known.pop(_key(asked, given), None)
        if isinstance(found, UserError):
            raise found
        return self.judge(asked, given) if found is None else found

    def prepare(self, items: Sequence[tuple[Asked, Given]]) -> None:
        """Judges answers that will be asked for soon. What fails is raised when it is asked for, so that the others
        keep their scores."""
        self._known.clear()
        if len(items) > 1:
            with ThreadPoolExecutor(min(self.at_once, len(items))) as threads:
                self._known.update(zip([_key(*item) for item in items], threads.map(self._tried, items)))

    def _tried(self, item: tuple[Asked, Given]) -> float | UserError:
        try:
            return self.judge(*item)
        except UserError as error:
            return error


def _key(asked: Asked, given: Given) -> str:
    words = [list(map(dict, asked.messages)), dict(asked.fields), given.text]
    return hashlib.sha256(json.dumps(words, sort_keys=True, default=str).encode()).hexdigest()
