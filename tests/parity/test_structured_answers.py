"""Answers of a given form from a model: in every layout those of one process, under interruptions those without, and
log-probabilities of transformers over the tokens that may follow."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from llm_parallel.errors import UserError
from llm_parallel.generate.requests import Finished, Reason, Request
from llm_parallel.generate.sampling import Sampling
from llm_parallel.generate.structure import Structure
from tests.parity.test_generate_file import byte_folder
from tests.parity.test_generator import SMALL, answers, open_generator
from tests.support.harness import run_ranks
from tests.support.parity_models import load_hf

pytest.importorskip("llguidance", reason="pip install llguidance")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 3}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
CHOICES = ["no", "now", "yes", "yes, it is"]
PATTERN = "[ab]{2,6}x?"
BYTES, END, OTHER_END = 256, 258, 300


def structured_requests() -> list[Request]:
    """Structures of all kinds and none, greedy and drawn, several answers to one prompt, some without room."""
    forms = [Structure.json_schema(SCHEMA), Structure.choice(CHOICES), Structure.regex(PATTERN), None]
    made = []
    for number in range(14):
        form = forms[number % 4]
        new = 56 if form is not None and "{" in form.text else 3 if number in (2, 5) else 12
        how = Sampling(new, temperature=1.5 * (number % 3 > 0), seed=5, top_log_probs=2)
        ends = frozenset() if number == 9 else frozenset([END, OTHER_END])
        prompt = tuple(range(number + 1, 2 * number + 3))
        made.append(Request(number, prompt, how, ends, n=1 + number % 2, structure=form))
    return made


def structured_job(
    rank: int, world_size: int, folder: str, parallel: dict[str, Any], options: dict[str, int]
) -> list[Finished]:
    from llm_parallel.data.tokenizer import load_tokenizer

    generator = open_generator(folder, rank, world_size, parallel, tokenizer=load_tokenizer(folder), **options)
    for text in ("(a", "(?=a)b"):
        with pytest.raises(UserError):
            generator.submit(Request(900, (1,), structure=Structure.regex(text)))
    return answers(generator, structured_requests(), 3)


def text_of(answer: Finished) -> str:
    from tests.unit.test_structure import byte_characters

    names = sorted(byte_characters().items(), key=lambda pair: pair[1])
    return bytes(names[token][0] for token in answer.tokens if token < BYTES).decode("utf-8", "replace")


def check_forms(found: list[Finished]) -> None:
    made = {request.number: request for request in structured_requests()}
    assert len(found) == sum(request.n for request in made.values())
    for answer in found:
        form = made[answer.number].structure
        if form is None:
            continue
        text = text_of(answer)
        if answer.reason is Reason.LENGTH:
            assert len(answer.tokens) == made[answer.number].sampling.max_new_tokens
            continue
        assert answer.reason is Reason.STOP and answer.tokens[-1] in made[answer.number].ends | {END}
        if form.kind == "json_schema":
            jsonschema.validate(json.loads(text), SCHEMA)
        elif form.kind == "choice":
            assert text in CHOICES
        else:
            assert re.fullmatch(PATTERN, text)
    assert sum(answer.reason is Reason.LENGTH for answer in found if made[answer.number].structure) >= 2


def check_log_probabilities(folder: Path, found: list[Finished]) -> None:
    """Of the choices, whose allowed tokens are known by looking."""
    model = load_hf(folder, torch.float64).eval()
    names = [text_of(Finished(0, 0, (token,), (), (), Reason.STOP)) for token in range(BYTES)]
    for request in structured_requests():
        if request.structure is None or request.structure.kind != "choice":
            continue
        for answer in (one for one in found if one.number == request.number):
            with torch.no_grad():
                logits = model(torch.tensor([[*request.prompt, *answer.tokens]])).logits[
                    0, len(request.prompt) - 1 : -1
                ]
            for place, token in enumerate(answer.tokens):
                so_far = text_of(replace(answer, tokens=answer.tokens[:place]))
                may = [t for t in range(BYTES) if names[t] and any(c.startswith(so_far + names[t]) for c in CHOICES)]
                ends = [end for end in (request.ends or {END}) if so_far in CHOICES]
                kept = logits[place, [*may, *ends]] / (request.sampling.temperature or 1.0)
                expected = dict(zip([*may, *ends], kept.log_softmax(0).tolist()))
                assert answer.log_probs[place] == pytest.approx(expected[token], abs=2e-5)
                for other, value in answer.top[place]:
                    assert value == pytest.approx(expected[other], abs=2e-5)
                if not request.sampling.temperature:
                    assert token == max(expected, key=lambda t: expected[t])


def same(one: list[Finished], other: list[Finished]) -> None:
    assert [(a.number, a.sample, a.tokens, a.reason) for a in one] == [
        (a.number, a.sample, a.tokens, a.reason) for a in other
    ]
    for a, b in zip(one, other):
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=2e-5)


@pytest.mark.gloo
def test_answers_have_their_form_whatever_interrupts_them(tmp_path: Path) -> None:
    folder = byte_folder(tmp_path)
    (alone,) = run_ranks(structured_job, 1, str(folder), {}, {"cache_tokens": 4000})
    check_forms(alone)
    check_log_probabilities(folder, alone)
    (crowded,) = run_ranks(structured_job, 1, str(folder), {}, SMALL)  # a cache for two answers
    same(alone, crowded)


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"tp": 2, "pp": 2}, {"pp": 2, "vpp": 2}, {"cp": 2}, {"dp": 2, "tp": 2}], ids=str)
def test_every_layout_gives_the_same_answers(parallel: dict[str, Any], tmp_path: Path) -> None:
    folder = byte_folder(tmp_path)
    (alone,) = run_ranks(structured_job, 1, str(folder), {}, {"cache_tokens": 4000})
    processes = int(np.prod([size for axis, size in parallel.items() if axis != "vpp"]))
    by_rank = run_ranks(structured_job, processes, str(folder), parallel, SMALL)
    found = {(answer.number, answer.sample): answer for part in by_rank for answer in part}
    same(alone, [found[key] for key in sorted(found)])
