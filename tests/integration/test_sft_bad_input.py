"""What a user of fine-tuning can get wrong: one sentence that names it and status 2, or, where the rest can be used, a
notice with a count."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_sft import write_run
from tests.support import four_digits
from tests.support.commands import train_in_ranks
from tests.support.harness import run_ranks
from tests.support.in_process import in_process

pytestmark = pytest.mark.gloo

Q, A = ("user", "12+3"), ("assistant", "4")
Overrides = Callable[[Path], list[str]]


def record(*turns: tuple[str, str], **more: Any) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns], **more})


def data(*rows: str, split: str = "train") -> Overrides:
    """A file of these lines as only source."""

    def write(folder: Path) -> list[str]:
        (folder / "rows.jsonl").write_text("".join(f"{row}\n" for row in rows))
        return [f"chat.{split}=[{folder / 'rows.jsonl'}]"]

    return write


def template(source: str) -> Overrides:
    def write(folder: Path) -> list[str]:
        (folder / "own.jinja").write_text(source)
        return [f"chat.template={folder / 'own.jinja'}"]

    return write


def given(*overrides: str) -> Overrides:
    """Settings in which FOLDER is the folder of the run file."""
    return lambda folder: [one.replace("FOLDER", str(folder)) for one in overrides]


def without_specials(folder: Path) -> list[str]:
    shutil.copytree(folder / "tokenizer", folder / "plain")
    tree = json.loads((folder / "plain" / "tokenizer.json").read_text())
    (folder / "plain" / "tokenizer.json").write_text(json.dumps({**tree, "added_tokens": []}))
    return [f"data.tokenizer={folder / 'plain'}"]


def splits(folder: Path) -> list[str]:
    (folder / "set" / "train").mkdir(parents=True)
    (folder / "set" / "train" / "state.json").write_text("{}")
    (folder / "set" / "dataset_dict.json").write_text("{}")
    return [f"chat.train=[{folder / 'set'}]"]


LOOP = "{% for m in messages %}"
BAD: dict[str, tuple[Overrides, tuple[str, ...]]] = {
    # conversations
    "broken rows alone": (data("{oops"), ("chat.train.0.path", "none of its 1 records", "line 1 is not JSON")),
    "an unknown role": (data(record(("narrator", "1"), A)), ("turn 1", "narrator", "known roles are user or human")),
    "no turn of the assistant": (data(record(Q)), ("line 1", "no turn of the assistant")),
    "system messages alone": (data(record(("system", "1"))), ("line 1", "no turn of the assistant")),
    "no answer that is trained": (
        data(json.dumps({"messages": [{"role": "assistant", "content": "1", "weight": 0}]})),
        ("1 have no answer of the assistant that is trained",),
    ),
    "fields of no format": (data('{"text": "1"}'), ("the fields 'text'", "`columns` of the source")),
    "a given format that it is not": (
        given("chat.train=[{path: FOLDER/train.jsonl, format: alpaca}]"), ("no field 'instruction'", "'messages'")
    ),
    "an empty file": (data(), ("rows.jsonl", "empty")),
    "an empty held-out file": (data(split="eval"), ("rows.jsonl", "empty")),
    "a file that is not there": (given("chat.train=[FOLDER/gone.jsonl]"), ("chat.train.0.path", "does not exist")),
    "several splits of a saved data set": (splits, ("holds the splits train", "give the folder of one")),
    "a data set that is not declared": (given("chat.train=[{path: FOLDER, dataset: x}]"), ("dataset_info.json", "'x'")),
    "columns the wrong way round": (
        given("chat.train=[{path: FOLDER/train.jsonl, columns: {q: prompt}}]"),
        ("unknown key chat.train.0.columns.q", "llm-parallel fields chat.train.N.columns"),
    ),
    "a weight of 0": (given("chat.train=[{path: FOLDER/train.jsonl, weight: 0}]"), ("chat.train.0.weight = 0",)),
    "a weight of too many": (
        given("chat.train=[{path: FOLDER/train.jsonl, weight: 1e9}]"), ("chat.train.N.weight", "an epoch see 3.9e+10"),
    ),
    "a field twice": (
        data('{"messages": [], "messages": [{"role": "user", "content": "1"}]}'), ("line 1", "'messages' twice"),
    ),
    "all held out": (
        lambda folder: [*data(record(Q, A))(folder), "chat.eval_fraction=0.9"],
        ("chat.eval_fraction = 0.9 holds all conversations out",),
    ),
    "nothing that fits": (
        given("data.seq_length_tokens=3", "chat.too_long=drop"), ("40 do not fit data.seq_length_tokens = 3",)
    ),
    "samples of one token": (given("data.seq_length_tokens=1"), ("40 do not fit data.seq_length_tokens = 1",)),
    "samples longer than the context": (
        given("data.seq_length_tokens=512"), ("data.seq_length_tokens = 512", "model.max_seq_length_tokens = 256")
    ),
    "token files and conversations": (given("data.train=[tokens]"), ("data.train", "`llm-parallel pretrain`")),
    # templates and tokenizers
    "a template that is not there": (given("chat.template=gone.jinja"), ("chat.template = gone.jinja cannot be read",)),
    "a template that is not Jinja": (template(LOOP), ("own.jinja is no Jinja template", "line 1")),
    "a template that refuses everything": (
        template(LOOP + "{{ raise_exception('only tools') }}{% endfor %}"), ("refuses a question", "only tools")
    ),
    "a template that refuses a record": (
        template(LOOP + "{% if '7' in m.content %}{{ raise_exception('no 7') }}{% endif %}"
                 "{{ m.role + m.content }}<|im_end|>{% endfor %}"),
        ("refuses", "train.jsonl line", "no 7"),
    ),
    "a template without a stop": (template(LOOP + "{{ m.role + m.content }}+{% endfor %}"), ("cannot learn to stop",)),
    "a template without a loop": (template("{{ messages[0].content }}"), ("own.jinja", "{% generation %}")),
    "a tokenizer without special tokens": (without_specials, ("no special token that could end an answer",)),
    "no tokenizer": (given("data.tokenizer=null"), ("data.tokenizer is not given",)),
    "a vocabulary that is too small": (given("model.vocab_size=8"), ("model.vocab_size=8", "16 tokens")),
    "a date that is none": (given("chat.date=yesterday"), ("chat.date = 'yesterday'", "2026-01-31")),
    # the run
    "no epochs": (given("train.epochs=0"), ("train.epochs = 0 must be a number over 0",)),
    "a negative learning rate": (given("optim.lr=-1"), ("optim.lr = -1 must be a number over 0",)),
    "a method that there is not": (given("method.kind=nonsense"), ("method.kind", "nonsense", "pretrain, sft")),
    "the method of another command": (given("method.kind=pretrain"), ("method.kind = pretrain", "`llm-parallel sft`")),
    "packing of another name": (given("chat.packing=neat"), ("chat.packing", "best_fit, pad")),
    "evaluations of nothing": (
        given("chat.eval_fraction=0", "train.eval_interval_steps=2"), ("chat.eval is empty and chat.eval_fraction = 0",)
    ),
    "an early stop by less than one": (
        given("chat.eval_fraction=0.001", "train.eval_interval_steps=2", "train.early_stop_evaluations=2"),
        ("chat.eval_fraction = 0.001", "train.early_stop_evaluations = 2 needs evaluations"),
    ),
    "an early stop without evaluations": (
        given("train.early_stop_evaluations=2"), ("train.early_stop_evaluations = 2", "train.eval_interval_steps=1")
    ),
    "a stage of LLaMA-Factory": (given("--stage", "dpo"), ("method.kind = dpo", "`llm-parallel prefer`")),
    "a template of LLaMA-Factory": (given("--template", "vicuna"), ("chatml or a Jinja file", "leave it out")),
    "a way to train of LLaMA-Factory": (given("--use_galore", "true"), ("use_galore",)),
    # adapters and what they are on
    "a base that is not there": (given("checkpoint.load=/nowhere"), ("checkpoint.load = /nowhere does not exist",)),
    "adapters of rank 0": (given("adapter.rank=0"), ("adapter.rank = 0 must be a whole number over 0",)),
    "adapters on nothing": (given("adapter.rank=4"), ("adapter is given", "checkpoint.load")),
    "a target that there is not": (given("adapter.targets=[q,w]"), ("adapter.targets.1", "q, k, v, o, gate, up, down")),
    "a base in a kind that there is not": (given("adapter.base=fp8"), ("adapter.base", "full, int8, nf4")),
}  # fmt: skip


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    four_digits.write_conversations(folder / "train.jsonl", 40)
    return write_run(folder)


@pytest.mark.parametrize(("overrides", "words"), BAD.values(), ids=BAD)
def test_a_mistake_is_one_sentence(
    run_file: Path, tmp_path: Path, overrides: Overrides, words: tuple[str, ...]
) -> None:
    shutil.copytree(run_file.parent, tmp_path, dirs_exist_ok=True)
    result = in_process("sft", run_file, *overrides(tmp_path), f"run_dir={tmp_path / 'x'}", "--dry-run")
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and result.stderr.splitlines()[-1] == said[0], result.stderr
    for word in words:
        assert word in said[0], (word, said[0])
    assert not (tmp_path / "x" / "checkpoints").exists()


ANSWER = {"role": "assistant", "content": "4"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
COUNTED: dict[str, tuple[Overrides, str]] = {
    "a broken row among others": (
        data(record(Q, A), "{", record(Q), record(Q, A)),
        "2 records are no conversations: FOLDER/rows.jsonl line",
    ),
    "conversations that are too long": (given("data.seq_length_tokens=15"), "cut 40 answers at data.seq_length_tokens"),
    "an answer of nothing": (
        data(record(Q, A), record(Q, ("assistant", ""))),
        "1 conversation with an answer of nothing",
    ),
    "turns of others that ask to be trained": (
        data(record(Q, A), json.dumps({"messages": [{"role": "user", "content": "1", "train": True}, ANSWER]})),
        "1 turn that is not the assistant's",
    ),
    "calls that the template drops": (
        lambda folder: [
            *template(LOOP + "{{ m.role + m.content }}<|im_end|>{% endfor %}")(folder),
            *data(record(Q, A), json.dumps({"messages": [{"role": "user", "content": "1"}, CALL]}))(folder),
        ],
        "1 conversation has calls of tools, which the template does not write",
    ),
    "steps and epochs": (given("train.epochs=2"), "train.steps = 6 is replaced by"),
    "an evaluation of a part": (
        lambda folder: [f"chat.eval=[{folder / 'train.jsonl'}]", "chat.packing=pad"],
        "judges 8 of 40 samples of what is",
    ),
    "evaluations of less than one": (
        given("chat.eval_fraction=0.001", "train.eval_interval_steps=2"),
        "nothing is held out and evaluations judge",
    ),
    "epochs that end within a batch": (given("train.epochs=2"), "the run has 4.00 epochs"),
}


@pytest.mark.parametrize(("overrides", "said"), COUNTED.values(), ids=COUNTED)
def test_what_is_left_out_or_replaced_is_said(run_file: Path, tmp_path: Path, overrides: Overrides, said: str) -> None:
    shutil.copytree(run_file.parent, tmp_path, dirs_exist_ok=True)
    more = ("chat.eval_fraction=0", "optim.warmup_steps=0", f"run_dir={tmp_path / 'x'}", "--dry-run")
    result = in_process("sft", run_file, *more, *overrides(tmp_path))
    assert result.returncode == 0, result.stderr
    assert said.replace("FOLDER", str(tmp_path)) in result.stderr


def refusals(rank: int, world_size: int, run_file: str, cases: list[list[str]]) -> list[str]:
    """What a worker of a run says to each of these settings."""
    from megatron.core import parallel_state

    from llm_parallel.config.load import load_config
    from llm_parallel.errors import UserError
    from llm_parallel.train.loop import run_training
    from llm_parallel.train.preflight import preflight
    from llm_parallel.train.run import Place
    from llm_parallel.tune.methods import method_of

    found = []
    for overrides in cases:
        try:
            config = preflight(load_config(run_file, overrides, notice=lambda _: None), world_size)
            run_training(config, Place(rank, world_size, rank), lambda: True, method=method_of(config))
            found.append("nothing")
        except UserError as error:
            found.append(str(error))
        parallel_state.destroy_model_parallel()
    return found


def test_models_that_do_not_fit_are_named(run_file: Path, tmp_path: Path) -> None:
    """Found by the processes of the run, which read the weights."""
    base, lora = tmp_path / "base", tmp_path / "lora"
    short = ("train.steps=1", "optim.warmup_steps=0", "chat.show_answers=0")
    train_in_ranks(run_file, 1, *short, f"run_dir={base}")
    on_base = (*short, f"checkpoint.load={base}", "adapter.rank=4")
    train_in_ranks(run_file, 1, *on_base, f"run_dir={lora}")
    cases = {
        "another size": (["model.hidden_size=128", f"checkpoint.load={base}"], ("hidden_size is 64", "128")),
        "another rank": ([*on_base, "adapter.rank=8", f"adapter.load={lora}"], ("adapter.rank is 8", "with 4")),
        "adapters as a base": ([*on_base, f"checkpoint.load={lora}"], ("holds adapters", "adapter.load=")),
        "weights as adapters": ([*on_base, f"adapter.load={base}"], ("holds whole weights",)),
        "a run of weights as one of adapters": ([*on_base, f"run_dir={base}"], ("adapter",)),
    }
    settings = [[f"run_dir={tmp_path / f'x{n}'}", *one[0]] for n, one in enumerate(cases.values())]
    [found] = run_ranks(refusals, 1, str(run_file), settings)
    for (name, (_, words)), said in zip(cases.items(), found):
        assert "\n" not in said and all(word in said for word in words), (name, said)
