"""Structures of answers: masks against brute force, Python's regular expressions and jsonschema; what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llm_parallel.data.tokenizer import load_tokenizer, train_sentencepiece
from llm_parallel.errors import UserError
from llm_parallel.generate.draw import NO_TOKEN, Choice, Draw, choose_tokens
from llm_parallel.generate.requests import Reason, Request
from llm_parallel.generate.sampling import Sampling
from llm_parallel.generate.scheduler import Limits, Scheduler
from llm_parallel.generate.structure import Structure, Structures
from tests.support.folders import lasting_folder

pytest.importorskip("llguidance", reason="pip install llguidance")
MERGES = [("a", "b"), ("ab", "c"), ("{", '"'), ('"', ":"), ("t", "r"), ("Ã", "©")]


def byte_tokenizer(folder: Path, alphabet: Sequence[str], merges: Sequence[tuple[str, str]] = ()) -> Any:
    words = [*sorted(alphabet), *map("".join, merges)]
    made = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return load_tokenizer(folder)


@cache
def kinds() -> tuple[Any, ...]:
    """A byte-level tokenizer and a SentencePiece model."""
    pieces, bytes_ = lasting_folder(), lasting_folder()
    train_sentencepiece(['the "abc": [1, 22] é true\n', "ab abc {}"] * 40, 300, pieces)
    return byte_tokenizer(bytes_, pre_tokenizers.ByteLevel.alphabet(), MERGES), load_tokenizer(pieces)


class Answer:
    pass


def answer(
    tokenizer: Any, structure: Structure, seed: int, length: int = 600, temperature: float = 1.0
) -> tuple[bytes, bool]:
    """What random logits write, and whether it ended."""
    vocabulary = tokenizer.vocab_size + 3
    structures, key, written = Structures(tokenizer, vocabulary), Answer(), []
    generator = torch.Generator().manual_seed(seed)
    ends = {tokenizer.eod, vocabulary + 7}
    for _ in range(length):
        allowed = structures.allowed(key, structure, written, ends)
        assert not allowed[tokenizer.vocab_size :].any()
        logits = torch.randn(1, vocabulary, generator=generator)
        draw = Draw(Sampling(temperature=temperature, seed=seed), 0, 0, written, 0, allowed)
        (choice,) = choose_tokens(logits, [draw])
        assert allowed[choice.token]
        if choice.token in ends:
            return text_of(tokenizer, written), True
        written.append(choice.token)
    return text_of(tokenizer, written), False


def text_of(tokenizer: Any, tokens: Sequence[int]) -> bytes:
    """The bytes of tokens, one by one, from their names."""
    if tokenizer.name.endswith(".json"):
        back = {char: byte for byte, char in byte_characters().items()}
        return bytes(back[char] for token in tokens for char in tokenizer.token(token))
    names = [tokenizer.token(token) for token in tokens]
    return b"".join(
        bytes([int(name[3:5], 16)]) if re.fullmatch("<0x..>", name) else name.replace("\u2581", " ").encode()
        for name in names
    )


def byte_characters() -> dict[int, str]:
    """GPT-2's character for each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(rest)}


texts = st.text('abct{":1é ', min_size=1, max_size=7)


@settings(max_examples=40, deadline=None)
@given(st.lists(texts, min_size=1, max_size=5), st.integers(0, 1), st.integers(0, 99))
def test_masks_of_choices_are_those_of_brute_force(choices: list[str], kind: int, seed: int) -> None:
    tokenizer = kinds()[kind]
    structure, ends = Structure.choice(choices), {tokenizer.eod}
    structures = Structures(tokenizer, tokenizer.vocab_size)
    pieces = [
        (token, text_of(tokenizer, [token])) for token in range(tokenizer.vocab_size) if is_text(tokenizer, token)
    ]
    wanted, draw = [one.encode() for one in choices], np.random.default_rng(seed)
    key, written = Answer(), []
    while True:
        so_far = text_of(tokenizer, written)
        expected = {token for token, piece in pieces if any(one.startswith(so_far + piece) for one in wanted)}
        expected |= ends if so_far in wanted else set()
        found = structures.allowed(key, structure, written, ends)
        open_ = [one[len(so_far) :] for one in wanted if one.startswith(so_far)]
        if len({one[:1] for one in open_}) > 1:
            assert set(found.nonzero()[0].tolist()) == expected
        else:  # one byte follows, and so the library asks for the usual token
            expected &= set(found.nonzero()[0].tolist())
            assert expected and found.sum() == len(expected)
        again = Structures(tokenizer, tokenizer.vocab_size).allowed(Answer(), structure, written, ends)
        assert (again == found).all(), "the state does not follow from the tokens"
        token = int(draw.choice(sorted(expected)))
        if token in ends:
            break
        written.append(token)


