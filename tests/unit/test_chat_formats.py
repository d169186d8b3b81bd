"""Records of every dialect become the same conversations, and what is no conversation is said in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_parallel.config.load import load_config
from llm_parallel.config.tree import RunConfig
from llm_parallel.config.tree_tune import ChatSource, Columns
from llm_parallel.data.chat_data import ChatData
from llm_parallel.data.chat_files import prepare_conversations
from llm_parallel.data.dataset_info import open_source
from llm_parallel.data.formats import BadRecord, Conversation, Reader, merged
from llm_parallel.data.tokenizer import train_sentencepiece
from llm_parallel.errors import UserError

ASKED, SAID = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
HUMAN = {"from": "human", "value": "2+2?"}
PARTS = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
RULE = {"role": "system", "content": "Be short."}
CALL = {"name": "add", "arguments": {"a": 2}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
RESULT = {"role": "tool", "content": "4"}


def read(record: Any, **options: Any) -> Conversation:
    return Reader(**options).read(record)


@pytest.mark.parametrize(
    ("record", "messages", "weights"),
    [
        ({"messages": [RULE, ASKED, SAID]}, [RULE, ASKED, SAID], [0, 0, 1]),
        ({"messages": json.dumps([ASKED, SAID])}, [ASKED, SAID], [0, 1]),
        ({"messages": [{**RULE, "role": "developer"}, ASKED, SAID]}, [RULE, ASKED, SAID], [0, 0, 1]),
        (
            {"conversations": [HUMAN, {"from": "gpt", "value": "4"}], "system": "Be short."},
            [RULE, ASKED, SAID],
            [0, 0, 1],
        ),
        (
            {"conversations": [
                HUMAN, {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "4"}, {"from": "gpt", "value": "4"}]},
            [ASKED, CALLED, RESULT, SAID],
            [0, 1, 0, 1],
        ),
        ({"instruction": "2+2?", "output": "4"}, [ASKED, SAID], [0, 1]),
        ({"instruction": "2+2?", "input": "", "output": "4", "system": "Be short."}, [RULE, ASKED, SAID], [0, 0, 1]),
        (
            {"instruction": "Add", "input": "2+2", "output": "4", "history": [["2+2?", "4"]]},
            [ASKED, SAID, {"role": "user", "content": "Add\n2+2"}, SAID],
            [0, 1, 0, 1],
        ),
        ({"prompt": "2+2?", "completion": "4"}, [ASKED, SAID], [0, 1]),
        ({"question": "2+2?", "answer": "4"}, [ASKED, SAID], [0, 1]),
        (
            {"instruction": "Add", "context": "2+2", "response": "4"},
            [{"role": "user", "content": "Add\n2+2"}, SAID],
            [0, 1],
        ),
        (
            {"prompt": [RULE, ASKED, SAID, ASKED], "completion": [SAID]},
            [RULE, ASKED, SAID, ASKED, SAID],
            [0, 0, 0, 0, 1],
        ),
        ({"prompt": json.dumps([ASKED]), "completion": json.dumps([SAID])}, [ASKED, SAID], [0, 1]),
        ({"prompt": "[1, 2]", "completion": '["3"]'},
         [{"role": "user", "content": "[1, 2]"}, {"role": "assistant", "content": '["3"]'}], [0, 1]),
        ({"messages": [ASKED, {**SAID, "weight": 0.5}, ASKED, {**SAID, "train": False}]},
         [ASKED, SAID, ASKED, SAID], [0, 0.5, 0, 0]),
        (
            {"messages": [{"role": "user", "content": PARTS}, SAID]},
            [ASKED, SAID],
            [0, 1],
        ),
        ({"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [
            {"function": {"name": "add", "arguments": '{"a": 2}'}}]}, RESULT, SAID]},
         [ASKED, CALLED, RESULT, SAID], [0, 1, 0, 1]),
    ],
)  # fmt: skip
def test_dialects(record: Any, messages: list[Any], weights: list[float]) -> None:
    found = read(record)
    assert found.messages == messages and found.weights == weights


def test_other_names_of_fields() -> None:
    columns = Columns(messages="dialog", role="speaker", content="line", system="rule")
    record = {"dialog": [{"speaker": "user", "line": "2+2?"}, {"speaker": "bot", "line": "4"}], "rule": "Be short."}
    assert read(record, columns=columns).messages == [RULE, ASKED, SAID]
    columns = Columns(instruction="question", output="answer")
    assert read({"question": "2+2?", "answer": "4"}, columns=columns).messages == [ASKED, SAID]


@pytest.mark.parametrize("text", ["[1, 2, 3]: sort it", "[INST] hi", '["a"]', "[]", "[" * 5000])
def test_a_prompt_that_begins_with_a_bracket_is_a_text(text: str) -> None:
    assert Reader().prompt({"prompt": text}).messages == [{"role": "user", "content": text}]
    assert Reader().prompt({"prompt": json.dumps([RULE, ASKED])}).messages == [RULE, ASKED]


def test_only_texts_of_one_role_and_weight_are_joined() -> None:
    turns = [ASKED, ASKED, SAID, {**SAID, "train": False}, CALLED, RESULT, RESULT, SAID, SAID]
    joined = merged(read({"messages": turns}))
    assert [message["role"] for message in joined.messages] == [
        "user", "assistant", "assistant", "assistant", "tool", "tool", "assistant"
    ]  # fmt: skip
    assert joined.messages[0]["content"] == "2+2?\n\n2+2?" and joined.weights == [0, 1, 0, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (["a"], "is a list where a record with named fields is expected"),
        ({}, "has the fields , of which no conversation can be made"),
        ({"text": "a"}, "has the fields 'text', of which no conversation can be made; known are"),
        ({"messages": []}, "holds no messages"),
        ({"messages": {"role": "user"}}, "has an object in 'messages' where a list is expected"),
        ({"messages": "[{"}, "holds a list of turns as text that is not JSON"),
        ({"messages": ["a"]}, "has a turn 1 that is text where fields such as 'role' are expected"),
        ({"messages": [{"content": "a"}]}, "has a turn 1 with no 'role' or 'from'; known roles are"),
        ({"messages": [ASKED, {"role": "robot", "content": "a"}]}, "has a turn 2 with the role 'robot'; known roles"),
        ({"messages": [ASKED, {"role": "assistant"}]}, "has a turn 2 of the role 'assistant' without 'content' or"),
        ({"messages": [ASKED, ASKED]}, "has no turn of the assistant"),
        ({"messages": [ASKED, {**SAID, "weight": -1}]}, "has a turn 2 of weight -1; a weight is 0, or from 1e-06 to"),
        ({"messages": [ASKED, {**SAID, "weight": 1e39}]}, "has a turn 2 of weight 1e+39; a weight is 0, or from"),
        ({"messages": [ASKED, {**SAID, "weight": 1e-60}]}, "has a turn 2 of weight 1e-60; a weight is 0, or from"),
        (
            {"messages": [ASKED, {**SAID, "train_detail": [{"begin_offset": 0, "train": False}]}]},
            "only whole turns can",
        ),
        ({"messages": [ASKED, {**SAID, "weight": "much"}]}, "has a turn 2 of weight 'much'"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "a"}]}, SAID]}, "content of type 'image'"),
        ({"messages": [{"role": "user", "content": 7}, SAID]}, "has a turn 1 with a content of type 'a number'"),
        (
            {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"function": {}}]}]},
            "a tool call that has no 'name'",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "add(2)"}]},
            "the function call of turn 1 as text that is",
        ),
        ({"messages": [ASKED, SAID], "tools": "[{"}, "holds 'tools' as text that is not JSON"),
        ({"messages": [ASKED, SAID], "tools": {"a": 1}}, "has an object in 'tools' where a list is expected"),
        ({"instruction": "a", "output": 7}, "has a number in 'output' where text is expected"),
        ({"instruction": "", "input": "", "output": "a"}, "has an empty 'instruction' and no 'input'"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "'history' that is not a list of pairs"),
        ({"prompt": "a", "completion": {}}, "has an object in 'completion' where a list is expected"),
    ],
)
def test_what_is_no_conversation(record: Any, said: str) -> None:
    with pytest.raises(BadRecord) as error:
        read(record)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_given_format_demands_its_fields() -> None:
    with pytest.raises(BadRecord, match="has no field 'instruction'; its fields are 'messages'"):
        read({"messages": [ASKED, SAID]}, wanted="alpaca")


INFO: dict[str, Any] = {
    "plain": {"file_name": "alpaca.json", "columns": {"prompt": "q", "query": None, "response": "a"}},
    "turns": {
        "file_name": "turns.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "talk"},
        "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "it"},
        "split": "train",
    },
    "openai": {"file_name": "openai.jsonl", "formatting": "openai", "columns": {"messages": "messages"}},
    "hub": {"hf_hub_url": "someone/something"},
    "pairs": {"file_name": "alpaca.json", "ranking": True},
    "pictures": {"file_name": "alpaca.json", "columns": {"images": "images"}},
    "misspelt": {"file_name": "alpaca.json", "formating": "sharegpt"},
    "strange": {"file_name": "alpaca.json", "formatting": "xml"},
    "outside": {"file_name": "../alpaca.json"},
    "missing": {"file_name": "none.json"},
    "some": {"file_name": "alpaca.json", "num_samples": 0},
    "tagged": {"file_name": "alpaca.json", "tags": {"robot_tag": "r"}},
}


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))
    (tmp_path / "alpaca.json").write_text(json.dumps([{"q": "2+2?", "a": "4"}]))
    turns = [{"who": "me", "what": "2+2?"}, {"who": "it", "what": "4"}]
    (tmp_path / "turns.jsonl").write_text(json.dumps({"talk": turns}))
    (tmp_path / "openai.jsonl").write_text(json.dumps({"messages": [ASKED, SAID]}))
    return tmp_path


@pytest.mark.parametrize("name", ["plain", "turns", "openai"])
def test_data_sets_of_llama_factory(factory: Path, name: str) -> None:
    opened = open_source(ChatSource(path=str(factory), dataset=name))
    record = json.loads(opened.files[0].read_text())
    reader = Reader(opened.format, opened.columns, opened.roles)
    assert reader.read(record[0] if isinstance(record, list) else record).messages == [ASKED, SAID]
    assert [("split" in text) for text in opened.notices] == [True] * (name == "turns")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("plane", "has no data set 'plane'; did you mean 'plain'"),
        ("hub", "hf_hub_url and no file_name; download it and give"),
        ("pairs", "ranking, for training by preferences: `llm-parallel prefer` with method.kind=dpo"),
        ("pictures", "the column 'images': only text can be trained on"),
        ("misspelt", "the unknown key 'formating'; did you mean 'formatting'"),
        ("strange", "the formatting 'xml'; known are"),
        ("outside", "which lies outside its folder"),
        ("missing", "none.json does not exist"),
        ("some", "num_samples 0; give a whole number over 0"),
        ("tagged", "the unknown tag 'robot_tag'"),
    ],
)
def test_data_sets_that_cannot_be_used(factory: Path, name: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        open_source(ChatSource(path=str(factory), dataset=name))
    assert said in str(error.value)


def test_of_a_saved_data_set_its_records_are_read_and_of_splits_one_is_chosen(tmp_path: Path) -> None:
    """As ``save_to_disk`` of datasets 4 leaves folders; a cache of ``map`` holds the same records again."""
    for split in ("train", "test"):
        folder = tmp_path / "saved" / split
        folder.mkdir(parents=True)
        for name in ("data-00000-of-00001.arrow", "cache-0123456789abcdef.arrow"):
            (folder / name).write_bytes(b"")
        (folder / "dataset_info.json").write_text('{"features": {}}')
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "1", "_split": split}
        (folder / "state.json").write_text(json.dumps(state, indent=2))
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    found = open_source(ChatSource(path=str(tmp_path / "saved" / "train"))).files
    assert found == [tmp_path / "saved" / "train" / "data-00000-of-00001.arrow"]
    with pytest.raises(UserError, match="saved holds the splits test, train, some"):
        open_source(ChatSource(path=str(tmp_path)))


def test_a_folder_stands_for_its_files_and_not_for_dataset_info(factory: Path) -> None:
    found = open_source(ChatSource(path=str(factory))).files
    assert [path.name for path in found] == ["alpaca.json", "openai.jsonl", "turns.jsonl"]
    with pytest.raises(UserError, match=r"dataset is 'a', but .*dataset_info\.json does not exist"):
        open_source(ChatSource(path=str(factory / "alpaca.json"), dataset="a"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = "the sum of two and three is five while a question has an answer\n" * 40
    return train_sentencepiece([text, "user\nassistant\nsystem\n2+2?4"], 320, tmp_path_factory.mktemp("tok"))


def prepared(folder: Path, tokenizer: Path, source: Path | str, told: list[str] | None = None, **chat: Any) -> ChatData:
    config = RunConfig(
        run_dir=str(folder / "run"),
        data={"tokenizer": str(tokenizer), "seq_length_tokens": 64},
        chat={"train": [{"path": str(source)}], "eval_fraction": 0.0, **chat},
    )
    return prepare_conversations(config, (told if told is not None else []).append)


def test_every_container_has_the_same_conversations(tmp_path: Path, tokenizer: Path) -> None:
    import gzip

    import zstandard

    rows = [{"messages": [ASKED, {**SAID, "content": str(n)}]} for n in range(5)]
    lines = "\n".join(map(json.dumps, rows)).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "d.json").write_text(json.dumps(rows))
    names = ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.json"]
    try:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "e.parquet")
        names.append("e.parquet")
    except ImportError:  # pyarrow is an optional package
        pass
    found = [prepared(tmp_path, tokenizer, tmp_path / name) for name in names]
    for data in found:
        assert [data.conversation(n)[0].tolist() for n in range(5)] == [
            found[0].conversation(n)[0].tolist() for n in range(5)
        ]


def test_a_row_that_the_template_refuses_is_named(tmp_path: Path, tokenizer: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ bos_token + m.content + eos_token }}{% endfor %}"
    )
    rows = [{"messages": [ASKED, SAID]}, {"messages": [RULE, ASKED, SAID]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"refuses .*a\.jsonl line 2: no system here; mend or remove that record"):
        prepared(tmp_path, tokenizer, tmp_path / "a.jsonl", template=str(template))


def test_marks_that_leave_the_stop_out_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ bos_token }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '!' + eos_token }}{% endfor %}"
    )
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [ASKED, SAID]}))
    with pytest.raises(UserError, match=r"a\.jsonl line 1 ends with '4' .* which does not stop the model: </s> does"):
        prepared(tmp_path, tokenizer, tmp_path / "a.jsonl", template=str(template))


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        ({"template": "none.jinja"}, r"chat\.template = none\.jinja cannot be read: No such file"),
        ({"date": "yesterday"}, r"chat\.date = 'yesterday' is no date; give one such as 2026-01-31"),
        ({"train": []}, r"chat\.train is empty"),
        ({"train": [{"path": "none.jsonl"}]}, r"none\.jsonl does not exist; give a file of conversations"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path: Path, tokenizer: Path, chat: dict[str, Any], said: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [ASKED, SAID]}))
    with pytest.raises(UserError, match=said):
        prepared(tmp_path, tokenizer, tmp_path / "a.jsonl", **chat)


def test_a_date_of_yaml_is_a_date(tmp_path: Path) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text("chat: {date: 2026-01-31}\n")
    assert load_config(str(run_file), []).chat.date == "2026-01-31"
    assert load_config(str(run_file), ["chat.date=2025-02-03"]).chat.date == "2025-02-03"
