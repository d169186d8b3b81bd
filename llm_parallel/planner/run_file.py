"""The question that a run file asks of the planner: the model, sizes and adapters of a run of pretrain or sft."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from llm_parallel.config.load import load_config
from llm_parallel.config.rules import num_processes
from llm_parallel.config.tree import ModelConfig, RunConfig
from llm_parallel.errors import UserError
from llm_parallel.lines import note
from llm_parallel.model.hf_config import hf_config_to_model
from llm_parallel.model.hf_files import json_object
from llm_parallel.planner.hardware import Cluster, cluster_names
from llm_parallel.planner.request import PlanRequest, Question
from llm_parallel.planner.search import evaluate, fits
from llm_parallel.planner.shapes import Shape, Strategy, strategy_of

PLANNED = ("pretrain", "sft")
"""Kinds of runs whose step is one forward and backward of one model over samples, which is what is planned."""


def with_model(config: RunConfig) -> RunConfig:
    """The configuration with the fields of ``model`` that it does not give from the folder that ``checkpoint.load``
    names, as the run itself takes them: a Hugging Face folder, or a run of ours. Raises UserError where that folder
    holds no model and the run file gives none."""
    given, load = config.model.model_fields_set, config.checkpoint.load
    if load is None or config.model.preset is not None:
        return config
    model = _held(Path(load))
    if model is None:
        if "hidden_size" in given:
            return config
        raise UserError(
            f"checkpoint.load = {load} holds no config.json of Hugging Face and no config.yaml of a run, and the run "
            "file gives no model; give model.preset, or a folder that is there"
        )
    kept = {name: getattr(config.model, name) for name in given}
    return config.model_copy(update={"model": ModelConfig.model_validate(model.model_dump() | kept)})


def _held(folder: Path) -> ModelConfig | None:
    """The model of a Hugging Face folder, or of a run or a checkpoint in it; None if there is none."""
    if (folder / "config.json").is_file():
        return hf_config_to_model(json_object(folder / "config.json", "give a config.json of Hugging Face"))
    for place in (folder, *folder.parents[:2]):
        if (place / "config.yaml").is_file():
            return load_config(place / "config.yaml", notice=lambda _: None).model
    return None


def question_of(request: PlanRequest) -> Question:
    """The request with all sizes: those of the command line, then those of its run file, then the defaults. Raises
    UserError for a run file that can't be planned, and where both ``--model`` and a run file are given."""
    given = {one.name: getattr(request, one.name) for one in fields(PlanRequest)}
    if request.run is not None:
        given |= _of_run_file(request, request.run)
    sizes = ("gpus", "global_batch", "seq", "precision")
    name, _, number = request.cluster_name.lower().rpartition("x")
    if name in cluster_names() and number.isdecimal():
        if request.gpus not in (None, int(number)):
            raise UserError(f"--cluster {request.cluster} has {number} GPUs and --gpus says {request.gpus}; give one")
        given |= {"cluster": name, "gpus": int(number)}
    return Question(**{name: value for name, value in given.items() if name not in sizes or value is not None})


def _of_run_file(request: PlanRequest, path: str) -> dict[str, Any]:
    if request.model is not None:
        raise UserError(f"plan {path} --model {request.model}: both name a model; give one")
    if not Path(path).is_file():
        raise UserError(f"plan {path}: there is no such run file; a preset or a folder of Hugging Face goes to --model")
    config = with_model(load_config(path, notice=note))
    if config.trains not in PLANNED:
        raise UserError(
            f"plan {path}: method.kind = {config.trains} is not planned, since its steps also score or generate "
            f"answers; plan its model by --model {path}"
        )
    found: dict[str, Any] = {"config": config, "model": path}
    if request.gpus is None:
        found["gpus"] = num_processes(config)
    if request.global_batch is None:
        found["global_batch"] = config.train.global_batch_size
    if request.seq is None:
        found["seq"] = config.data.seq_length_tokens
    if request.precision is None:
        found["precision"] = config.train.precision
    return found


def pads(config: RunConfig | None) -> bool:
    """Whether each conversation has a row of its own, which is as long as it is."""
    return config is not None and config.trains == "sft" and config.chat.packing == "pad"


def isolates(config: RunConfig | None) -> bool:
    """Whether several documents or conversations share a sample and do not see each other."""
    if config is None:
        return True
    return not pads(config) if config.trains == "sft" else config.data.packing == "isolate"


def with_documents(request: Question, plain: Strategy) -> Strategy:
    """The strategy on conversations of ``--document-tokens``: packed ones attend to themselves alone, and padded ones
    make rows of their own length, rounded up so that tensor and context parallelism can divide it. Raises UserError for
    a number that is no length, or where documents of the run file see each other."""
    length, config = request.document_tokens, request.config
    if length is None:
        return plain
    if not 1 <= length <= request.seq:
        raise UserError(f"--document-tokens {length} must be from 1 to --seq {request.seq}")
    if pads(config):
        return replace(plain, seq=min(request.seq, -(-length // 64) * 64))
    if not isolates(config):
        raise UserError(
            f"--document-tokens {length}: data.packing = concatenate, so every token sees its whole sample; leave it "
            "out"
        )
    return replace(plain, document=length)


def about_documents(request: Question) -> str | None:
    """What is assumed of the lengths of a run's conversations; None for other runs."""
    config = request.config
    if config is None or config.trains != "sft":
        return None
    if pads(config):
        rows = "chat.packing = pad: a micro batch is as long as its longest conversation"
        if request.document_tokens is None:
            return f"{rows}; planned as if all had {request.seq:,} tokens, which is the most (--document-tokens)."
        return f"{rows}; planned as if all had {request.document_tokens:,} tokens, rounded up to a multiple of 64."
    packed = "chat.packing = best_fit: samples are taken to be full of conversations"
    if request.document_tokens is None:
        return (
            f"{packed}; attention is counted as if each were one conversation, which is the most (--document-tokens)."
        )
    return f"{packed} of {request.document_tokens:,} tokens that do not see each other."


def own_layout(request: Question, shape: Shape, base: Strategy, cluster: Cluster) -> str | None:
    """A line on the layout that the run file has, as ``--dry-run`` would start it; None without a run file."""
    config = request.config
    if config is None:
        return None
    count = num_processes(config)
    given = strategy_of(config, count)
    own = replace(given, seq=base.seq, document=base.document)
    found = evaluate(shape, own, cluster)
    verdict = "fits" if fits(found.memory, cluster) else "does not fit"
    where = f"on {count} GPU{'s' * (count != 1)}: {own.describe()}"
    return (
        f"The run file's own layout, {where}: {found.time.total:.3f} s a step, {found.tokens_per_s():,.0f} "
        f"tokens/s/GPU, {found.memory.total / 2**30:.2f} GiB, which {verdict}."
    )
