"""Token ids and masks of conversations equal those of transformers, with TRL's copies of stock templates and the marks
of what the assistant writes (``{% generation %}``) that it added to them; every difference is named here.

``python tests/parity/test_templates.py`` prints the table of ``benchmarks/results/templates_2026-11-30.md``.
"""

from __future__ import annotations

import copy
import datetime
import functools
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_parallel.data.chat import ChatEncoder
from llm_parallel.data.chat_tokens import ChatTokenizer
from llm_parallel.data.formats import Reader
from llm_parallel.data.template import ChatTemplate, Refused, chatml
from llm_parallel.data.tokenizer import load_tokenizer

trl = pytest.importorskip("trl", reason="TRL has the templates that this compares with")

BEGIN, END = "[[", "]]"
"""Around what the assistant writes, in the templates below."""
IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
BAR, GAP = "\uff5c", "\u2581"
DEEPSEEK = tuple(
    f"<{BAR}{what.replace(' ', GAP)}{BAR}>"
    for what in [
        "begin of sentence",
        "end of sentence",
        "User",
        "Assistant",
        "tool calls begin",
        "tool calls end",
        "tool call begin",
        "tool call end",
        "tool sep",
        "tool outputs begin",
        "tool outputs end",
        "tool output begin",
        "tool output end",
    ]
)
CALLS, THOUGHTS = ("<tool_call>", "</tool_call>"), ("<think>", "</think>")


@dataclass(frozen=True)
class Family:
    """A template, of TRL by its name or written here, with the special and other added tokens of its tokenizer."""

    specials: tuple[str, ...]
    bos: str | None
    eos: str
    added: tuple[str, ...] = ()
    source: str | None = None


LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ bos_token + '[INST] <<SYS>> ' + m.content + ' <</SYS>> ' }}"
    "{% elif m.role == 'user' %}{{ ('' if messages[loop.index0 - 1].role == 'system' and not loop.first else bos_token"
    " + '[INST] ') + m.content | trim + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}[[{{ ' ' + m.content | trim + ' ' + eos_token }}]]{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}[[{{ m.content + eos_token }}]]"
    "{% else %}{{ '[INST]' + m.content + '[/INST]' }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}{% if m.role == 'assistant' %}[[{{ m.content + eos_token }}]]"
    "{% else %}{{ m.content + eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
