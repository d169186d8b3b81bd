"""Calls of tools in texts: stock templates write them, and what is parsed is what was written, in pieces of any length;
what is no call stays text; a structure makes random logits write a call that satisfies the tool's schema."""

from __future__ import annotations

import itertools
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from llm_parallel.data.template import ChatTemplate, chatml
from llm_parallel.data.tokenizer import load_tokenizer
from llm_parallel.errors import UserError
from llm_parallel.generate.structure import Structure, Structures
from llm_parallel.generate.tool_calls import (
    ArgumentsPiece,
    CallBegins,
    CallEnds,
    Malformed,
    TextPiece,
    ToolCall,
    ToolCallParser,
    ToolFormat,
    parse_tool_calls,
    tool_format,
)
from llm_parallel.generate.tool_choice import tool_structure
from tests.support.folders import lasting_folder
from tests.unit.test_structure import answer, kinds

HERMES, LLAMA = ToolFormat("hermes"), ToolFormat("llama")
MISTRAL, NAMED = ToolFormat("mistral"), ToolFormat("mistral", True)
FORMS = [HERMES, LLAMA, MISTRAL, NAMED]

SCRAPS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", '{"name": "f", ', '"arguments": ']
SCRAPS += ['"parameters": ', "{}", "{", "}", "[", "]", ",", ";", " ", "\n", '"', "a", 'f.call(q="x")', "\\", "1"]

values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.text('a"\\{}[]<, é\n', max_size=6)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.text('k"}', max_size=2), inner, max_size=2)
    ),
    max_leaves=4,
)
calls = st.lists(
    st.tuples(
        st.sampled_from(["find", "get_all", "x-1"]), st.dictionaries(st.sampled_from("abc{"), values, max_size=3)
    ),
    min_size=1,
    max_size=3,
)


def written(form: ToolFormat, made: list[tuple[str, dict[str, Any]]], text: str, spaced: bool) -> str:
    """Calls as models write them."""
    arguments = [json.dumps(given, ensure_ascii=spaced, indent=1 if spaced else None) for _, given in made]
    if form == NAMED:
        return text + "".join(f"[TOOL_CALLS]{name}[ARGS]{one}" for (name, _), one in zip(made, arguments))
    key = "parameters" if form == LLAMA else "arguments"
    objects = [f'{{"name": "{name}", "{key}": {one}}}' for (name, _), one in zip(made, arguments)]
    if form == MISTRAL:
        return f"{text}[TOOL_CALLS] [{', '.join(objects)}]"
    if form == LLAMA:
        return (text + "<|python_tag|>" if text else "") + "; ".join(objects)
    return text + "".join(f"\n<tool_call>\n{one}\n</tool_call>" for one in objects)


def pieces(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


def fed(form: ToolFormat, parts: list[str], names: Any = None) -> list[Any]:
    parser = ToolCallParser(form, names)
    return [event for part in parts for event in parser.feed(part)] + parser.close()


def texts_of(events: list[Any]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextPiece))


def calls_of(events: list[Any]) -> list[tuple[str, str]]:
    found: list[list[str]] = []
    for event in events:
        if isinstance(event, CallBegins):
            assert event.index == len(found)
            found.append([event.name, ""])
        elif isinstance(event, ArgumentsPiece):
            assert event.index == len(found) - 1
            found[-1][1] += event.text
        elif isinstance(event, CallEnds):
            assert event.problem is None
    return [(name, arguments) for name, arguments in found]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FORMS), calls, st.sampled_from(["", "Well, <this> is it.", "<tool"]), st.booleans(),
       st.lists(st.integers(0, 999), max_size=9))  # fmt: skip
def test_what_is_parsed_is_what_was_written(
    form: ToolFormat, made: list[tuple[str, dict[str, Any]]], text: str, spaced: bool, cuts: list[int]
) -> None:
    whole = written(form, made, text, spaced)
    found = parse_tool_calls(whole, form, ["find", "get_all", "x-1"])
    assert found.text == text and not found.problems
    assert [(call.name, json.loads(call.arguments)) for call in found.calls] == made
    events = fed(form, pieces(whole, cuts))
    assert texts_of(events) == text
    assert calls_of(events) == [(call.name, call.arguments) for call in found.calls]


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.lists(st.sampled_from(SCRAPS), max_size=12).map("".join),
    st.lists(st.integers(0, 999), max_size=5),
)
def test_no_text_is_lost_and_nothing_depends_on_the_pieces(form: ToolFormat, text: str, cuts: list[int]) -> None:
    found = parse_tool_calls(text, form)
    if not found.calls:
        assert found.text == text
    for call in found.calls:
        assert isinstance(json.loads(call.arguments), dict)
    once, divided = fed(form, [text]), fed(form, pieces(text, cuts))
    assert texts_of(once) == texts_of(divided)
    for kind in (CallBegins, Malformed, CallEnds):
        one, other = ([getattr(e, "name", "") for e in events if isinstance(e, kind)] for events in (once, divided))
        assert one == other


