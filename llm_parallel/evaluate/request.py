"""What ``llm-parallel evaluate`` is asked; each field's docstring is the help of its option."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_parallel.errors import UserError
from llm_parallel.options import argument, not_an_option, option

SANDBOX_MODES = ("auto", "bwrap", "landlock", "unsafe")


def read_limit(text: str) -> float:
    """A whole number of documents, or a share of them below 1. Raises UserError."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{text!r} is no number of documents; give a whole number, or a share as 0.1")
    return int(number) if number.is_integer() else number


@dataclass(frozen=True)
class EvaluateRequest:
    """A model, tasks, and where their data are; or two results to compare."""

    model: str = argument()
    """Run, checkpoints, iter_…, adapter or Hugging Face folder, or the address of a server with OpenAI's interface."""
    tasks: Sequence[str] = option((), name="--tasks", commas=True)
    """Tasks, groups or YAML files of lm-eval, with commas, or llama2 (the default), safety, instructions, chinese."""
    data_dir: Path | None = None
    """Folder with files of the sets (jsonl, json, parquet, csv); by default lm-eval loads them from the network."""
    demo: bool = option(False, flag=True)
    """Take a made-up sample of each set, which needs no data and measures nothing."""
    curve: bool = option(False, flag=True)
    """Evaluate every checkpoint of a run, and draw the values by step."""
    limit: float | None = option(None, read=read_limit)
    """Documents of each task, drawn by --seed; below 1 the share of them."""
    seed: int = 0
    """Seed of that draw."""
    shots: int | None = None
    """Examples before each question; by default what the task, or llama2, says."""
    new_tokens: int | None = None
    """Tokens of answers at most, instead of what the tasks say."""
    chat: bool = option(False, flag=True)
    """Write prompts with the model's chat template."""
    system: str | None = None
    """System message of prompts, with --chat."""
    out: Path | None = None
    """Folder of the results; one that an interrupted evaluation left is gone on with. Default: runs/evaluate/NAME."""
    tp: int = 1
    """Processes that share each layer (tensor parallelism)."""
    pp: int = 1
    """Stages of layers, each on processes of its own (pipeline parallelism)."""
    device: str = "auto"
    """auto, cpu or cuda."""
    weights: str = "saved"
    """How weights are held: saved (as in the folder), fp32, bf16, or on a CPU int8 or int4."""
    deterministic: bool = option(False, flag=True)
    """The same numbers to the last bit in every layout; slower."""
    bos: bool | None = None
    """Whether texts begin with the begin token; by default what the tokenizer's files say."""
    max_running: int = 64
    """Requests in work at a time."""
    context: int | None = None
    """Tokens to which prompts are cut from their beginning; by default the model's context."""
    cache_tokens: int | None = None
    """Tokens that the cache holds; by default what a quarter of the free memory can."""
    sandbox: str = "auto"
    """How programs of answers are held: auto, bwrap, landlock, or unsafe for none of it."""
    served_name: str | None = None
    """Name of the model at the server; by default the first that it lists."""
    tokenizer: Path | None = None
    """Folder of the tokenizer of a model behind an address, which tasks with log-likelihoods need."""
    compare: Path | None = None
    """Results to compare with those that are given in the model's place: --compare A.json B.json."""
    api_key: str = not_an_option(default="")
    """Key for a model behind an address."""

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "max_running"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        for name in ("new_tokens", "context"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.limit is not None and (self.limit <= 0 or (self.limit > 1 and self.limit != int(self.limit))):
            raise UserError(f"--limit is {self.limit}; it must be at least 1, or a share between 0 and 1")
        if self.shots is not None and self.shots < 0:
            raise UserError(f"--shots is {self.shots}; it must be 0 or more")
        if self.demo and self.data_dir is not None:
            raise UserError("--demo and --data-dir are given together; give the one whose items are wanted")
        if self.system is not None and not self.chat:
            raise UserError("--system is given without --chat, which it belongs to")
        if self.sandbox not in SANDBOX_MODES:
            raise UserError(f"--sandbox is {self.sandbox!r}; it must be one of {', '.join(SANDBOX_MODES)}")
        if self.is_server and self.curve:
            raise UserError("--curve is given for a model behind an address; it is for the checkpoints of a run")
        if self.is_server:
            for name in ("tp", "pp", "weights", "deterministic", "bos", "context", "cache_tokens"):
                if getattr(self, name) != EvaluateRequest.__dataclass_fields__[name].default:
                    raise UserError(
                        f"--{name.replace('_', '-')} is given for a model behind an address, which decides that itself"
                    )
        for name in ("served_name", "tokenizer"):
            if not self.is_server and getattr(self, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} is given for a model in a folder; it is for an address")

    @property
    def is_server(self) -> bool:
        """Whether the model is behind an address."""
        return self.model.startswith(("http://", "https://"))

    @property
    def num_processes(self) -> int:
        """Processes that hold the model together."""
        return self.tp * self.pp

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks that are asked for."""
        return tuple(self.tasks) or ("llama2",)
