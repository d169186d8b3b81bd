"""Judges that run programs or ask models, as a run's configuration names them."""

from __future__ import annotations

from pathlib import Path

from llm_parallel.config.tree_online import JudgeConfig
from llm_parallel.errors import UserError
from llm_parallel.remote import base_of
from llm_parallel.tasks.ahead import Ahead
from llm_parallel.tasks.asking import Asking
from llm_parallel.tasks.base import Judge
from llm_parallel.tasks.code import Code
from llm_parallel.tasks.model_judge import PLACE, Model, Rival, Scale
from llm_parallel.tasks.sandbox import Limits, Sandbox
from llm_parallel.tasks.secret import api_key


def open_code(config: JudgeConfig, field: str) -> Ahead:
    """A judge of programs. Raises UserError if there is no way to hold them here."""
    for folder in config.packages:
        if not Path(folder).is_dir():
            raise UserError(f"{field}.packages names {folder}, which is no folder")
    limits = Limits(config.cpu_s, 3.0 * config.cpu_s + 5.0, config.memory_mb << 20)
    try:
        sandbox = Sandbox(config.sandbox, limits, config.at_once, config.packages)
    except UserError as error:
        raise UserError(f"{field}.sandbox = {config.sandbox}: {error}") from None
    return Ahead(Code(sandbox, config.pays == "share"), config.at_once)


def open_model(config: JudgeConfig, field: str) -> Ahead:
    """A judge that asks a model. Raises UserError."""
    if config.url is None or config.model is None:
        missing = "url" if config.url is None else "model"
        raise UserError(f"{field}.{missing} is not given; {field}.kind = model needs the address and the model's name")
    if len(set(config.scale)) != 2 or len(config.scale) != 2:
        raise UserError(f"{field}.scale = {list(config.scale)} must be two numbers: the worst, and another, the best")
    low, high = config.scale
    _check_template(config, field)
    try:
        base = base_of(config.url, f"an environment variable, and its name in {field}.key_from")
    except UserError as error:
        raise UserError(f"{field}.url: {error}") from None
    parameters = {"temperature": config.temperature, "max_tokens": config.max_reply_tokens}
    asking = Asking(
        base,
        config.model,
        None if config.key_from is None else api_key(config.key_from, f"{field}.key_from"),
        parameters,
        tries=config.tries,
        timeout_s=config.timeout_s,
        cache=None if config.cache is None else Path(config.cache),
    )
    model = Model(asking, Scale(low, high), "json" if config.reads == "json" else "number", config.template)
    judge: Judge = Rival(model, config.field) if config.reads == "pair" else model
    return Ahead(judge, config.at_once)


def _check_template(config: JudgeConfig, field: str) -> None:
    if config.template is None:
        if config.reads == "json":
            raise UserError(f"{field}.reads = json needs {field}.template, which asks for the JSON object")
        return
    named = set(PLACE.findall(config.template))
    wanted = ("answer_a", "answer_b") if config.reads == "pair" else ("answer",)
    for name in wanted:
        if name not in named:
            raise UserError(
                f"{field}.template does not name {{{name}}}; {field}.reads = {config.reads} needs "
                + " and ".join(f"{{{one}}}" for one in wanted)
            )
