"""A run that begins with a model which another SLURM job has yet to train: what is known of that model beforehand.

Such a run is checked when it is submitted with the sizes and the tokenizer that the other job's run file gives, and
again, with the model itself, when it starts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llm_parallel.checkpoint.folders import latest_checkpoint
from llm_parallel.config.load import load_config
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError
from llm_parallel.train.inherit import Held, held_in, with_model_of

MOST = 16
"""Jobs of a chain; a circle ends here."""


def run_of(load: str) -> Path:
    """The folder of the run that ``checkpoint.load`` names: itself, or the one above its ``checkpoints``."""
    folder = Path(load)
    return folder.parent if folder.name == "checkpoints" else folder


def is_to_come(load: str, copy: str) -> bool:
    """Whether a run that was submitted there (``copy``: the name of its run file's copy) has no checkpoint yet."""
    run = run_of(load)
    return (run / copy).is_file() and latest_checkpoint(run / "checkpoints") is None


def promised_model(load: str, copy: str, tokenizer_of: Callable[[RunConfig], RunConfig], most: int = MOST) -> Held:
    """The model that a job will leave in the folder ``load``, by the copy of its run file. ``tokenizer_of``: fills in
    a tokenizer where a run file names none. Raises UserError if that says of no model."""
    path = run_of(load) / copy
    config = load_config(path, notice=lambda _: None)
    first = config.checkpoint.load
    if first is not None:
        if is_to_come(first, copy):
            if most == 0:
                raise UserError(f"checkpoint.load = {load}: the runs of {path} begin with each other's models")
            held = promised_model(first, copy, tokenizer_of, most - 1)
        else:
            held = held_in(first)
        config = with_model_of(config, held, lambda _: None)
    config = tokenizer_of(config)
    return Held(config.model, config.data.tokenizer, load)
