"""lm-eval without its progress bars and its advice about its own command line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import datasets
from lm_eval.api import task as task_module
from tqdm import tqdm

LOGGERS = ("lm_eval", "datasets", "absl", "httpx", "filelock")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence but for errors, and as it was before afterwards."""
    names = [*LOGGERS, *(name for name in logging.root.manager.loggerDict if name.startswith("lm_eval."))]
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    named, task_module.tqdm = task_module.tqdm, partial(tqdm, disable=True)
    try:
        yield
    finally:
        task_module.tqdm = named
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
