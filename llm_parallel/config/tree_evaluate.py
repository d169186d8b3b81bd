"""The section of a run's configuration for benchmarks that are scored while it trains."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from llm_parallel.config.node import Node


class EvaluateConfig(Node):
    """Benchmarks that a run scores with the weights in training. Losses do not depend on it."""

    tasks: tuple[str, ...] = ()
    """Tasks, groups or YAML files of lm-evaluation-harness, or the sets of ``llm-parallel evaluate`` (llama2, safety,
    instructions, chinese), which are scored before the first step, every ``interval_steps`` and after the last step.
    Without any, nothing is scored."""
    interval_steps: PositiveInt | None = None
    """Steps from one scoring to the next; none: before the first step and after the last one only."""
    data_dir: str | None = None
    """Folder with the files of the tasks' sets, which every process must see; none: lm-eval loads them from the
    network."""
    samples: PositiveInt | None = 100
    """Documents of each task, drawn once by ``seed``, so that all scores of a run are of the same ones; none: all."""
    seed: int = Field(0, ge=0)
    """Seed of that draw."""
    shots: int | None = Field(None, ge=0)
    """Examples before each question; none: what the task, or the set, says."""
    new_tokens: PositiveInt | None = None
    """Most tokens of an answer; none: what the tasks say."""
    chat: bool = False
    """Write prompts with the chat template of the run (``chat.template``)."""
    max_running: PositiveInt = 64
    """Requests that a replica answers at a time."""
    sandbox: Literal["auto", "bwrap", "landlock", "unsafe"] = "auto"
    """How programs of answers are held, as of ``llm-parallel evaluate --sandbox``."""
