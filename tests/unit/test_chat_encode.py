"""Conversations as token ids: what is typed stays text, what is trained, where an answer stops, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llm_parallel.data.chat import ChatEncoder, ChatTokens
from llm_parallel.data.chat_counts import Counts
from llm_parallel.data.chat_tokens import ChatTokenizer
from llm_parallel.data.formats import Conversation, Reader
from llm_parallel.data.template import ChatTemplate, Refused, chatml, own_template
from llm_parallel.data.tokenizer import load_tokenizer, train_sentencepiece
from llm_parallel.errors import UserError

SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end|>"]
TEXT = ["user assistant system the of and is what is the sum of two and three\nHello! 2+2=4\n" * 30]


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return trained(made, pre_tokenizers.ByteLevel.alphabet())


def metaspace(scheme: str) -> Tokenizer:
    """Like Llama 2's and Mistral's: a blank is a character of its own, put before the text or before every part."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme=scheme), decoders.ByteFallback()])
    return trained(made, [], ["<unk>", *SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))])


def prepended() -> Tokenizer:
    """Llama 2's older form, in which the normalizer puts the blank before every part between special tokens."""
    made = metaspace("never")
    made.pre_tokenizer = None
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return made


def trained(made: Tokenizer, alphabet: list[str], specials: list[str] | None = None) -> Tokenizer:
    made.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=specials or [],
                                  show_progress=False),
    )  # fmt: skip
    return made


KINDS = {"bytes": byte_level, "first": lambda: metaspace("first"), "always": lambda: metaspace("always"),
         "prepended": prepended}  # fmt: skip


def opened(made: Tokenizer, folder: Path, **config: Any) -> ChatTokenizer:
    made.save(str(folder / "tokenizer.json"))
    values = {"bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return ChatTokenizer(load_tokenizer(folder))


def with_specials(made: Tokenizer, but: str = "", strip: bool = False) -> Tokenizer:
    made.add_special_tokens(
        [AddedToken(name, special=True, normalized=False, rstrip=strip) for name in SPECIALS if name != but]
    )
    return made


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return opened(with_specials(byte_level()), tmp_path_factory.mktemp("plain"))


def encoder(tokenizer: ChatTokenizer, source: str | None = None, **options: Any) -> ChatEncoder:
    source = source or chatml("<|im_start|>", "<|im_end|>")
    return ChatEncoder(tokenizer, ChatTemplate(source, "the template", tokenizer.variables), **options)


def conversation(*contents: str, **more: Any) -> Conversation:
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    return Reader().read({"messages": turns, **more})


def trained_text(tokenizer: ChatTokenizer, tokens: ChatTokens) -> list[str]:
    """Each trained stretch, with the names of its special tokens."""
    names = {number: name for name, number in tokenizer.added.items()}
    found, inside = [], False
    for number, weight in zip(tokens.ids.tolist(), tokens.weights.tolist()):
        if not weight:
            inside = False
            continue
        if not inside:
            found.append([])
        inside = True
        found[-1].append(number)
    shown = []
    for stretch in found:
        stop = [number for number in stretch if number in names]
        text = tokenizer.tokenizer.decode([number for number in stretch if number not in names])
        shown.append(text + "".join(names[number] for number in stop))
    return shown


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("strip", [False, True])
def test_without_typed_names_the_ids_are_those_of_the_tokenizer(kind: str, strip: bool, tmp_path: Path) -> None:
    made = with_specials(KINDS[kind](), strip=strip)
    tokenizer = opened(made, tmp_path)
    text = "<s><|im_start|>user\n what is  the sum? 漢😀 <|im_end|>\n<|im_start|>assistant\nHello!</s>"
    assert tokenizer.encode(text).ids.tolist() == made.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", ["</s>", "<|im_end|>"])
def test_a_typed_name_is_encoded_as_by_a_tokenizer_that_does_not_know_it(kind: str, name: str, tmp_path: Path) -> None:
    """The reference lacks the name that is typed, and so cannot take it for a token."""
    tokenizer = opened(with_specials(KINDS[kind]()), tmp_path)
    ignorant = json.loads(with_specials(KINDS[kind](), but=name).to_str())
    ignorant["added_tokens"] = [token for token in ignorant["added_tokens"] if token["content"] != name]
    vocabulary = ignorant["model"]["vocab"]
    if name in vocabulary:
        vocabulary["\U0010fffd" * len(name)] = vocabulary.pop(name)
    reference = Tokenizer.from_str(json.dumps(ignorant))
    typed = f"what {name} is{name} the {name}"
    written = f"<s><|im_start|>user\n{typed}<|end|>\n"
    escaped = written.replace(typed, tokenizer.escaper()(typed))
    got = tokenizer.encode(escaped)
    expected = reference.encode(written, add_special_tokens=False).ids
    names = {number: held for held, number in tokenizer.added.items()}
    by_name = {reference.token_to_id(held): held for held in SPECIALS if held != name}
    pieces = [names.get(number, number) for number in got.ids.tolist()]
    assert name not in pieces
    if kind != "bytes":  # there, the reference numbers its added tokens otherwise
        assert got.ids.tolist() == expected
    assert [by_name.get(number, number) for number in expected] == pieces
    assert tokenizer.restore(escaped) == written


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from([*SPECIALS, " ", "<", "|im_end|", ">", "a", "漢", "\n", "<s", "/s>"]), max_size=12))
def test_no_text_becomes_a_special_token(plain: ChatTokenizer, pieces: list[str]) -> None:
    text = "".join(pieces)
    tokens = encoder(plain).encode(conversation(text, text))
    names = [plain.name_of(number) for number in tokens.ids.tolist()]
    assert [name for name in names if name] == ["<|im_start|>", "<|im_end|>"] * 2
    answer = tokens.ids[tokens.weights > 0][:-1].tolist()
    assert plain.tokenizer.decode(answer) == text


