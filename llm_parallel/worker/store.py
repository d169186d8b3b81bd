"""``torch.distributed``'s store for the workers of an elastic run: every question goes to the controller, over the
worker's authenticated connection (launch/llm_launch/generation_store.py)."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from llm_launch.generation_store import decoded, encoded
from llm_launch.member import Member

TIMEOUT_S = 300.0


class ControllerStore(dist.Store):
    """The store of one generation. Its methods are called by torch's C++ too, from several threads, as long as Python
    has the object: whoever opens process groups with it keeps it until they are closed.

    They raise ConnectionError when the generation was given up, and DistStoreError after a time-out."""

    def __init__(self, member: Member, generation: int, timeout_s: float = TIMEOUT_S) -> None:
        super().__init__()
        self._member, self._generation, self._timeout_s = member, generation, timeout_s
        self._fetched: dict[str, bytes] = {}
        """Values that ``wait`` has brought and nobody has taken: gloo and NCCL get each key after waiting for it."""

    def _ask(self, do: str, timeout_s: float | None = None, **question: Any) -> Any:
        seconds = self._timeout_s if timeout_s is None else timeout_s
        try:
            return self._member.ask(self._generation, {"do": do, **question}, seconds)
        except TimeoutError:
            named = question.get("keys") or [question.get("key")]
            raise dist.DistStoreError(f"the store has had no {', '.join(map(str, named))} for {seconds:g} s") from None

    def set(self, key: str, value: str | bytes) -> None:
        """Stores a value."""
        self._fetched.pop(key, None)
        self._member.tell(self._generation, {"do": "set", "key": key, "value": encoded(_bytes(value))})

    def get(self, key: str) -> bytes:
        """A value; waits until it is there."""
        found = self._fetched.pop(key, None)
        return found if found is not None else decoded(self._ask("get", keys=[key])[0])

    def wait(self, keys: Sequence[str], timeout: datetime.timedelta | None = None) -> None:
        """Waits until all keys are there."""
        found = self._ask("get", timeout.total_seconds() if timeout is not None else None, keys=list(keys))
        self._fetched.update(zip(keys, map(decoded, found)))

    def add(self, key: str, amount: int) -> int:
        """Adds to a number; the sum."""
        self._fetched.pop(key, None)
        return int(self._ask("add", key=key, amount=amount))

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """Stores ``desired`` if the value is ``expected``; the value then."""
        self._fetched.pop(key, None)
        before, after = encoded(_bytes(expected)), encoded(_bytes(desired))
        return decoded(self._ask("compare_set", key=key, expected=before, value=after))

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys are there."""
        return bool(self._ask("check", keys=list(keys)))

    def delete_key(self, key: str) -> bool:
        """Removes a value; whether there was one."""
        self._fetched.pop(key, None)
        return bool(self._ask("delete", key=key))

    def num_keys(self) -> int:
        """Number of keys."""
        return int(self._ask("count"))

    def append(self, key: str, value: str | bytes) -> None:
        """Adds to the end of a value."""
        self._fetched.pop(key, None)
        self._member.tell(self._generation, {"do": "append", "key": key, "value": encoded(_bytes(value))})

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """Values of several keys; waits until all are there."""
        return [decoded(value) for value in self._ask("get", keys=list(keys))]

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        """Stores several values."""
        for key, value in zip(keys, values):
            self.set(key, value)

    def has_extended_api(self) -> bool:
        """Whether several keys can be asked for at once: gloo then asks once for the addresses of all its peers."""
        return True

    def clone(self) -> ControllerStore:
        """Another store with the same values: this one, since several threads may use it."""
        return self


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