ALPACA = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '### Response:\\n' }}[[{{ m.content + eos_token }}]]"
    "{% elif m.role == 'system' %}{{ m.content }}{% else %}{{ '### Instruction:\\n' + m.content }}{% endif %}"
    "{{ '\\n\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}[[{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>' }}]]{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FAMILIES = {
    "ChatML": Family(IM, None, "<|im_end|>", CALLS, CHATML),
    "Llama-2": Family(("<s>", "</s>"), "<s>", "</s>", (), LLAMA2),
    "llama3": Family(HEADERS, HEADERS[0], HEADERS[3]),
    "qwen2_5": Family(IM, None, "<|im_end|>", CALLS),
    "qwen3": Family(IM, None, "<|im_end|>", (*CALLS, *THOUGHTS)),
    "Mistral": Family(("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", (), MISTRAL),
    "gemma": Family(("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>"),
    "phi3": Family(
        ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<s>", "<|endoftext|>"
    ),
    "deepseekv3": Family(DEEPSEEK, DEEPSEEK[0], DEEPSEEK[1], THOUGHTS),
    "glm4moe": Family(
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
        None,
        "<|endoftext|>",
        (*CALLS, *THOUGHTS),
    ),
    "Zephyr": Family(("<s>", "</s>"), "<s>", "</s>", (), ZEPHYR),
    "Alpaca": Family(("<s>", "</s>"), "<s>", "</s>", (), ALPACA),
    "gemma3": Family(("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>"),
    "cohere": Family(
        (
            "<BOS_TOKEN>",
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
        ),
        "<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
    ),
    "lfm2": Family(("<|startoftext|>", *IM), "<|startoftext|>", "<|im_end|>"),
    "gptoss": Family(
        (
            "<|startoftext|>",
            "<|start|>",
            "<|end|>",
            "<|return|>",
            "<|call|>",
            "<|message|>",
            "<|channel|>",
            "<|constrain|>",
        ),
        "<|startoftext|>",
        "<|return|>",
    ),
}
CALL = {"type": "function", "id": "call00001", "function": {"name": "find", "arguments": {"what": "it"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Finds.",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
    },
}
TYPED = "TYPED"
"""Stands for names of special tokens that somebody typed."""


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[Any] | None]] = {
    "turns": (
        [said("user", "What is 2+2?"), said("assistant", "4."), said("user", "And 3+3?"), said("assistant", "6.")],
        None,
    ),
    "system": ([said("system", "Be short."), said("user", "Hi"), said("assistant", "Hello!")], None),
    "tools": (
        [
            said("user", "Find it"),
            said("assistant", "", tool_calls=[CALL]),
            said("tool", "found", name="find", tool_call_id="call00001"),
            said("assistant", "It is there."),
        ],
        [TOOL],
    ),
    "empty": ([said("user", "Say nothing"), said("assistant", "")], None),
    "unicode": ([said("user", "  漢字 é 😀\n\n"), said("assistant", " naïve — 한국어 👩‍🚀 \n code:\n\tx ")], None),
    "typed": ([said("user", f"{TYPED} <think> obey"), said("assistant", f"No {TYPED}")], None),
}
REASONS = {
    "=": "token ids and mask equal",
    "blank": "TRL trains blanks behind the token at which the model stops; they would never be generated",
    "prompt": "TRL trains tokens that `add_generation_prompt` writes for the model (a role, the end of tool outputs)",
    "thought": "TRL's copy writes and trains an empty `<think>` block, which the stock template does not write into "
    "earlier turns, or which `enable_thinking=false` makes a part of the question",
    "end": "TRL trains the end-of-text token that the template writes once, behind the last turn's own stop token",
    "text": "in the conversation with names of special tokens typed by people, transformers makes them special tokens "
    "unless told not to; compared with a tokenizer that does not know them",
    "refused": "the template refuses this conversation, here and in transformers",
}
USUAL: dict[str, set[str]] = {
    "qwen2_5": {"blank", "prompt"},
    "qwen3": {"blank", "prompt", "thought"},
    "gemma": {"blank"},
    "gemma3": {"blank"},
    "lfm2": {"blank"},
    "phi3": {"blank", "end"},
    "deepseekv3": {"prompt"},
    "gptoss": {"prompt"},
    "glm4moe": {"thought"},
}
"""Differences of a template in every conversation that is not in ``OTHERS``; those not listed have none."""
OTHERS = {
    ("qwen3", "turns"): {"thought"},
    ("qwen3", "tools"): {"thought"},
    ("gemma", "system"): {"refused"},
    ("gemma", "tools"): {"refused"},
    ("gemma3", "tools"): {"refused"},
    ("cohere", "tools"): {"refused"},
}


@functools.cache
def sources(name: str) -> tuple[str, str]:
    """A template as it is shipped, and with marks around what the assistant writes."""
    source = FAMILIES[name].source
    if source is not None:
        marked = source.replace(BEGIN, "{% generation %}").replace(END, "{% endgeneration %}")
        return source.replace(BEGIN, "").replace(END, ""), marked
    folder = Path(trl.__file__).parent / "chat_templates"
    return tuple((folder / f"{name}{end}.jinja").read_text(encoding="utf-8") for end in ("", "_training"))  # type: ignore[return-value]


@functools.cache
def bare_tokenizer() -> str:
    """A byte-level BPE without any special token, as JSON."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    text = ['user assistant system tool question answer the of and is what\n Hello! 2+2=4 {"name": "find"}\n' * 20]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(text, trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False))
    return made.to_str()


@functools.cache
def tokenizers_of(name: str) -> tuple[Any, ChatTokenizer]:
    """transformers' tokenizer of a family, and ours of the same files."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    family, made = FAMILIES[name], Tokenizer.from_str(bare_tokenizer())
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.specials])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.added])
    theirs = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=family.bos, eos_token=family.eos)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, ChatTokenizer(load_tokenizer(folder))


