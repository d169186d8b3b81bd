"""What can be wrong with a run that learns from preferences or from judged answers: before any process starts it is one
sentence that names it, or the rest is used and what is left out is counted. Nothing is silent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_parallel.config.load import load_config
from llm_parallel.errors import UserError
from llm_parallel.train.preflight import preflight
from llm_parallel.worker.command import of_kind
from tests.support import four_digits
from tests.support.folders import NO_TENSORS

LENGTH = 48


def hf_folder(folder: Path, tokens: Sequence[str] = four_digits.TOKENS) -> Path:
    """A Hugging Face folder as far as it is looked at before processes start: sizes and tokenizer."""
    four_digits.write_tokenizer(folder)
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["model"]["vocab"] = {token: number for number, token in enumerate(tokens)}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    model = four_digits.MODEL
    sizes = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": model["num_layers"],
        "hidden_size": model["hidden_size"], "intermediate_size": model["ffn_hidden_size"],
        "num_attention_heads": model["num_attention_heads"], "num_key_value_heads": model["num_query_groups"],
        "vocab_size": len(tokens), "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(sizes))
    (folder / "model.safetensors").write_bytes(NO_TENSORS)  # weights are read by the processes
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    hf_folder(folder / "other", [*reversed(four_digits.TOKENS[:10]), *four_digits.TOKENS[10:]])
    hf_folder(folder / "larger", [*four_digits.TOKENS, *"abcd"])
    (folder / "empty").mkdir()
    return hf_folder(folder / "model")


def pair(prompt: Any = "12+3", chosen: Any = "3021", rejected: Any = "1203", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


PAIRS = [pair(f"{n}+3") for n in range(4)]
PROMPTS = [{"prompt": f"{n}+3", "answer": f"{n}"} for n in range(4)]
LABELS = [{"prompt": f"{n}+3", "completion": "1", "label": n % 2 == 0} for n in range(4)]
RANKED = {"prompt": "1+2", "responses": ["3", "4"], "scores": [1, 0]}


def prepare(model: Path, folder: Path, kind: str, rows: Sequence[Any], *overrides: str) -> list[str]:
    """Everything that a command does before it starts processes; returns what it says. Raises UserError."""
    (folder / "rows.jsonl").write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    tree: dict[str, Any] = {
        "run_dir": str(folder / "run"), "device": "cpu", "method": {"kind": kind},
        "checkpoint": {"load": str(model)}, "data": {"seq_length_tokens": LENGTH},
        "chat": {"train": [str(folder / "rows.jsonl")], "eval_fraction": 0.0},
        "train": {"global_batch_size": 4, "micro_batch_size": 1, "steps": 4},
        "log": {"tensorboard": False, "plots": False},
    }  # fmt: skip
    if kind in ("grpo", "reject", "ppo"):
        tree["method"]["rollout"] = {"prompts": 4, "answers": 4, "max_new_tokens": 8, "judges": [{"kind": "exact"}]}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    told: list[str] = []
    given = [one.replace("FOLDER", str(folder)).replace("MODELS", str(model.parent)) for one in overrides]
    config = load_config(folder / "run.yaml", given, notice=told.append)
    preflight(of_kind(config, "sft" if kind == "sft" else "prefer"), notice=told.append)
    return told


Case = tuple[str, Sequence[Any], Sequence[str], str]
REFUSED: dict[str, Case] = {
    # records
    "pairs with equal answers": ("dpo", [pair(chosen="1", rejected="1")] * 2, [], "answers that are all the same"),
    "answers that the template makes equal": (
        "dpo", [pair(chosen="12", rejected="12 ")] * 2, ["chat.template=FOLDER/trims.jinja"],
        "2 have answers that are the same tokens once the template has written them",
    ),
    "no column of rejected answers": ("dpo", [{"prompt": "1", "chosen": "2"}] * 2, [], "no field 'rejected'"),
    "no column of prompts": ("dpo", [{"chosen": "1", "rejected": "2"}], [], "no prompt; give the question in 'prompt'"),
    "fields of no form": ("kto", [{"text": "1"}], [], "of which no preference can be made"),
    "one response to rank": ("rrhf", [{"prompt": "1", "responses": ["2"], "scores": [1]}], [], "fewer than two"),
    "scores that are NaN": ("rrhf", ['{"prompt": "1", "responses": ["2", "3"], "scores": [NaN, 1]}'], [], "score nan"),
    "fewer scores than responses": ("rrhf", [{**RANKED, "scores": [1]}], [], "give a list with one for each"),
    "scores that are all alike": (
        "rrhf", [{**RANKED, "scores": [2, 2]}] * 3, [], "3 have no answer that is better than another"
    ),
    "labels that are all alike": ("kto", [{**row, "label": True} for row in LABELS], [], "all were liked; give both"),
    "labels that are no labels": ("kto", [{**LABELS[0], "label": "maybe"}], [], "label 'maybe'; a label is true or"),
    "one prompt for all of kto": ("kto", [{**row, "prompt": "1"} for row in LABELS], [], "all records have the same"),
    "a winner that is no answer": (
        "dpo", [{"prompt": "1", "response_a": "1", "response_b": "2", "winner": "c"}], [], "winner 'c'"
    ),
    "margins that nobody gave": ("reward", PAIRS, ["method.reward.margins=true"], "no record has a margin"),
    "pairs longer than a sample": ("dpo", [pair(chosen="1" * 60)], [], "1 do not fit data.seq_length_tokens = 48"),
    "prompts longer than the context": (
        "grpo", [{"prompt": "1" * 90, "answer": "1"}] * 3, [], "3 are longer than 41 tokens"
    ),
    "answers that leave a prompt no room": (
        "grpo", PROMPTS, ["method.rollout.max_new_tokens=64"], "max_new_tokens = 64 leaves no room for a prompt"
    ),
    "prompts without a question": ("grpo", [{"prompt": " "}], [], "has an empty prompt"),
    "only broken lines": ("dpo", ["{"], [], "line 1 is not JSON"),
    # judges
    "no judges": ("grpo", PROMPTS, ["method.rollout.judges=[]"], "judges is empty; give at least one judge"),
    "a judge that does not exist": (
        "grpo", PROMPTS, ["method.rollout.judges=[{kind: wise}]"], "method.rollout.judges.0.kind"
    ),
    "a judge without the field that it reads": (
        "grpo", [*PROMPTS, {"prompt": "9+9"}], [], "kind = exact cannot judge answers to 1 of 5 prompts: "
    ),
    "a right answer without a number": (
        "reject", [{"prompt": "1", "answer": "one"}], ["method.rollout.judges=[{kind: number}]"], "which has no number"
    ),
    "a schema that is none": (
        "grpo", [{"prompt": "1", "answer": "{"}], ["method.rollout.judges=[{kind: json}]"], "answer that is no JSON"
    ),
    "a pattern that is none": (
        "grpo", PROMPTS, ["method.rollout.judges=[{kind: regex, pattern: '('}]"], "is no regular expression"
    ),
    "a pattern with a field that is not there": (
        "grpo", PROMPTS, ["method.rollout.judges=[{kind: regex, pattern: '{right}'}]"], "has no field 'right'"
    ),
    "a judge whose file is not there": (
        "grpo", PROMPTS, ["method.rollout.judges=[{kind: function, file: gone.py}]"], "gone.py is no file of Python"
    ),
    "a judge whose file fails": (
        "grpo", PROMPTS, ["method.rollout.judges=[{kind: function, file: FOLDER/bad.py}]"], "bad.py fails with Name"
    ),
    "a judge without time": (
        "grpo", PROMPTS, ["method.rollout.judges=[{kind: function, file: x.py, timeout_s: 0}]"], "timeout_s"
    ),
    # settings
    "a method that there is not": ("ipo", PAIRS, [], "method.kind"),
    "beta of 0": ("dpo", PAIRS, ["method.dpo.beta=0"], "method.dpo.beta = 0 must be a number over 0"),
    "a negative beta": ("kto", LABELS, ["method.kto.beta=-1"], "method.kto.beta = -1 must be a number over 0"),
    "a negative weight of labels": ("kto", LABELS, ["method.kto.desirable_weight=-1"], "desirable_weight = -1 must be"),
    "a negative weight of the best": ("rrhf", [RANKED], ["method.rrhf.best_weight=-1"], "method.rrhf.best_weight"),
    "a negative weight of a file": ("dpo", PAIRS, ["chat.train=[{path: x, weight: -1}]"], "chat.train.0.weight = -1"),
    "one answer to compare": (
        "grpo", PROMPTS, ["method.rollout.answers=1", "train.global_batch_size=4"], "method.rollout.answers = 1"
    ),
    "a batch that does not divide a round": (
        "grpo", PROMPTS, ["train.global_batch_size=3"], "which train.global_batch_size = 3 does not divide"
    ),
    "a temperature of 0": ("grpo", PROMPTS, ["method.rollout.temperature=0"], "method.rollout.temperature = 0 must be"),
    "a least score that keeps nothing to say": (
        "reject", PROMPTS, ["method.reject.least_score=nan"], "method.reject.least_score"
    ),
    # models
    "no model": (
        "dpo", PAIRS, ["checkpoint.load=null", "data.tokenizer=MODELS/model", "model.vocab_size=16"],
        "checkpoint.load, which names the model whose answers are to become better, is not given",
    ),
    "a model that is not there": ("dpo", PAIRS, ["checkpoint.load=FOLDER/gone"], "checkpoint.load = FOLDER/gone does"),
    "a folder without a model": ("dpo", PAIRS, ["checkpoint.load=MODELS/empty"], "MODELS/empty"),
    "a reference that is not there": (
        "dpo", PAIRS, ["method.reference.load=FOLDER/gone"], "method.reference.load = FOLDER/gone does not exist"
    ),
    "a reference of another tokenizer": (
        "dpo", PAIRS, ["method.reference.load=MODELS/other"],
        "method.reference.load = MODELS/other has another tokenizer than data.tokenizer = MODELS/model: 10 of",
    ),
    "a reference of a larger vocabulary": (
        "kto", LABELS, ["method.reference.load=MODELS/larger"],
        "method.reference.load = MODELS/larger has model.vocab_size = 20, and the model that is trained has 16",
    ),
    "a reference without a model": ("kto", LABELS, ["method.reference.load=MODELS/empty"], "MODELS/empty"),
    # another command
    "liked and disliked answers for sft": (
        "sft", [{**row, "label": False} for row in LABELS], [],
        "4 have a label which says that the answer was not liked",
    ),
    "pairs for sft": ("sft", PAIRS, [], "`llm-parallel prefer` with method.kind=dpo learns from pairs"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trims = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    (tmp_path / "trims.jinja").write_text(trims + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    (tmp_path / "bad.py").write_text("unknown\n")
    return tmp_path


@pytest.mark.parametrize(("kind", "rows", "overrides", "words"), REFUSED.values(), ids=REFUSED)
def test_a_mistake_is_one_sentence(
    kind: str, rows: Sequence[Any], overrides: Sequence[str], words: str, model: Path, folder: Path
) -> None:
    words = words.replace("FOLDER", str(folder)).replace("MODELS", str(model.parent))
    with pytest.raises(UserError) as refused:
        prepare(model, folder, kind, rows, *overrides)
    assert words in str(refused.value) and "\n" not in str(refused.value)


COUNTED: dict[str, Case] = {
    "equal answers among others": (
        "dpo", [*PAIRS, pair(chosen="1", rejected="1")], [], "1 record is no preference: FOLDER/rows.jsonl line 5"
    ),
    "equal tokens among others": (
        "dpo", [*PAIRS, pair(chosen="12", rejected="12 ")], ["chat.template=FOLDER/trims.jinja"],
        "left out 1 pair whose answers are the same tokens once the template has written them",
    ),
    "a tie among others": (
        "rrhf", [RANKED, {**RANKED, "scores": [0, 0]}], [], "left out 1 record in which no answer is better"
    ),
    "a NaN among others": (
        "rrhf", [RANKED, '{"prompt": "1", "responses": ["2", "3"], "scores": [NaN, 1]}'], [], "has the score nan where"
    ),
    "a long pair among others": (
        "dpo", [*PAIRS, pair(chosen="1" * 60)], [], "left out 1 pair that does not fit data.seq_length_tokens = 48"
    ),
    "a long prompt among others": (
        "grpo", [*PROMPTS, {"prompt": "1" * 90, "answer": "1"}], [], "left out 1 prompts of more than 41 tokens"
    ),
    "empty answers": ("dpo", [*PAIRS, pair(rejected="")], [], "1 answer of nothing but the token that stops it"),
    "labels that weigh little": ("kto", [*LABELS, LABELS[0]], [], "3 answers were liked and 2 not"),
    "a disliked answer for sft": (
        "sft", LABELS, [], "left out 2 conversations whose label says that the answer was not liked"
    ),
    "a tag of LLaMA-Factory for sft": (
        "sft", [{"instruction": "1", "output": "2", "kto_tag": tag} for tag in (True, False, 0, "false")], [],
        "left out 3 conversations whose label",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "rows", "overrides", "words"), COUNTED.values(), ids=COUNTED)
def test_what_is_left_out_is_counted(
    kind: str, rows: Sequence[Any], overrides: Sequence[str], words: str, model: Path, folder: Path
) -> None:
    told = prepare(model, folder, kind, rows, *overrides)
    assert words.replace("FOLDER", str(folder)) in "\n".join(told), told


def test_a_class_is_no_label(model: Path, folder: Path) -> None:
    """Classes of texts are numbers under the name "label" too."""
    told = prepare(model, folder, "sft", [{**row, "label": number % 2} for number, row in enumerate(LABELS)])
    assert any("4 conversations of 4 records" in text for text in told) and not any("liked" in text for text in told)