def is_text(tokenizer: Any, token: int) -> bool:
    name = tokenizer.token(token)
    return name not in ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")


PATTERNS = ["a{2,3}b|c", r"[A-Z][a-z]{1,4}( [0-9]{2}){0,2}", r"(yes|no), .{0,8}", "é?x*y", "^ab$"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_answers_match_their_regular_expression(pattern: str) -> None:
    ended = 0
    for seed in range(6):
        found, complete = answer(kinds()[seed % 2], Structure.regex(pattern), seed, 60, float(seed > 1))
        text = found.decode("utf-8", "strict" if complete else "ignore")
        ended += complete
        assert not complete or re.fullmatch(pattern, text), text
    assert ended >= 3


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Schemas whose answers are short enough to be finished."""
    leaves = st.one_of(
        st.just({"type": "null"}),
        st.just({"type": "boolean"}),
        st.builds(lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more}, st.integers(-50, 50),
                  st.integers(0, 200)),
        st.builds(lambda least, more: {"type": "string", "minLength": least, "maxLength": least + more},
                  st.integers(0, 3), st.integers(0, 4)),
        st.just({"type": "string", "pattern": "^[ab]{2}-[0-9]$"}),
        st.builds(lambda held: {"enum": held}, st.lists(st.sampled_from(["x", 'q"', 3, None, True, [1], {"k": 2}]),
                                                        min_size=1, max_size=3)),
        st.builds(lambda held: {"const": held}, st.sampled_from(["é", -1.5, False, []])),
    )  # fmt: skip

    def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        names = st.lists(st.sampled_from(["a", "b b", "c", "é"]), unique=True, max_size=3)
        objects = st.builds(
            lambda keys, held, needed: {
                "type": "object",
                "properties": dict(zip(keys, held)),
                "required": keys[:needed],
                "additionalProperties": False,
            },
            names, st.lists(inner, min_size=3, max_size=3), st.integers(0, 3),
        )  # fmt: skip
        arrays = st.builds(
            lambda items, least, more: {"type": "array", "items": items, "minItems": least, "maxItems": least + more},
            inner, st.integers(0, 2), st.integers(0, 2),
        )  # fmt: skip
        return st.one_of(
            objects, arrays, st.builds(lambda held: {"anyOf": held}, st.lists(inner, min_size=1, max_size=2))
        )

    return st.recursive(leaves, larger, max_leaves=5)


@settings(max_examples=50, deadline=None)
@given(schemas(), st.integers(0, 1), st.integers(0, 10**6), st.sampled_from([0.0, 1.0]))
def test_answers_satisfy_their_schema(schema: dict[str, Any], kind: int, seed: int, temperature: float) -> None:
    found, complete = answer(kinds()[kind], Structure.json_schema(schema), seed, temperature=temperature)
    assert complete
    jsonschema.validate(json.loads(found), schema)


def test_any_object_is_one_and_a_grammar_in_both_forms_is_followed() -> None:
    tokenizer = kinds()[0]
    for seed in range(3):
        found, complete = answer(tokenizer, Structure.json_object(), seed, 300)
        assert not complete or isinstance(json.loads(found), dict)
        for text in ('root ::= sum\nsum ::= [0-9] ("+" [0-9]){0,3}', 'start: N ("+" N)~0..3\nN: /[0-9]/'):
            found, complete = answer(tokenizer, Structure.grammar(text), seed)
            assert complete and re.fullmatch(rb"\d(\+\d){0,3}", found)
    found, complete = answer(tokenizer, Structure.json_schema(True), 1, 100)
    assert not complete or json.loads(found) is not Ellipsis


def test_log_probabilities_are_of_the_allowed_tokens() -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(3)) * 3
    allowed = np.zeros(20, np.bool_)
    allowed[[2, 5, 11]] = True
    how = [Sampling(top_log_probs=5), Sampling(temperature=0.7, seed=4, top_log_probs=5), Sampling(top_log_probs=20)]
    masks = [allowed, allowed, None]
    found = choose_tokens(logits, [Draw(one, 0, 0, [1], 1, mask) for one, mask in zip(how, masks)])
    for row, (choice, temperature) in enumerate(zip(found, (1.0, 0.7))):
        kept = logits[row].double()[[2, 5, 11]] / temperature
        expected = dict(zip([2, 5, 11], (kept - kept.logsumexp(0)).tolist()))
        assert choice.log_prob == pytest.approx(expected[choice.token], abs=1e-6)
        assert dict(choice.top) == pytest.approx(expected, abs=1e-6)
    assert found[0].token == found[0].top[0][0] and len(found[2].top) == 20
    bias = Sampling(logit_bias=((0, 100.0),), repetition_penalty=1.3)
    assert choose_tokens(logits[:1], [Draw(bias, 0, 0, [1], 1, allowed)])[0].token in (2, 5, 11)


def test_an_answer_that_nothing_continues_ends_with_its_reason(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path, ["a", "b"])
    structures, structure = Structures(tokenizer, 8), Structure.choice(["az"])
    first = structures.allowed(Answer(), structure, [], {4})
    assert first.nonzero()[0].tolist() == [0]
    lost = Draw(Sampling(), 0, 0, [0], 0, structures.allowed(Answer(), structure, [0], {4}))
    other = Draw(Sampling(temperature=1.0), 0, 0, [0], 0)
    found = choose_tokens(torch.randn(2, 8), [lost, other])
    assert found[0].token == NO_TOKEN and 0 <= found[1].token < 8
    scheduler = Scheduler(Limits(8))
    scheduler.submit(Request(0, (1, 2), structure=structure))
    assert scheduler.apply(scheduler.plan(), [Choice(0, -1.0)]) == []
    (finished,) = scheduler.apply(scheduler.plan(), found[:1])
    assert finished.reason is Reason.STRUCTURE and finished.tokens == (0,) and finished.truncated
    assert scheduler.idle and scheduler.pool.used == 0


REFUSED = [
    (lambda: Structure.json_schema({"type": "objekt"}), "objekt"),
    (lambda: Structure.json_schema({"not": {"type": "string"}}), "not"),
    (lambda: Structure.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
    (lambda: Structure.json_schema({"x-guidance": {"lenient": True}, "if": {}}), "if"),
    (lambda: Structure.json_schema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum"),
    (lambda: Structure.json_schema({"$ref": "#/$defs/q"}), "defs/q"),
    (lambda: Structure.json_schema({"type": "string", "pattern": "(a"}), "unclosed group"),
    (lambda: Structure.json_schema(False), "accepts nothing"),
    (lambda: Structure.json_schema("{"), "no JSON"),
    (lambda: Structure.json_schema("[1]"), "no JSON object"),
    (lambda: Structure.regex("(a"), "unclosed group"),
    (lambda: Structure.regex("(?=a)b"), "look-around"),
    (lambda: Structure.regex(7), "no text"),  # type: ignore[arg-type]
    (lambda: Structure.grammar("hallo"), "::="),
    (lambda: Structure.grammar("root ::= y"), "'y'"),
    (lambda: Structure.grammar("start: <|nope|>"), "nope"),
    (lambda: Structure.choice([]), "at least one"),
    (lambda: Structure.choice(["a", ""]), "none empty"),
    (lambda: Structure.choice("yes"), "at least one"),
    (lambda: Structure("choice", '{"a": 1}'), "at least one"),
]


@pytest.mark.parametrize(("make", "part"), REFUSED, ids=[part for _, part in REFUSED])
def test_what_cannot_be_enforced_is_refused_with_one_sentence(make: Any, part: str) -> None:
    tokenizer = kinds()[0]
    with pytest.raises(UserError) as error:
        Structures(tokenizer, tokenizer.vocab_size).check(make())
    message = str(error.value)
    assert part in message and "\n" not in message and len(message) < 300


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}, "guided_json": None}, None),
        ({"text": "a text of completions"}, None),
        ({"response_format": {"type": "json_object"}}, Structure.json_object()),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
                }
            },
            Structure.json_schema(SCHEMA),
        ),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}}, Structure.json_schema(SCHEMA)),
        ({"guided_json": SCHEMA}, Structure.json_schema(SCHEMA)),
        ({"structured_outputs": {"regex": "a+", "json": None}}, Structure.regex("a+")),
        ({"guided_choice": ["a", "b"]}, Structure.choice(["a", "b"])),
        ({"guided_grammar": "root ::= [0-9]"}, Structure.grammar("root ::= [0-9]")),
    ],
)
def test_structures_of_http_requests(body: dict[str, Any], expected: Structure | None) -> None:
    assert Structure.from_request(body) == expected


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ({"response_format": {"type": "xml"}}, ["response_format", "json_schema"]),
        ({"response_format": "json_object"}, ["response_format", "json_object"]),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, ["response_format.json_schema.schema"]),
        ({"text": {"format": {"type": "json_schema", "schema": 3}}}, ["text.format.schema", "3"]),
        ({"guided_regex": 5}, ["guided_regex", "5"]),
        ({"guided_choice": "yes"}, ["guided_choice", "yes"]),
        ({"structured_outputs": {"structural_tag": "x"}}, ["structured_outputs.structural_tag"]),
        ({"structured_outputs": "json"}, ["structured_outputs"]),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, ["response_format and guided_regex"]),
    ],
)
def test_bodies_that_ask_for_no_structure_are_refused(body: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        Structure.from_request(body)
    assert all(part in str(error.value) for part in parts)
