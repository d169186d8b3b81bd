"""Where the time of a training step goes: forward, backward, update, by events on a GPU or by the wall clock."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class SplitClock:
    """Gives every moment between ``start`` and ``stop`` to one part. Forward is what runs inside the watched modules,
    backward all else until ``enter`` names another part: it holds the schedule, the loss's sum and the gradient's
    norm."""

    def __init__(self, modules: Sequence[nn.Module], cuda: bool) -> None:
        self._modules, self._cuda = modules, cuda
        self._marks: list[tuple[str, Any]] = []

    def enter(self, part: str) -> None:
        """From now on time is ``part``'s."""
        now: Any = time.perf_counter()
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((part, now))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While inside, forward passes of the modules are seen."""
        hooks = []
        for module in self._modules:
            hooks.append(module.register_forward_pre_hook(lambda *_: self.enter("forward")))
            hooks.append(module.register_forward_hook(lambda *_: self.enter("backward")))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def seconds(self) -> dict[str, float]:
        """Seconds of each part up to now; forgets them."""
        self.enter("")
        if self._cuda:
            torch.cuda.synchronize()
        found: dict[str, float] = defaultdict(float)
        for (part, begin), (_, end) in zip(self._marks, self._marks[1:]):
            found[part] += begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
        self._marks = []
        return dict(found)