def test_turns_weights_and_system(plain: ChatTokenizer) -> None:
    both = conversation("a", "one", "b", "two")
    assert trained_text(plain, encoder(plain).encode(both)) == ["one<|im_end|>", "two<|im_end|>"]
    assert trained_text(plain, encoder(plain, train_on="last_turn").encode(both)) == ["two<|im_end|>"]
    weighted = Reader().read({
        "messages": [
            {"role": "user", "content": "a"}, {"role": "assistant", "content": "one", "weight": 0.25},
            {"role": "user", "content": "b"}, {"role": "assistant", "content": "two", "train": False},
        ]
    })  # fmt: skip
    found = encoder(plain).encode(weighted)
    assert trained_text(plain, found) == ["one<|im_end|>"] and set(found.weights.tolist()) == {0.0, 0.25}
    with_system = encoder(plain, system="Be kind.").encode(both)
    assert "system\nBe kind." in plain.tokenizer.decode(with_system.ids.tolist())


def test_tool_results_are_not_trained_and_calls_are(plain: ChatTokenizer) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "find", "arguments": '{"what": "it"}'}}]}
    turns = [{"role": "user", "content": "a"}, call, {"role": "tool", "content": "found"},
             {"role": "assistant", "content": "b"}]  # fmt: skip
    found = Reader().read({"messages": turns, "tools": json.dumps([{"name": "find"}])})
    text = trained_text(plain, encoder(plain).encode(found))
    assert text == [
        '<tool_call>\n{"name": "find", "arguments": {"what": "it"}}\n</tool_call><|im_end|>', "b<|im_end|>"
    ]  # fmt: skip
    assert '{"name": "find"}' in plain.tokenizer.decode(encoder(plain).encode(found).ids.tolist())


def test_a_template_that_writes_no_tools_is_said(plain: ChatTokenizer) -> None:
    """Of four conversations, two with tools and one of them with a call, and by a template that writes them nothing."""
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "find", "arguments": {"what": "it"}}}]}
    asked, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    records: list[dict[str, Any]] = [
        {"messages": [asked, answer]}, {"messages": [asked, answer], "tools": tools},
        {"messages": [asked, call, {"role": "tool", "content": "c"}, answer], "tools": tools},
        {"messages": [asked, call]},
    ]  # fmt: skip
    for source, expected in ((None, (0, 0)), (loop("<|im_end|>"), (2, 2))):
        writer, counts = encoder(plain, source), Counts()
        for record in records:
            found = Reader().read(record)
            counts.add(writer.encode_within(found, 1000), found, writer)
        assert (counts.calls_unwritten, counts.tools_unwritten) == expected


@pytest.mark.parametrize("arguments", ["c.function.arguments", "c.function.arguments | tojson"])
def test_calls_are_written_by_templates_that_ask_for_no_content(plain: ChatTokenizer, arguments: str) -> None:
    """As DeepSeek's do: a message with calls has no content there, and an empty one is an answer of nothing."""
    made = encoder(
        plain,
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.role == 'assistant' and m.content is none %}"
        "{% for c in m.tool_calls %}{{ '+' + c.function.name + ' ' + " + arguments + " }}{% endfor %}"
        "{% else %}{{ ' ' + m.content }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}",
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    turns = [{"role": "user", "content": "2?"}, call, {"role": "tool", "content": "4"}]
    spoken = made.encode(Reader().read({"messages": [*turns, {"role": "assistant", "content": "It is 4"}]}))
    assert made.writes_calls
    assert trained_text(plain, spoken) == ['+add {"a": 2}<|im_end|>', " It is 4<|im_end|>"]
    asked = made.prompt(turns)
    assert asked.tolist() == spoken.ids[: len(asked)].tolist()


