"""The store of one generation: keys and values by which its workers find each other (``torch.distributed``'s store).

torch's own store listens on a port and believes everyone who connects: a stranger who sets keys there crashes the
processes that read them. This one lives in the controller and has no port of its own: a worker's questions come through
its agent, over connections that both ends have authenticated (wire.py). A generation's store goes with it, so nobody
reads the addresses of the one before.
"""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Reply = Callable[[Any], None]
"""Sends an answer to the process that asked."""


def encoded(value: bytes) -> str:
    """A value as JSON can hold it."""
    return base64.b64encode(value).decode()


def decoded(text: str) -> bytes:
    """Inverse of ``encoded``."""
    return base64.b64decode(text)


@dataclass
class _Waiter:
    keys: Sequence[str]
    missing: set[str]
    reply: Reply


class GenerationStore:
    """Keys and values, and who waits for them."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._waiting: dict[str, list[_Waiter]] = defaultdict(list)

    def serve(self, question: dict[str, Any], reply: Reply) -> None:
        """Does what a process asks: ``{"do": …}`` with its ``key`` or ``keys``, ``value`` and so on.

        set, append   stores ``value`` (base64), or adds it to what is there; no answer
        get           the values of ``keys``, as soon as all of them are there
        check         whether all of ``keys`` are there
        add           adds ``amount`` to a number; the sum
        compare_set   stores ``value`` if the present one is ``expected``, or there is none and ``expected`` is empty;
                      the value then (``expected`` if there still is none)
        delete        whether ``key`` was there
        count         the number of keys
        """
        do, key = question["do"], question.get("key", "")
        if do == "set":
            self._set(key, decoded(question["value"]))
        elif do == "append":
            self._set(key, self._values.get(key, b"") + decoded(question["value"]))
        elif do == "get":
            self._get(question["keys"], reply)
        elif do == "check":
            reply(all(name in self._values for name in question["keys"]))
        elif do == "add":
            total = int(self._values.get(key, b"0")) + int(question["amount"])
            self._set(key, str(total).encode())
            reply(total)
        elif do == "compare_set":
            reply(self._compare_set(key, decoded(question["expected"]), decoded(question["value"])))
        elif do == "delete":
            reply(self._values.pop(key, None) is not None)
        elif do == "count":
            reply(len(self._values))

    def _set(self, key: str, value: bytes) -> None:
        self._values[key] = value
        for waiter in self._waiting.pop(key, ()):
            waiter.missing.discard(key)
            if not waiter.missing:
                self._answer(waiter)

    def _get(self, keys: Sequence[str], reply: Reply) -> None:
        waiter = _Waiter(keys, {key for key in keys if key not in self._values}, reply)
        if not waiter.missing:
            self._answer(waiter)
        for key in waiter.missing:
            self._waiting[key].append(waiter)

    def _answer(self, waiter: _Waiter) -> None:
        waiter.reply([encoded(self._values.get(key, b"")) for key in waiter.keys])

    def _compare_set(self, key: str, expected: bytes, value: bytes) -> str:
        now = self._values.get(key)
        if now == expected or (now is None and not expected):
            self._set(key, value)
            return encoded(value)
        return encoded(expected if now is None else now)