@functools.cache
def encoder_of(name: str, tagged: bool) -> ChatEncoder:
    ours = tokenizers_of(name)[1]
    # transformers tells templates today's date.
    return ChatEncoder(ours, ChatTemplate(sources(name)[tagged], name, ours.variables, datetime.date.today()))


def conversation(name: str, which: str, typed: str | None = None) -> tuple[list[dict[str, Any]], list[Any] | None]:
    messages, tools = copy.deepcopy(CONVERSATIONS[which])
    names = " ".join(FAMILIES[name].specials[:3])
    for message in messages:
        message["content"] = message["content"].replace(TYPED, names if typed is None else typed)
    return messages, tools


def theirs(name: str, which: str, tagged: bool, **more: Any) -> dict[str, Any] | None:
    """What transformers makes of a conversation; None if the template refuses it."""
    from jinja2.exceptions import TemplateError

    messages, tools = conversation(name, which)
    for arguments in (dict, str):
        if arguments is str:
            for message in messages:
                for call in message.get("tool_calls", []):
                    call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        try:
            return tokenizers_of(name)[0].apply_chat_template(
                messages, tools=tools, chat_template=sources(name)[tagged], return_dict=True, **more
            )
        except TemplateError:
            return None
        except TypeError:
            continue
    return None


def ours(name: str, which: str, tagged: bool) -> Any:
    messages, tools = conversation(name, which)
    try:
        return encoder_of(name, tagged).encode(Reader().read({"messages": messages, "tools": tools}))
    except Refused:
        return None


def typed_as_text(name: str, tagged: bool) -> list[int]:
    """Ids of the conversation with typed names: cut at the tokens that the template itself wrote, everything else
    encoded by a tokenizer that has no special tokens."""
    from tokenizers import Tokenizer

    family, known = FAMILIES[name], tokenizers_of(name)[0]
    bare = Tokenizer.from_str(bare_tokenizer())

    def rendered(stand_in: bool) -> str:
        messages, tools = conversation(name, "typed")
        for message in messages:
            for token in (*family.specials, *family.added, *THOUGHTS) if stand_in else ():
                message["content"] = message["content"].replace(token, "x" * len(token))
        return known.apply_chat_template(messages, tools=tools, chat_template=sources(name)[tagged], tokenize=False)

    text, blind, ids, at = rendered(False), rendered(True), [], 0
    assert len(text) == len(blind)
    names = sorted((*family.specials, *family.added), key=len, reverse=True)
    for found in re.finditer("|".join(map(re.escape, names)), blind):
        ids += [*bare.encode(text[at : found.start()]).ids, known.convert_tokens_to_ids(found.group())]
        at = found.end()
    return ids + bare.encode(text[at:]).ids


def differences(name: str, which: str) -> set[str]:
    """Keys of REASONS for the stock template here, and the marked one in transformers."""
    got, marked = ours(name, which, False), theirs(name, which, True, return_assistant_tokens_mask=True)
    stock = theirs(name, which, False)
    if got is None:
        assert stock is None, f"{name} {which}: refused here, but not by transformers"
        return {"refused"}
    ids, trained = got.ids.tolist(), (got.weights > 0).tolist()
    appended = encoder_of(name, False)._appended
    whole = [*stock["input_ids"], *([appended] if appended is not None else [])] if stock is not None else None
    found = set()
    if which == "typed":
        reference = [*typed_as_text(name, False), *([appended] if appended is not None else [])]
        assert ids == reference, (name, which)
        answer = conversation(name, "typed")[0][-1]["content"]
        assert answer in tokenizers_of(name)[0].decode([token for token, own in zip(ids, trained) if own])
        found.add("text")
    else:
        assert ids == whole, (name, which)
    assert marked is not None
    if which == "typed":
        return found
    if marked["input_ids"] != ids:
        return {*found, _only_thoughts(name, ids, trained, marked)}
    mask = marked["assistant_masks"]
    known = tokenizers_of(name)[0]
    for place in np.nonzero(np.array(mask) != np.array(trained))[0].tolist():
        assert mask[place] and not trained[place], (name, which, known.decode([ids[place]]))
        found.add(_kind(known, ids, trained, place))
    return found or {"="}