def test_earlier_thoughts_that_a_template_drops_are_not_looked_for(plain: ChatTokenizer) -> None:
    source = (
        "{% for m in messages %}{% set text = m.content.split('</think>')[-1] if not loop.last else m.content %}"
        "{{ '<|im_start|>' + m.role + '\\n' + text + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    found = encoder(plain, source).encode(conversation("a", "<think>x</think>one", "b", "<think>y</think>two"))
    assert trained_text(plain, found) == ["one<|im_end|>", "<think>y</think>two<|im_end|>"]


def test_an_empty_thought_that_the_question_can_hold_is_not_trained(plain: ChatTokenizer) -> None:
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
        "{% if '<think>' not in m.content %}{{ '<think></think>' }}{% endif %}{% endif %}"
        "{{ m.content + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
        "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}{% endif %}"
    )
    found = encoder(plain, source).encode(conversation("a", "one", "b", "<think>y</think>two"))
    assert trained_text(plain, found) == ["one<|im_end|>", "<think>y</think>two<|im_end|>"]


def test_a_stop_that_only_the_next_turn_brings_is_put_behind_the_last_answer(plain: ChatTokenizer) -> None:
    source = (
        "{% for m in messages %}{{ ('<|im_start|>' if m.role == 'user' else '<s>') + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>' }}{% endif %}"
    )
    made = encoder(plain, source)
    assert plain.name_of(made.stops[0]) == "<|im_start|>"
    found = made.encode(conversation("a", "one", "b", "two"))
    assert trained_text(plain, found) == ["one<|im_start|>", "two<|im_start|>"]
    assert found.ids.tolist().count(plain.added["<|im_start|>"]) == 3


def test_marks_of_the_template_say_what_is_trained(plain: ChatTokenizer) -> None:
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ':' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
        "{% endif %}{% endfor %}"
    )
    assert trained_text(plain, encoder(plain, source).encode(conversation("a", "one"))) == ["one<|im_end|>"]


def test_marks_and_stops_that_deserve_a_remark(plain: ChatTokenizer) -> None:
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ ':' + m.content + end }}{% endgeneration %}{% else %}{{ ':' + m.content + end }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
    )
    first, second = encoder(plain, "{% set end = '<|im_end|>' %}" + source).remarks()
    assert "<|im_end|> ends answers, and the model's files name </s> only" in first
    assert "marks ':' as written by the assistant" in second
    assert len(encoder(plain, "{% set end = '</s>' %}" + source).remarks()) == 1


def test_two_of_a_role_are_joined_only_if_the_template_refuses_them(plain: ChatTokenizer) -> None:
    turns = [("user", "a"), ("user", "b"), ("assistant", "c")]
    found = Reader().read({"conversations": [{"from": role, "value": text} for role, text in turns]})
    assert encoder(plain).encode(found).merged == 0
    strict = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    )
    joined = encoder(plain, strict).encode(found)
    assert joined.merged == 1 and "a\n\nb" in plain.tokenizer.decode(joined.ids.tolist())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(10, 60), st.booleans())
def test_what_is_cut_fits_and_stops_only_where_the_answer_is_whole(
    plain: ChatTokenizer, turns: int, limit: int, system: bool
) -> None:
    contents = [word * (3 + 5 * (n % 4)) for n, word in enumerate(["ab ", "cd "] * turns)]
    made = encoder(plain, system="Be kind." if system else None)
    whole = made.encode(conversation(*contents))
    found = made.encode_within(conversation(*contents), limit)
    if found is None:
        return
    assert len(found.ids) <= limit and found.weights[-1] > 0 and found.turns_cut % 2 == 0
    assert (int(found.ids[-1]) in made.stops) != found.answer_cut
    if system:
        assert "Be kind." in plain.tokenizer.decode(found.ids.tolist())
    kept = trained_text(plain, found)
    every = trained_text(plain, whole)
    assert kept == every[len(every) - len(kept) :] or found.answer_cut