MALFORMED = [
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', "ends inside a call"),
    (HERMES, "<tool_call>f(1)</tool_call>", "begins with 'f'"),
    (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "no object"),
    (HERMES, '<tool_call>{"arguments": {}}</tool_call>', "no name"),
    (HERMES, '<tool_call>{"name": "g", "arguments": {}}</tool_call>', "'g' is called"),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', "NaN"),
    (HERMES, '<tool_call>{"name": "f", "name": "f", "arguments": {}}</tool_call>', "twice"),
    (HERMES, '<tool_call>{"name": "f", "arguments": {}} so', "followed by 'so'"),
    (HERMES, '<tool_call>{"name": "f", "arguments": {}}</tool', "ends inside a call"),
    (LLAMA, '{"name": 3, "parameters": {}}', "no name"),
    (LLAMA, "<|python_tag|>import os", "neither JSON"),
    (LLAMA, "<|python_tag|>f.call(open('x'))", "neither JSON"),
    (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {}} {', "in a list is followed"),
    (MISTRAL, "[TOOL_CALLS] [1]", "begins with"),
    (NAMED, '[TOOL_CALLS]f[ARGS]{"a": }', "no JSON"),
    (NAMED, '[TOOL_CALLS]{"a": 1}', "no name"),
]


@pytest.mark.parametrize(("form", "text", "part"), MALFORMED, ids=[text for _, text, _ in MALFORMED])
def test_malformed_calls_stay_text_and_are_said(form: ToolFormat, text: str, part: str) -> None:
    found = parse_tool_calls("Now. " + text if form != LLAMA or text[0] == "<" else text, form, ["f"])
    assert not found.calls and found.text.endswith(text) and len(found.problems) == 1 and part in found.problems[0]
    problems = [e.problem for e in fed(form, list(text), ["f"]) if isinstance(e, (Malformed, CallEnds)) and e.problem]
    assert len(problems) == 1, "said while the text comes, too"


def test_calls_in_other_orders_and_of_built_in_tools() -> None:
    for text, form, expected in [
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', HERMES, ("f", {"a": 1})),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', HERMES, ("f", {"a": 1})),
        ('<tool_call>{"name": "f"}</tool_call>', HERMES, ("f", {})),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}', HERMES, ("f", {"a": 1})),
        ('<|python_tag|>search.call(query="a { b", n=3)', LLAMA, ("search", {"query": "a { b", "n": 3})),
        ('{"type": "function", "name": "f", "parameters": {"a": 1}}', LLAMA, ("f", {"a": 1})),
        ('[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]', MISTRAL, ("f", {"a": 1})),
        ('[TOOL_CALLS]f[CALL_ID]abc[ARGS]{"a": 1}', NAMED, ("f", {"a": 1})),
    ]:
        for events in (
            [*parse_tool_calls(text, form).calls],
            [ToolCall(*call) for call in calls_of(fed(form, list(text)))],
        ):
            assert [(call.name, json.loads(call.arguments)) for call in events] == [expected], text


def test_arguments_are_passed_on_as_they_come() -> None:
    parser = ToolCallParser(HERMES)
    assert parser.feed('Look.\n <tool_call>{"name": "f", "argu') == [TextPiece("Look.")]
    assert parser.feed('ments": {"a"') == [CallBegins(0, "f"), ArgumentsPiece(0, '{"a"')]
    assert parser.feed(": 1}") == [ArgumentsPiece(0, ": 1}")]
    assert parser.feed("}\n</tool_call>\n") == [CallEnds(0)]
    assert parser.close() == []


TOOLS = [
    {"type": "function", "function": {"name": "find", "description": "Finds.", "parameters": {
        "type": "object", "properties": {"what": {"enum": ["key", "lock"]}, "times": {"type": "integer", "maximum": 9,
                                                                                   "minimum": 0}},
        "required": ["what"], "additionalProperties": False}}},
    {"type": "function", "function": {"name": "wait", "parameters": {
        "type": "object", "properties": {}, "additionalProperties": False}}},
]  # fmt: skip


def stock_templates() -> dict[str, str]:
    trl = pytest.importorskip("trl", reason="TRL has the templates that this parses")
    folder = Path(trl.__file__).parent / "chat_templates"
    names = ("qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3_1", "llama3_2")
    return {name: (folder / f"{name}.jinja").read_text(encoding="utf-8") for name in names}