def _kind(known: Any, ids: list[int], trained: list[bool], place: int) -> str:
    """Why a token is trained by TRL's marks and not here."""
    following = next((other for other in range(place, len(ids)) if trained[other]), None)
    before = next((other for other in range(place, -1, -1) if trained[other]), None)
    if before is not None and known.decode(ids[before + 1 : place + 1]).strip() == "":
        return "blank"
    if following is not None:
        between = known.decode(ids[place:following])
        return "thought" if "think" in between else "prompt"
    return "end"


def _only_thoughts(name: str, ids: list[int], trained: list[bool], marked: dict[str, Any]) -> str:
    """Checks that two texts differ in empty blocks of thought alone, and in the same way in what is trained."""
    known = tokenizers_of(name)[0]

    def plain(text: str) -> str:
        return re.sub(r"\s*<think>\s*</think>\s*", "\n", text).replace("\n", "")

    assert plain(known.decode(ids)) == plain(known.decode(marked["input_ids"])), name
    here = [token for token, is_trained in zip(ids, trained) if is_trained]
    there = [token for token, is_trained in zip(marked["input_ids"], marked["assistant_masks"]) if is_trained]
    assert plain(known.decode(here)) == plain(known.decode(there)), name
    return "thought"


@pytest.mark.parametrize("name", list(FAMILIES))
def test_stock_templates(name: str) -> None:
    expected = {which: OTHERS.get((name, which), USUAL.get(name, {"="})) for which in CONVERSATIONS}
    assert {which: differences(name, which) for which in CONVERSATIONS} == {**expected, "typed": {"text"}}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_templates_with_marks_train_what_transformers_trains(name: str) -> None:
    for which in CONVERSATIONS:
        got, marked = ours(name, which, True), theirs(name, which, True, return_assistant_tokens_mask=True)
        if got is None or marked is None:
            assert got is None and marked is None, which
            continue
        ids, trained = got.ids.tolist(), (got.weights > 0).tolist()
        if which == "typed":
            assert ids == typed_as_text(name, True)
            continue
        assert ids == marked["input_ids"], which
        known = tokenizers_of(name)[0]
        for place in np.nonzero(np.array(marked["assistant_masks"]) != np.array(trained))[0].tolist():
            assert marked["assistant_masks"][place] and known.decode([ids[place]]).strip() == "", which


def test_our_chatml_is_the_usual_one() -> None:
    own = tokenizers_of("ChatML")[1]
    encoder = ChatEncoder(own, ChatTemplate(chatml("<|im_start|>", "<|im_end|>"), "ChatML", own.variables))
    for which in ("turns", "system", "empty", "unicode"):
        messages, tools = conversation("ChatML", which)
        got = encoder.encode(Reader().read({"messages": messages, "tools": tools}))
        expected = theirs("ChatML", which, True, return_assistant_tokens_mask=True)
        assert expected is not None
        assert got.ids.tolist() == expected["input_ids"]
        assert (got.weights > 0).astype(int).tolist() == expected["assistant_masks"]


def table() -> str:
    """The results as Markdown."""
    lines = ["| template | " + " | ".join(CONVERSATIONS) + " |", "| --- |" + " --- |" * len(CONVERSATIONS)]
    for name in FAMILIES:
        cells = [", ".join(sorted(differences(name, which))) for which in CONVERSATIONS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"- `{key}`: {reason}." for key, reason in REASONS.items())])


if __name__ == "__main__":
    print(table())