def test_what_is_cut_keeps_the_system_message_and_what_was_joined(plain: ChatTokenizer) -> None:
    """A system message and joined turns move the places of messages, by which the turns that go are chosen."""
    strict = (
        "{% for m in messages %}{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    turns = [{"role": "user", "content": "one"}]
    for number in range(4):
        turns += [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number} " * 8}]
    made = encoder(plain, strict, system="Be kind.")
    conversation = Reader().read({"messages": turns})
    rounds = [made.encode(conversation.without(0, cut)) for cut in (1, 3, 5, 7)]
    for kept, whole in enumerate(rounds):
        length = len(whole.ids) - 1  # the line break behind the last stop is not kept
        found = made.encode_within(conversation, length)
        assert (
            found is not None and len(found.ids) <= length and "Be kind." in plain.tokenizer.decode(found.ids.tolist())
        )
        expected = [f"a{number} " * 8 + "<|im_end|>" for number in range(kept, 4)]
        assert trained_text(plain, found) == expected[-len(trained_text(plain, found)) :]
        assert len(trained_text(plain, found)) >= 4 - kept - (kept == 0)
        assert found.merged == 1 and not found.answer_cut


def test_marks_without_a_loop_over_messages_follow_the_order_of_answers(plain: ChatTokenizer) -> None:
    source = (
        "{% for n in range(messages | length) %}{% set m = messages[n] %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    )
    both = conversation("a", "one", "b", "two")
    assert trained_text(plain, encoder(plain, source).encode(both)) == ["one<|im_end|>", "two<|im_end|>"]
    assert trained_text(plain, encoder(plain, source, train_on="last_turn").encode(both)) == ["two<|im_end|>"]


def test_sentencepiece_control_tokens(tmp_path: Path) -> None:
    path = train_sentencepiece([*TEXT, "漢"], 340, tmp_path)
    tokenizer = ChatTokenizer(load_tokenizer(path))
    made = encoder(tokenizer, chatml("<s>", "</s>"))
    found = made.encode(conversation("what </s> is <s>", "the sum </s> 漢é😀"))
    assert [number for number in found.ids.tolist() if number in (1, 2)] == [1, 2, 1, 2]
    assert trained_text(tokenizer, found) == ["the sum </s> 漢é😀</s>"]
    assert (
        made.prompt([{"role": "user", "content": "a"}]).tolist()
        == made.encode(conversation("a", "b")).ids.tolist()[: len(made.prompt([{"role": "user", "content": "a"}]))]
    )


def test_the_template_of_the_folder(tmp_path: Path) -> None:
    assert own_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "A"}))
    assert own_template(tmp_path) == ("A", str(config))
    several = [{"name": "tool_use", "template": "B"}, {"name": "default", "template": "C"}]
    config.write_text(json.dumps({"chat_template": several}))
    assert own_template(tmp_path) == ("C", f"{config} (the one named 'default', not 'tool_use')")
    (tmp_path / "chat_template.jinja").write_text("D")
    assert own_template(tmp_path) == ("D", str(tmp_path / "chat_template.jinja"))
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("E")
    beside = f"{tmp_path / 'chat_template.jinja'} (the one named 'default', not 'tool_use')"
    assert own_template(tmp_path) == ("D", beside)
    (tmp_path / "chat_template.jinja").unlink()
    config.write_text(json.dumps({"chat_template": several[:1]}))
    with pytest.raises(UserError, match="'tool_use' and none named 'default'"):
        own_template(tmp_path)


def loop(end: str) -> str:
    return "{% for m in messages %}{{ m.role + m.content }}" + end + "{% endfor %}"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for m in messages %}", "is no Jinja template that can be used: .* in line 1"),
        (loop(""), "no special token .* is, so a model cannot learn to stop"),
        (loop("{{ raise_exception('never') }}"), "refuses a question with its answer: never"),
        ("{{ messages[1].content }}<|im_end|>", "does not write messages in a loop over them"),
        ("{{ ''.__class__.__mro__ }}" + loop("</s>"), "refuses a question with its answer: .*unsafe"),
        ("{{ messages.append(1) }}" + loop("</s>"), "refuses a question with its answer: .*unsafe"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(plain: ChatTokenizer, source: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        encoder(plain, source)


def test_a_template_that_drops_a_message_is_refused_on_that_conversation(plain: ChatTokenizer) -> None:
    source = (
        "{% for m in messages %}{% if m.content != 'skip' %}{{ m.role + m.content + '</s>' }}{% endif %}{% endfor %}"
    )
    with pytest.raises(Refused, match="writes nothing for message 2"):
        encoder(plain, source).encode(conversation("a", "skip"))


def test_masks_are_ascending_positions_of_whole_tokens(plain: ChatTokenizer) -> None:
    encoded = plain.encode("漢😀 a")
    assert (np.diff(encoded.starts) >= 0).all() and (np.diff(encoded.ends) >= 0).all()
    assert encoded.covering(1, 2) == slice(*np.nonzero(encoded.starts == 1)[0][[0]].tolist(), 
                                           int(np.nonzero(encoded.ends == 2)[0][-1]) + 1)  # fmt: skip
