"""What users of LLaMA-Factory and of Megatron-LM bring: run files, names of commands, data, folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_parallel.command_help import COMMANDS
from llm_parallel.config.foreign_more import TEMPLATES
from llm_parallel.config.load import load_config
from llm_parallel.config.rules import check_inputs
from llm_parallel.config.tree import RunConfig
from llm_parallel.config.tree_tune import ChatConfig, ChatSource, Columns
from llm_parallel.data.chat_counts import records_of
from llm_parallel.data.chat_files import opened_sources
from llm_parallel.data.foreign_options import translated
from llm_parallel.data.formats import BadRecord, Reader
from llm_parallel.data.preference import PreferenceReader
from llm_parallel.data.prompts import PromptReader
from llm_parallel.data.readers import Problems, first_rows
from llm_parallel.errors import UserError
from llm_parallel.help_page import ELSEWHERE
from llm_parallel.model.hf_files import what_it_is
from llm_parallel.train.preflight import with_reported_tokenizer
from tests.support.data_helpers import write_token_file
from tests.support.in_process import in_process

ASKED, SAID = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}


def loaded(*overrides: str, file: Path | None = None) -> tuple[RunConfig, str]:
    notices: list[str] = []
    config = load_config(file, overrides, notice=notices.append)
    return config, "\n".join(notices)


def refusal(*overrides: str) -> list[str]:
    with pytest.raises(UserError) as raised:
        load_config(None, overrides, notice=lambda _: None)
    return str(raised.value).splitlines()


# Run files


@pytest.mark.parametrize(("stage", "kind"), [("dpo", "dpo"), ("kto", "kto"), ("rm", "reward"), ("ppo", "ppo")])
def test_a_stage_is_the_method(stage: str, kind: str) -> None:
    assert loaded(f"stage={stage}")[0].method.kind == kind


def test_a_file_of_preferences(tmp_path: Path) -> None:
    path = tmp_path / "dpo.yaml"
    path.write_text(
        "model_name_or_path: base\nstage: dpo\ndo_train: true\nfinetuning_type: lora\nlora_rank: 8\npref_beta: 0.2\n"
        "pref_loss: simpo\nsimpo_gamma: 0.7\npref_ftx: 0.5\ndataset: pairs\ntemplate: qwen3_nothink\nmax_samples: 100\n"
        "output_dir: saves/x\noverwrite_output_dir: true\nper_device_train_batch_size: 1\nlearning_rate: 5.0e-6\n"
        "deepspeed: ds_z2.json\nref_model: other\n"
    )
    config, said = loaded(file=path)
    dpo = config.method.dpo
    assert (config.method.kind, dpo.beta, dpo.loss, dpo.gamma, dpo.sft_weight) == ("dpo", 0.2, "simpo", 0.7, 0.5)
    assert (config.chat.max_records, config.chat.template, config.method.reference.load) == (100, None, "other")
    assert config.optim.min_lr == 5e-7
    assert "optim.min_lr = 5e-07: a tenth of optim.lr = 5e-06, which is below the default, 3e-05" in said
    assert "optim.min_lr=3e-05" not in said
    for name in ("template", "overwrite_output_dir", "deepspeed"):
        assert f"{name} is left out: " in said


def test_one_name_is_the_strength_of_either_method() -> None:
    config, _ = loaded("stage=kto", "pref_beta=0.3", "kto_chosen_weight=2")
    assert (config.method.kto.beta, config.method.kto.desirable_weight, config.method.dpo.beta) == (0.3, 2.0, 0.1)


def test_defaults_that_are_others_elsewhere_are_said() -> None:
    names = ("per_device_train_batch_size=1", "lora_rank=8", "weight_decay=0.5")
    _, said = loaded(*names)
    assert (
        "Hugging Face's trainers: optim.beta2=0.95 (there 0.999), optim.min_lr=3e-05 (there 0), adapter.alpha=32"
        in said
    )
    assert "weight_decay=0.1" not in said and "chat.packing" not in said
    _, said = loaded(
        "--train-iters", "5", "--hidden-size", "64", "--num-attention-heads", "4", "--lr-decay-style=linear"
    )
    assert "model.num_query_groups=4 (there as many as heads), model.ffn_hidden_size=704 (there" in said
    assert "optim.schedule" not in said.rpartition("defaults that differ")[2]
    assert "defaults that differ" not in loaded("train.steps=5", "model.hidden_size=64")[1]


@pytest.mark.parametrize("given", [["optim.lr=1e-6", "optim.min_lr=0"], ["optim.lr=1e-3"], ["optim.min_lr=1e-5"]])
def test_the_end_of_the_schedule_follows_only_where_it_must(given: list[str]) -> None:
    config, said = loaded(*given)
    assert config.optim.min_lr == next((float(one[13:]) for one in given if "min_lr" in one), 3e-5)
    assert "a tenth of" not in said


def test_everything_that_is_wrong_about_a_command_line_is_said_at_once() -> None:
    lines = refusal("--mock-data", "--apply-layernorm-1p", "--train-iters", "--manual-gc", "--squared-relu", "--blub")
    assert len(lines) == 5
    for name in ("mock_data = true", "apply_layernorm_1p", "--train-iters", "squared_relu", "blub"):
        assert any(name in line for line in lines), name


def test_samples_become_steps() -> None:
    given = ("global_batch_size=8", "train_samples=800", "lr_warmup_samples=20", "lr_decay_samples=400")
    config, _ = loaded(*given)
    assert (config.train.steps, config.optim.warmup_steps, config.optim.decay_steps) == (100, 3, 50)


def test_a_model_by_its_name_alone_is_what_training_begins_with() -> None:
    assert loaded("model=models/Qwen3-4B")[0].checkpoint.load == "models/Qwen3-4B"


def test_interpolated_positions() -> None:
    scaling = loaded("--rotary-seq-len-interpolation-factor", "4")[0].model.rope_scaling
    assert scaling is not None and (scaling.kind, scaling.factor) == ("linear", 4.0)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_that_tokenizers_bring_are_left_out(name: str) -> None:
    config, said = loaded(f"template={name}")
    assert config.chat.template is None and "the tokenizer's own chat template" in said


def test_an_empty_file_before_arguments_is_offered(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="an empty file will do"):
        load_config("--num-layers", ["2"])
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml", ["--num-layers", "2"], lambda _: None).model.num_layers == 2


# Commands


@pytest.mark.parametrize(
    "name", ["train", "export", "webchat", "merge-lora", "preprocess_data.py", "tools/preprocess_data.py"]
)
def test_commands_of_other_systems_are_answered(name: str) -> None:
    done = in_process(name, "x.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {name} is no command here: ") and "`llm-parallel " in done.stderr


def test_no_command_of_ours_is_answered_as_anothers() -> None:
    assert not set(ELSEWHERE) & {name.split()[0] for name in COMMANDS}


def test_a_run_file_where_a_model_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "chat.yaml"
    path.write_text("model_name_or_path: models/base\ntemplate: qwen\n")
    assert (
        what_it_is(path)
        == f"{path} is a run file; give the folder of a model, such as models/base, its model_name_or_path"
    )
    path.write_text("run_dir: runs/x\nmodel_name_or_path: models/base\n")
    assert "such as runs/x, its run_dir" in str(what_it_is(path))
    for text in ("[]", "a: [", "x: 1"):
        path.write_text(text)
        assert what_it_is(path) == f"{path} is a run file; give the folder of a model"


# Data


def test_the_first_records_of_a_source(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text('{"n": 0}\nbroken\n{"n": 2}\n')
    two.write_text('{"n": 3}\nbroken\n{"n": 5}\n')
    for limit, kept, broken in (
        (None, [0, 2, 3, 5], 2),
        (1, [0], 0),
        (2, [0], 1),
        (4, [0, 2, 3], 1),
        (9, [0, 2, 3, 5], 2),
    ):
        problems = Problems()
        assert [row.value["n"] for row in first_rows([one, two], problems, limit)] == kept, limit
        assert problems.count == broken, limit


def test_limits_of_a_run_file_and_of_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "a", "output": "b"}] * 9))
    info = {"all": {"file_name": "a.json"}, "some": {"file_name": "a.json", "num_samples": 4}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    sources = tuple(ChatSource(path=str(tmp_path), dataset=name) for name in info)
    assert [one.limit for one in opened_sources(ChatConfig(train=sources))] == [None, 4]
    limited = opened_sources(ChatConfig(train=sources, max_records=6))
    assert [one.limit for one in limited] == [6, 4]
    assert "num_samples: of its records the first 4 are used" in limited[1].notices[0]
    counts = {"records": 4, "formats": {"alpaca": 4}}
    assert records_of({"counts": [counts], "limits": [4]}, 0) == "the first 4 records (4 as alpaca)"
    assert records_of({"counts": [counts]}, 0) == "4 records (4 as alpaca)"


@pytest.mark.parametrize("field", ["image", "images", "video", "videos", "audio", "audios"])
def test_records_of_more_than_text_are_left_out(field: str) -> None:
    record = {"messages": [ASKED, SAID], "chosen": "4", "rejected": "5", "prompt": "2+2?", field: ["1.jpg"]}
    for reader in (Reader(), PreferenceReader(), PromptReader()):
        with pytest.raises(BadRecord, match=f"has '{field}', and only text can be trained on"):
            reader.read(record)
        reader.read({**record, field: []})


def test_what_a_table_holds_as_json_is_read_by_every_reader() -> None:
    """A list of turns, or of tools, as text: the same as the list; a text that only begins like one stays text."""
    tools = [{"type": "function", "function": {"name": "add"}}]
    record = {"prompt": json.dumps([ASKED]), "tools": json.dumps(tools)}
    reader = PromptReader()
    assert reader.read(record) == [ASKED] and reader.tools(record) == tools
    assert reader.read({"prompt": "[2+2]?"}) == [{"role": "user", "content": "[2+2]?"}]
    pair = PreferenceReader().read({**record, "chosen": json.dumps([SAID]), "rejected": "[5]"})
    assert pair.prompt == (ASKED,) and pair.tools == tools
    assert [list(answer.messages) for answer in pair.answers] == [[SAID], [{"role": "assistant", "content": "[5]"}]]


def test_pairs_are_not_fine_tuned_on_without_their_answers() -> None:
    asked: dict[str, Any] = {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]}
    asked["conversations"].append({"from": "human", "value": "2+2?"})
    answers = {"chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}}
    for record in ({**asked, **answers}, {"prompt": "2+2?", "chosen": "4", "rejected": "5"}):
        with pytest.raises(BadRecord, match=r"`llm-parallel prefer` with method\.kind=dpo learns from pairs"):
            Reader().read(record)
    assert Reader().read({"messages": [ASKED, SAID], "chosen": [SAID], "rejected": [SAID]}).messages == [ASKED, SAID]


def test_contents_of_typed_parts_with_weights() -> None:
    parts = [{"type": "text", "value": "2+"}, {"type": "text", "text": "2?"}]
    turns = [{"role": "user", "content": parts}, {**SAID, "loss_weight": 0.0}, ASKED, {**SAID, "loss_weight": 0.5}]
    read = Reader().read({"messages": turns})
    assert read.messages[0] == ASKED and read.weights == [0.0, 0.0, 0.0, 0.5]
    pair = {"chosen_messages": [ASKED, SAID], "rejected_messages": [ASKED, {**SAID, "content": "5"}]}
    assert len(PreferenceReader("auto", Columns()).read(pair).answers) == 2


def test_options_of_preprocessing_that_search_for_workers() -> None:
    said: list[str] = []
    given = "--input a.jsonl --find-optimal-num-workers --workers-to-check 4 8 16 --max-documents 50 --use-gigatoken b"
    assert translated(given.split(), said.append) == ["a.jsonl", "b"]
    assert sum("is left out: " in text for text in said) == 4


def test_token_files_by_the_name_that_preprocessing_would_give_them(tmp_path: Path) -> None:
    for ending in (".bin", ".idx"):
        (tmp_path / f"corpus{ending}").write_bytes(b"")
    with pytest.raises(UserError, match=r"of a \.bin/\.idx pair, such as .*/corpus"):
        check_inputs(RunConfig.model_validate({"data": {"train": [{"path": str(tmp_path / "corpus_text")}]}}))


def test_the_tokenizer_of_token_files_is_found_by_their_report(tmp_path: Path) -> None:
    write_token_file(tmp_path / "a", [[1, 2, 3]])
    config = RunConfig.model_validate({"data": {"train": [{"path": str(tmp_path / "a")}]}})
    said: list[str] = []
    assert with_reported_tokenizer(config, said.append) is config
    report = {"tokens": 3, "tokenizer": str(tmp_path), "tokenizer_fingerprint": "x", "vocab_size": 9}
    (tmp_path / "a.report.json").write_text(json.dumps(report))
    assert with_reported_tokenizer(config, said.append).data.tokenizer == str(tmp_path)
    assert said == [f"data.tokenizer = {tmp_path}, with which {tmp_path / 'a'} was prepared"]
    sized = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 9})})
    assert with_reported_tokenizer(sized, said.append) is sized


# Mistakes of anyone


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("generate", "Qwen/Qwen3-4B", "--prompt", "x"), "models are not downloaded"),
        (("evaluate", "{}", "--tasks", "boolq"), "holds no checkpoint; give a run folder"),
        (("sft", "{}"), "is a folder; give the path of a YAML file"),
        (("generate", "{}", "--input", "{}/zero.jsonl", "--output", "{}/out.jsonl"), "holds no prompts"),
        (("convert", "{}", "{}/"), "is source and target; give another folder"),
    ],
)
def test_mistakes_are_answered_before_anything_is_done(tmp_path: Path, command: tuple[str, ...], said: str) -> None:
    if command[0] == "evaluate":
        pytest.importorskip("lm_eval")
    (tmp_path / "zero.jsonl").write_text("\n")
    done = in_process(*(part.format(tmp_path) for part in command))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["zero.jsonl"]
