"""The fields that all routes share: which model, how tokens are drawn, where answers end."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llm_parallel.errors import UserError
from llm_parallel.generate.requests import Request
from llm_parallel.generate.sampling import Sampling
from llm_parallel.generate.structure import GUIDED, Structure
from llm_parallel.serve.errors import wrong
from llm_parallel.serve.fields import Fields
from llm_parallel.serve.models import Served

MOST_ANSWERS = 128
"""Largest ``n`` and ``best_of``."""
MOST_TOP = 20
"""Largest ``top_logprobs``."""
GREEDY_BELOW = 1e-3
"""A temperature under this is taken as 0, which it differs from by rounding alone; clients write 1e-5 for greedy."""
STRUCTURE_FIELDS = (
    *("response_format", "text", "structured_outputs"),
    *(f"guided_{name}" for name in GUIDED),
)
WITHOUT_EFFECT = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "extra_headers", "extra_query", "modalities", "verbosity"),
)
"""Fields that change no answer here, so that nothing is said about them."""


@dataclass(frozen=True)
class Wanted:
    """How an HTTP request wants its prompts answered. limit: tokens of an answer, None if not given."""

    sampling: Sampling
    ends: frozenset[int]
    stop: tuple[str, ...]
    n: int
    limit: int | None
    limit_name: str
    adapter: str | None
    structure: Structure | None
    stream: bool
    usage_in_stream: bool

    def request(self, prompt: Sequence[int], max_new_tokens: int, **more: Any) -> Request:
        """The generator's request for one prompt; the driver gives it its number. Equal requests with equal seeds draw
        equal answers."""
        sampling = replace(self.sampling, max_new_tokens=max_new_tokens)
        settings: dict[str, Any] = {"n": self.n, "adapter": self.adapter, "structure": self.structure, **more}
        return Request(0, tuple(prompt), sampling, self.ends, self.stop, stream=0, **settings)


def read_wanted(
    fields: Fields, served: Served, ends: frozenset[int], top: int, limit_names: Sequence[str] = ("max_tokens",)
) -> Wanted:
    """Raises ApiError for a value that is not allowed. ``top``: how many of the likeliest tokens are wanted with each;
    ``limit_names``: names of the most tokens of an answer, the first that is given counts."""
    limit, limit_name = None, limit_names[0]
    for name in limit_names:
        if limit is None and fields.has(name):
            limit, limit_name = fields.whole(name, None, 0 if name == "max_tokens" else 1, 10**9), name
    if fields.flag("ignore_eos"):
        ends = frozenset()
    extra = fields.items("stop_token_ids")
    _check_ids(extra, "stop_token_ids", served.limits.vocabulary)
    options = fields.inner("stream_options")
    stream = fields.flag("stream")
    if options is not None and not stream:
        raise wrong("stream_options is given and stream is not true; leave stream_options out", "stream_options")
    return Wanted(
        sampling=_sampling(fields, served, top),
        ends=ends | frozenset(extra),
        stop=fields.texts("stop", 32),
        n=fields.whole("n", 1, 1, MOST_ANSWERS),
        limit=limit,
        limit_name=limit_name,
        adapter=served.adapter(fields.text("model")),
        structure=read_structure(fields),
        stream=stream,
        usage_in_stream=options is not None and options.flag("include_usage"),
    )


def read_structure(fields: Fields) -> Structure | None:
    """The form that an answer must have. Raises ApiError."""
    given = {name: fields.raw(name) for name in STRUCTURE_FIELDS if fields.has(name)}
    try:
        json.dumps(given, ensure_ascii=False).encode()
        return Structure.from_request(given)
    except UserError as error:
        raise wrong(str(error), next(iter(given), None)) from None
    except (UnicodeEncodeError, RecursionError):
        raise wrong("the structure of the answer cannot be written as UTF-8", next(iter(given), None)) from None


def _sampling(fields: Fields, served: Served, top: int) -> Sampling:
    temperature = fields.number("temperature", 1.0, 0.0, 100.0)
    try:
        return Sampling(
            temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
            top_k=max(fields.whole("top_k", 0, -1, 2**31), 0),
            top_p=max(fields.number("top_p", 1.0, 0.0, 1.0), 1e-9),
            seed=fields.whole("seed", secrets.randbits(63), -(2**63), 2**63 - 1),
            min_p=fields.number("min_p", 0.0, 0.0, 1.0),
            repetition_penalty=fields.number("repetition_penalty", 1.0, 0.01, 100.0),
            frequency_penalty=fields.number("frequency_penalty", 0.0, -2.0, 2.0),
            presence_penalty=fields.number("presence_penalty", 0.0, -2.0, 2.0),
            logit_bias=_biases(fields, served.limits.vocabulary),
            top_log_probs=top,
        )
    except UserError as error:
        raise wrong(str(error)) from None


def _biases(fields: Fields, vocabulary: int) -> tuple[tuple[int, float], ...]:
    biases = fields.inner("logit_bias")
    if biases is None:
        return ()
    found = []
    for name in biases.unknown():
        if not name.isascii() or not name.isdecimal() or len(name) > 12 or int(name) >= vocabulary:
            raise wrong(
                f"logit_bias has the key {name[:40]!r}; its keys must be token ids, 0 to {vocabulary - 1}", "logit_bias"
            )
        found.append((int(name), biases.number(name, 0.0, -100.0, 100.0)))
    return tuple(found)


def _check_ids(ids: Sequence[Any], name: str, vocabulary: int) -> None:
    for token in ids:
        if type(token) is not int or not 0 <= token < vocabulary:
            raise wrong(f"{name} holds {str(token)[:40]}; it must be a list of token ids, 0 to {vocabulary - 1}", name)


def token_ids(value: Sequence[Any], name: str, vocabulary: int) -> list[int]:
    """A prompt that is given as token ids. Raises ApiError."""
    if not value:
        raise wrong(f"{name} is empty; give at least one token", name)
    _check_ids(value, name, vocabulary)
    return list(value)
