"""Preferences by their fields: every form becomes the group that is written down beside it, TRL's functions agree on
prompts and labels, and what is no preference is refused with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_parallel.config.tree_tune import ChatSource, Columns
from llm_parallel.data.dataset_info import open_source
from llm_parallel.data.formats import BadRecord
from llm_parallel.data.groups import FORMS, Answer, Group
from llm_parallel.data.preference import PreferenceReader
from llm_parallel.errors import UserError


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
ASKED, EARLIER = (user("2 and 2?"),), (user("1 and 1?"), said("2"))


def pair(prompt: Any = ASKED, margin: float | None = None, tools: Any = None) -> Group:
    facts = {} if margin is None else {"margin": margin}
    return Group(tuple(prompt), (Answer((said("4"),), 1.0), Answer((said("5"),), 0.0)), tools, True, facts)


def single(score: float, prompt: Any = ASKED) -> Group:
    return Group(tuple(prompt), (Answer((said("4"),), score),), None, True)


def ranked(*scores: float, texts: str = "456", prompt: Any = ASKED) -> Group:
    return Group(tuple(prompt), tuple(Answer((said(t),), s) for t, s in zip(texts, scores)), None, False)


TURNS = [{"from": "human", "value": "2 and 2?"}]
CHOSEN, REJECTED = [user("2 and 2?"), said("4")], [user("2 and 2?"), said("5")]
TALK = "\n\nHuman: 1 and 1?\n\nAssistant: 2\n\nHuman: 2 and 2?\n\nAssistant:"
GIVEN: dict[str, tuple[dict[str, Any], Group, str]] = {
    "texts": ({"prompt": "2 and 2?", "chosen": "4", "rejected": "5"}, pair(), "preference"),
    "messages": ({"prompt": list(ASKED), "chosen": [said("4")], "rejected": [said("5")]}, pair(), "preference"),
    "no prompt": ({"chosen": CHOSEN, "rejected": REJECTED}, pair(), "preference of whole conversations"),
    "system, tools and margin": (
        {"system": "Be brief.", "prompt": "2 and 2?", "chosen": "4", "rejected": "5", "margin": 2,
         "tools": '[{"name": "f"}]'},
        pair((SYSTEM, *ASKED), 2.0, [{"name": "f"}]), "preference",
    ),
    "UltraFeedback, binarized": (
        {"prompt": "2 and 2?", "prompt_id": "x", "chosen": CHOSEN, "rejected": REJECTED, "messages": CHOSEN,
         "score_chosen": 8.0, "score_rejected": 3.5},
        pair(), "preference of whole conversations",
    ),
    "UltraFeedback": (
        {"source": "x", "instruction": "2 and 2?", "completions": [
            {"model": "a", "response": "4", "overall_score": 8.5},
            {"model": "b", "response": "5", "overall_score": 1}]},
        ranked(8.5, 1.0), "answers with scores",
    ),
    "HH-RLHF": (
        {"chosen": TALK + " 4", "rejected": TALK + " 5"},
        pair((*EARLIER, *ASKED)), "transcripts of whole conversations",
    ),
    "HH-RLHF with a prompt": (
        {"prompt": TALK, "chosen": "4", "rejected": "5"}, pair((*EARLIER, *ASKED)), "preference",
    ),
    "LLaMA-Factory, alpaca": (
        {"instruction": "2 and", "input": "2?", "chosen": "4", "rejected": "5", "history": [["1 and 1?", "2"]],
         "system": "Be brief."},
        pair((SYSTEM, *EARLIER, user("2 and\n2?"))), "preference",
    ),
    "LLaMA-Factory, alpaca of old": (
        {"instruction": "2 and 2?", "input": "", "output": ["4", "5"]}, ranked(0.0, -1.0), "answers, the best first",
    ),
    "LLaMA-Factory, sharegpt": (
        {"conversations": TURNS, "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}},
        pair(), "sharegpt preference",
    ),
    "LLaMA-Factory, alpaca with kto_tag": (
        {"instruction": "2 and 2?", "output": "4", "kto_tag": True}, single(1.0), "answers with a label",
    ),
    "LLaMA-Factory, messages with label": (
        {"messages": [*EARLIER, *ASKED, said("4")], "label": False}, single(0.0, (*EARLIER, *ASKED)),
        "answers with a label",
    ),
    "KTO": ({"prompt": "2 and 2?", "completion": "4", "label": "false"}, single(0.0), "answers with a label"),
    "KTO of messages": (
        {"prompt": [SYSTEM, *ASKED], "completion": [said("4")], "label": 1}, single(1.0, (SYSTEM, *ASKED)),
        "answers with a label",
    ),
    "RRHF": (
        {"query": "2 and 2?", "responses": ["4", "5"], "scores": [1, -0.5]}, ranked(1.0, -0.5), "answers with scores",
    ),
    "ranks": (
        {"prompt": "2 and 2?", "responses": ["4", "5", "6"], "ranks": [1, 3, 2]}, ranked(-1.0, -3.0, -2.0),
        "answers with ranks",
    ),
    "arena": (
        {"conversation_a": REJECTED, "conversation_b": CHOSEN, "winner": "model_b"},
        Group(ASKED, (Answer((said("5"),), 0.0), Answer((said("4"),), 1.0)), None, True), "arena",
    ),
    "arena with a tie": (
        {"prompt": "2 and 2?", "response_a": "4", "response_b": "5", "winner": "tie"}, ranked(0.0, 0.0), "arena",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_every_form_is_the_group_that_it_means(name: str) -> None:
    record, expected, shown = GIVEN[name]
    reader = PreferenceReader()
    assert reader.read(record) == expected
    assert reader.found == {shown: 1}


def test_a_prompt_that_ends_with_a_call_is_no_part_of_the_answer() -> None:
    called = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    prompt = [*ASKED, called, {"role": "tool", "content": "4"}]
    found = PreferenceReader().read({"prompt": prompt, "completion": [said("It is 4.")], "label": True})
    assert len(found.prompt) == 3 and found.answers[0].messages == (said("It is 4."),)
    (conversation,) = found.conversations()
    assert conversation.weights == [0.0, 0.0, 0.0, 1.0]


def test_a_tie_is_left_out_and_two_bad_answers_are_not_liked() -> None:
    record = {"prompt": "2 and 2?", "response_a": "4", "response_b": "5", "winner": "tie"}
    tie, bad = (PreferenceReader().read({**record, "winner": winner}) for winner in ("tie", "tie (bothbad)"))
    assert [list(form(tie)) for form in FORMS.values()] == [[], [], [], []]
    assert [one.answers[0].score for one in FORMS["kto"](bad)] == [0.0, 0.0]


def test_columns_and_roles_have_the_names_that_the_run_file_gives() -> None:
    columns = Columns(prompt="ask", chosen="good", rejected="bad", margin="by", role="who", content="what")
    reader = PreferenceReader("auto", columns, {"me": "user", "bot2": "assistant"})
    record = {"ask": [{"who": "me", "what": "2 and 2?"}], "good": {"who": "bot2", "what": "4"}, "bad": "5", "by": 0.5}
    assert reader.read(record) == pair(margin=0.5)
    lists = Columns(responses="options", scores="votes", instruction="q")
    assert PreferenceReader("auto", lists).read({"q": "2 and 2?", "options": ["4", "5"], "votes": [3, 1]}) == ranked(
        3.0, 1.0
    )
    labels = Columns(label="thumb", completion="reply")
    assert PreferenceReader("auto", labels).read({"prompt": "2 and 2?", "reply": "4", "thumb": "no"}) == single(0.0)


BAD = [
    ({"prompt": "a", "chosen": "b"}, "no field 'rejected'"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "all the same"),
    ({"chosen": "b", "rejected": "c"}, "no prompt; give the question"),
    ({"prompt": "", "chosen": "b", "rejected": "c"}, "no prompt"),
    ({"chosen": [said("b")], "rejected": [said("c")]}, "no prompt"),
    ({"prompt": "other", "chosen": CHOSEN, "rejected": REJECTED}, "do not begin"),
    ({"prompt": "a", "chosen": [user("b")], "rejected": "c"}, "without a turn of the assistant"),
    ({"prompt": "2 and 2?", "chosen": CHOSEN, "rejected": "5"}, "one answer that is a whole conversation"),
    ({"prompt": "a", "chosen": [], "rejected": "c"}, "without a turn of the assistant"),
    ({"prompt": "a", "chosen": 3, "rejected": "c"}, "a number"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}, "no prompt"),
    ({"prompt": "a", "completion": "b", "label": 0.5}, "label 0.5"),
    ({"prompt": "a", "completion": "b", "label": "maybe"}, "label 'maybe'"),
    ({"prompt": "a", "label": True}, "no conversation can be made"),
    ({"prompt": "a", "responses": ["b", "c"]}, "neither scores nor ranks"),
    ({"prompt": "a", "responses": ["b", "c"], "scores": [1]}, "one for each"),
    ({"prompt": "a", "responses": ["b", "c"], "scores": [1, None]}, "score None"),
    ({"prompt": "a", "responses": ["b", "c"], "scores": [1, float("nan")]}, "score nan"),
    ({"prompt": "a", "responses": ["b", "c"], "ranks": "1"}, "ranks that are '1'"),
    ({"prompt": "a", "responses": ["b"], "scores": [1]}, "fewer than two"),
    ({"prompt": "a", "responses": "b", "scores": [1]}, "fewer than two"),
    ({"prompt": "a", "responses": [{"text": "b", "score": 1}, {"text": "c"}]}, "without 'score'"),
    ({"prompt": "a", "response_a": "b", "response_b": "c", "winner": "c"}, "winner 'c'"),
    ({"prompt": "a", "response_a": "b", "winner": "a"}, "no field 'response_b'"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "much"}, "margin 'much'"),
    ({"text": "a"}, "no preference can be made"),
    ([1], "no record"),
    (None, "no record"),
]


@pytest.mark.parametrize(("record", "part"), BAD, ids=[part for _, part in BAD])
def test_what_is_no_preference_says_why(record: Any, part: str) -> None:
    reader = PreferenceReader()
    with pytest.raises(BadRecord) as error:
        reader.read(record)
    assert part in str(error.value) and "\n" not in str(error.value)
    assert reader.found == {}


texts = st.text("ab ?", min_size=1, max_size=6).filter(str.strip)


@given(st.lists(texts, min_size=1, max_size=3), st.lists(texts, max_size=2), texts, texts)
def test_prompts_and_labels_are_trls(questions: list[str], replies: list[str], good: str, bad: str) -> None:
    """Of whole conversations, by TRL's own functions; HH-RLHF's transcripts of them are the same."""
    data_utils = pytest.importorskip("trl.data_utils", reason="TRL has the functions that this compares with")
    if good.strip() == bad.strip():
        return
    talk = [user(questions[0])]
    for question, reply in zip(questions[1:], replies):
        talk += [said(reply), user(question)]
    record = {"chosen": [*talk, said(good)], "rejected": [*talk, said(bad)]}
    expected = data_utils.extract_prompt(record)
    found = PreferenceReader().read(record)
    assert list(found.prompt) == expected["prompt"]
    assert [list(one.messages) for one in found.answers] == [expected["chosen"], expected["rejected"]]

    from datasets import Dataset

    unpaired = data_utils.unpair_preference_dataset(Dataset.from_list([expected]))
    singles = [PreferenceReader().read(row) for row in unpaired]
    assert singles == list(FORMS["kto"](found))

    names = {"user": "Human", "assistant": "Assistant"}
    written = {
        key: "".join(f"\n\n{names[one['role']]}: {one['content']}" for one in turns) for key, turns in record.items()
    }
    spoken = PreferenceReader().read(written)
    assert [one["content"] for one in spoken.prompt] == [one["content"].strip() for one in found.prompt]


INFO: dict[str, Any] = {
    "pairs": {"file_name": "a.json", "ranking": True, "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
    "talks": {"file_name": "a.json", "ranking": True, "formatting": "sharegpt",
              "columns": {"messages": "turns", "chosen": "good", "rejected": "bad"},
              "tags": {"user_tag": "me", "assistant_tag": "you"}},
    "tagged": {"file_name": "a.json", "columns": {"prompt": "q", "response": "r", "kto_tag": "ok"}},
}  # fmt: skip
ROWS: dict[str, tuple[Any, Group]] = {
    "pairs": ({"q": "2 and 2?", "good": "4", "bad": "5"}, pair()),
    "talks": ({"turns": [{"from": "me", "value": "2 and 2?"}], "good": {"from": "you", "value": "4"},
               "bad": {"from": "you", "value": "5"}}, pair()),
    "tagged": ({"q": "2 and 2?", "r": "4", "ok": False}, single(0.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", INFO)
def test_data_sets_of_llama_factory(name: str, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))
    record, expected = ROWS[name]
    (tmp_path / "a.json").write_text(json.dumps([record]))
    source = ChatSource(path=str(tmp_path), dataset=name)
    opened = open_source(source, preferences=True)
    assert opened.files == [tmp_path / "a.json"]
    assert PreferenceReader(opened.format, opened.columns, opened.roles).read(record) == expected
    with pytest.raises(UserError, match="for training by preferences"):
        open_source(source)


def test_a_format_that_is_named_is_the_only_one() -> None:
    both = {**GIVEN["texts"][0], "label": True, "completion": "4"}
    assert PreferenceReader("pair").read(both) == PreferenceReader().read(both) == pair()
    assert PreferenceReader("label").read(both) == single(1.0)
    for wanted, missing in (("scores", "responses"), ("arena", "winner")):
        with pytest.raises(BadRecord, match=f"no field '{missing}'"):
            PreferenceReader(wanted).read(both)


def test_columns_of_preferences_are_refused_for_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    source = ChatSource(path=str(tmp_path / "a.jsonl"), columns=Columns(chosen="good"))
    with pytest.raises(UserError, match=r"columns\.chosen .*preferences"):
        open_source(source)
    assert open_source(source, preferences=True).columns.chosen == "good"
    with pytest.raises(UserError, match=r"format of .* is pair, for training by preferences"):
        open_source(ChatSource(path=str(tmp_path / "a.jsonl"), format="pair"))