def test_calls_that_templates_write_are_parsed() -> None:
    for name, source in {"ours": chatml("<|im_start|>", "<|im_end|>"), **stock_templates()}.items():
        template = ChatTemplate(source, name, {"bos_token": "<s>", "eos_token": "</s>"})
        form = tool_format(source)
        assert form == (LLAMA if name.startswith("llama") else HERMES)
        called = [
            {"type": "function", "function": {"name": "find", "arguments": {"what": "key", "n": [1, {"k": "}"}]}}}
        ]
        if name == "ours":
            called += [{"type": "function", "function": {"name": "wait", "arguments": {}}}]
        messages = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "", "tool_calls": called}]
        asked = template.text(messages[:1], tools=TOOLS, generation_prompt=True)
        text = template.text(messages, tools=TOOLS)[len(asked) :]
        text = re.sub(r"^<think>\s*</think>\s*", "", re.split(r"<\|im_end\|>|<\|eot_id\|>|<\|eom_id\|>", text)[0])
        found = parse_tool_calls(text, form)
        assert not found.text.strip() and not found.problems, (name, text)
        assert [(call.name, json.loads(call.arguments)) for call in found.calls] == [
            (one["function"]["name"], one["function"]["arguments"]) for one in called
        ]


@pytest.mark.parametrize("source", ["no tools", "<tool_call>\n<function=f>", "<tool_call>{{ x }}<arg_key>"])
def test_other_templates_have_no_known_format(source: str) -> None:
    assert tool_format(source) is None


@cache
def marked(special: bool) -> Any:
    """A tokenizer of bytes that has the marks of all formats as tokens of their own."""
    folder = lasting_folder()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({one: number for number, one in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["</s>"])
    names = ["<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]"]
    made.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    made.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", ["special", "added", "none", "pieces"])
def test_random_logits_are_made_to_call(form: ToolFormat, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance", reason="pip install llguidance")
    tokenizer = {"none": kinds()[0], "pieces": kinds()[1]}.get(kind) or marked(kind == "special")
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    monkeypatch.setattr("tests.unit.test_structure.text_of", lambda _, tokens: tokenizer.decode(tokens, control=True))
    seen = set()
    for seed, choice in enumerate(["required", "required", {"type": "function", "function": {"name": "wait"}}]):
        structure = tool_structure(form, tokenizer, TOOLS, choice, parallel=seed == 0)
        assert structure is not None
        text, complete = answer(tokenizer, structure, seed)
        found = parse_tool_calls(str(text), form, schemas)
        assert complete and found.calls and not found.problems and not found.text.strip(), text
        assert len(found.calls) == 1 or seed == 0
        for call in found.calls:
            jsonschema.validate(json.loads(call.arguments), schemas[call.name])
            seen.add(call.name)
        assert seed < 2 or found.calls[0].name == "wait"


@pytest.mark.parametrize(
    ("tools", "choice", "part"),
    [
        (TOOLS, {"type": "function", "function": {"name": "lost"}}, "'find', 'wait'"),
        (TOOLS, "any", "auto, none, required"),
        (TOOLS, 3, "tool_choice is 3"),
        ([], "required", "tools is empty"),
        ("find", "required", "list of functions"),
        ([{"type": "function"}], "auto", "tools[0]"),
        ([TOOLS[0], TOOLS[0]], "auto", "earlier one"),
        ([{"name": "a b"}], "auto", "letters, digits"),
        ([{"name": "a", "parameters": 3}], "auto", "parameters of tools[0]"),
    ],
)
def test_choices_that_cannot_be_made(tools: Any, choice: Any, part: str) -> None:
    with pytest.raises(UserError) as error:
        tool_structure(HERMES, kinds()[0], tools, choice)
    assert part in str(error.value)


def test_parameters_that_cannot_be_enforced_are_refused_with_one_sentence() -> None:
    pytest.importorskip("llguidance", reason="pip install llguidance")
    structure = tool_structure(HERMES, kinds()[0], [{"name": "f", "parameters": {"not": {}}}], "required")
    with pytest.raises(UserError, match=r"parameters of tools.*\bnot\b"):
        Structures(kinds()[0], 300).check(structure)


def test_no_choice_is_no_structure() -> None:
    assert all(tool_structure(HERMES, kinds()[0], TOOLS, choice) is None for choice in (None, "auto", "none"))
    assert isinstance(tool_structure(HERMES, kinds()[0], [{"name": "f"}], "required"), Structure)
