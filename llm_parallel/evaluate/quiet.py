"""lm-eval without its progress bars, its advice about its own command line, and its effects on this process."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import datasets
import lm_eval.evaluator as evaluator_module
import numpy as np
from lm_eval.api import metrics as metrics_module
from lm_eval.api import task as task_module
from lm_eval.api.metrics import sample_stddev
from lm_eval.loggers.utils import add_env_info
from tqdm import tqdm

SEEDS = 0, 1234
"""Of Python's and numpy's global generators, from which some tasks draw: lm-eval's own."""
LOGGERS = ("lm_eval", "datasets", "absl", "httpx", "filelock")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence but for errors, and as it was before afterwards."""
    own = [name for name in logging.root.manager.loggerDict if name.startswith("lm_eval.")]
    loggers = [logging.getLogger(name) for name in LOGGERS]
    loggers += [one for one in map(logging.getLogger, own) if one.level != logging.NOTSET]
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


@contextmanager
def apart() -> Iterator[None]:
    """``quiet``, and draws from the global generators that are the same each time and leave them as they were. Standard
    errors by bootstrap start no processes, which a process of a training must not fork; the programs that lm-eval asks
    about this machine for its results run once."""
    states = random.getstate(), np.random.get_state()
    random.seed(SEEDS[0])
    np.random.seed(SEEDS[1])
    named, metrics_module.bootstrap_stderr = metrics_module.bootstrap_stderr, bootstrap_error
    told, evaluator_module.add_env_info = evaluator_module.add_env_info, add_known_environment
    try:
        with quiet():
            yield
    finally:
        metrics_module.bootstrap_stderr = named
        evaluator_module.add_env_info = told
        random.setstate(states[0])
        np.random.set_state(states[1])


def bootstrap_error(metric: Callable[[Sequence[Any]], float], values: Sequence[Any], iters: int) -> float:
    """The standard error of a metric by the bootstrap (Efron 1979), with the draws of lm-eval's first thousand."""
    drawn = random.Random(0)
    return float(sample_stddev([metric(drawn.choices(values, k=len(values))) for _ in range(iters)]))


@cache
def _environment() -> dict[str, Any]:
    found: dict[str, Any] = {}
    add_env_info(found)
    return found


def add_known_environment(results: dict[str, Any]) -> None:
    """lm-eval's ``add_env_info``, found out once in a process."""
    results.update(_environment())
