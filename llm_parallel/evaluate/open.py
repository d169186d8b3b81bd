"""Opens what is evaluated: a model on our engine, over the processes of a layout, or one behind an address."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_parallel.data.chat_open import open_encoder
from llm_parallel.errors import UserError
from llm_parallel.evaluate.record import Record, model_mark
from llm_parallel.evaluate.request import EvaluateRequest
from llm_parallel.generate.engine import Generator, GeneratorOptions
from llm_parallel.generate.load import Member
from llm_parallel.lines import note
from llm_parallel.parallel.groups import close_groups
from llm_parallel.serve.followers import Control, Stop, follow
from llm_parallel.serve.open import OpenedModel, open_model
from llm_parallel.serve.request import ServeRequest

PAGE_TOKENS = {"cpu": 4, "cuda": 16}
"""Of the cache: requests share whole pages of what they begin with. On a GPU the kernel reads pages of 16; on a CPU
smaller ones leave fewer tokens that are computed for each choice of a question again."""
LONGEST_S = 24 * 3600.0
"""The other processes wait so long for rank 0, which may be building prompts or running programs."""
PASS_TOKENS = 512


def _opened(request: EvaluateRequest, member: Member) -> OpenedModel:
    asked = ServeRequest(
        request.model, tp=request.tp, pp=request.pp, device=request.device, weights=request.weights,
        deterministic=request.deterministic,
    )  # fmt: skip
    return open_model(asked, member.rank, member.local_rank)


def _generator(request: EvaluateRequest, opened: OpenedModel) -> Generator:
    network = opened.loaded.network
    options = GeneratorOptions(
        max_running=request.max_running,
        pass_tokens=max(PASS_TOKENS, request.max_running),
        page_tokens=PAGE_TOKENS[network.groups.platform.device.type],
        cache_tokens=request.cache_tokens,
    )
    return Generator(network, options, opened.tokenizer)


def follow_rank_0(request: EvaluateRequest, member: Member) -> None:
    """What the other processes of a layout do."""
    opened = _opened(request, member)
    try:
        control = Control(opened.loaded.network.groups, LONGEST_S)
        follow(control, _generator(request, opened), opened.load)
    finally:
        close_groups()


def context_of(request: EvaluateRequest, limit: int) -> int:
    """Tokens to which prompts are cut: the model's context unless ``request`` gives fewer, and never what the memory of
    the moment has room for, since scores must not depend on it. Raises UserError."""
    if request.context is None:
        return limit
    if request.context > limit:
        raise UserError(f"--context is {request.context}, and the model's is {limit} tokens; give at most that")
    return request.context


Opened = tuple[Any, Callable[[], dict[str, Any]]]
"""A model of lm-eval, and what the results say about it once it has answered."""


@contextmanager
def open_engine(request: EvaluateRequest, member: Member, record_path: Path | None) -> Iterator[Opened]:
    """The model on our engine, for rank 0. Answers that ``record_path`` holds are not computed again."""
    from llm_parallel.evaluate.lm import EngineLM, Texts
    from llm_parallel.evaluate.runner import Runner

    opened = _opened(request, member)
    try:
        loaded = opened.loaded
        config, precision = loaded.config, loaded.config.train.precision
        held = (precision, request.weights, request.deterministic)
        base = loaded.network.base
        mark = model_mark(opened.folder or Path(request.model), (*held, base.fingerprint if base is not None else ""))
        record = Record(record_path, mark)
        if record.num_found:
            note(f"[{record.num_found} answers of an earlier evaluation are in {record_path}; they are used again]")
        control, generator = Control(loaded.network.groups, LONGEST_S), _generator(request, opened)
        begin = _begin(request, opened)
        context = context_of(request, config.model.max_seq_length_tokens)
        encoder = open_encoder(config) if request.chat else None
        texts = Texts(opened.tokenizer, begin, opened.ends, context, encoder)
        runner = Runner(generator, control, record)
        info = {
            "model": request.model,
            "model_dtype": precision,
            "model_sha": mark,
            "model_args": {"weights": request.weights},
        }
        lm = EngineLM(texts, runner, info)

        def facts() -> dict[str, Any]:
            return {
                "model": request.model, "model_mark": mark, "precision": precision, "weights": request.weights,
                "layout": {"tp": request.tp, "pp": request.pp}, "context": context,
                "tokenizer": opened.tokenizer.fingerprint, "begin": [opened.tokenizer.token(token) for token in begin],
                "template": encoder.template.source if encoder is not None else None,
                "tokens": vars(runner.tokens), "truncated": lm.truncated,
            }  # fmt: skip

        try:
            yield lm, facts
        finally:
            control.share([Stop()])
            record.close()
    finally:
        close_groups()


@contextmanager
def open_server(request: EvaluateRequest, kinds: dict[str, str]) -> Iterator[Opened]:
    """The model behind an address. kinds: of output that the tasks ask for, by their names. Raises UserError."""
    from llm_parallel.evaluate.server import base_of, check_tasks, served, server_lm

    check_tasks(kinds, request.chat, request.tokenizer)
    base = base_of(request.model)
    model = served(base, request.api_key, request.served_name)
    yield server_lm(base, model, request.chat, request.tokenizer), lambda: {"model": request.model, "served": model}


def _begin(request: EvaluateRequest, opened: OpenedModel) -> tuple[int, ...]:
    """Tokens before a text, by ``--bos`` or by the tokenizer's files."""
    if request.bos is None:
        return opened.begin
    if not request.bos:
        return ()
    bos = opened.tokenizer.bos
    if bos is None:
        raise UserError(f"--bos is given and tokenizer {opened.tokenizer.name} has no begin token; leave it out")
    return (bos,)
