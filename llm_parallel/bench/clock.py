"""Splits the time of a training step into forward, backward and update, by CUDA events or by the wall clock."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class SplitClock:
    """Counts all time from the first ``enter`` to ``seconds`` as one part or another. Forward is the time inside the
    watched modules; backward is all other time until ``enter`` names another part, so it includes the schedule, the sum
    of the loss and the gradient's norm."""

    def __init__(self, modules: Sequence[nn.Module], cuda: bool) -> None:
        self._modules, self._cuda = modules, cuda
        self._marks: list[tuple[str, Any]] = []

    def enter(self, part: str) -> None:
        """Counts time from here on as ``part``."""
        now: Any = time.perf_counter()
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((part, now))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Counts forward passes of the modules as forward while the context is open."""
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
        """Seconds of each part so far, which then begin at 0 again."""
        self.enter("")
        if self._cuda:
            torch.cuda.synchronize()
        found: dict[str, float] = defaultdict(float)
        for (part, begin), (_, end) in zip(self._marks, self._marks[1:]):
            found[part] += begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
        self._marks = []
        return dict(found)
