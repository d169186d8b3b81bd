"""The JSON schema of run files, held against a validator of its own, and what a dry run says of a configuration."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_parallel.config.differences import differences, in_words, origin_of
from llm_parallel.config.load import config_schema, dump_config, load_config, load_with_origins
from llm_parallel.config.schema import SCHEMA_LINE, write_schema
from llm_parallel.config.tree import RunConfig
from llm_parallel.worker.command import is_finished, save_config

SCHEMA = config_schema()
CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
KINDS: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int,
    "number": (int, float),
}  # fmt: skip


def faults(value: Any, schema: dict[str, Any], at: str = "") -> list[str]:
    """What is wrong with a value, by the part of JSON schema that ours uses."""
    if "$ref" in schema:
        return faults(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], at)
    if "anyOf" in schema:
        tried = [faults(value, option, at) for option in schema["anyOf"]]
        return min(tried, key=len)
    found = []
    kind = schema.get("type")
    if kind and (not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return [f"{at}: {value!r} is no {kind}"]
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{at}: {value!r}")
    limits = (
        ("minimum", "__ge__"),
        ("exclusiveMinimum", "__gt__"),
        ("maximum", "__le__"),
        ("exclusiveMaximum", "__lt__"),
    )
    found += [
        f"{at}: {name}" for name, holds in limits if name in schema and not getattr(float(value), holds)(schema[name])
    ]
    if isinstance(value, list):
        found += [f"{at}: minItems"] if len(value) < schema.get("minItems", 0) else []
        for number, item in enumerate(value):
            found += faults(item, schema.get("items", {}), f"{at}.{number}")
    if isinstance(value, dict):
        known = schema.get("properties", {})
        found += [f"{at}.{name} is missing" for name in schema.get("required", ()) if name not in value]
        for name, inside in value.items():
            if name in known:
                found += faults(inside, known[name], f"{at}.{name}")
            elif schema.get("additionalProperties") is False:
                found.append(f"{at}.{name} is unknown")
    return found


def test_the_schema_has_only_words_that_the_check_understands() -> None:
    understood = {
        *("$defs", "$ref", "$schema", "additionalProperties", "anyOf", "default", "description", "enum", "items"),
        *("properties", "required", "title", "type", "minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"),
        "minItems",
    }

    def words(node: Any, named: bool = False) -> set[str]:
        if isinstance(node, list):
            return {word for item in node for word in words(item)}
        if not isinstance(node, dict):
            return set()
        inside = {
            word
            for name, item in node.items()
            if named or name not in ("default", "enum", "required")
            for word in words(item, not named and name in ("properties", "$defs"))
        }
        return inside if named else inside | node.keys()

    assert words(SCHEMA) <= understood


@pytest.mark.parametrize("path", [path for path in CONFIGS if "sweep" not in path.name], ids=lambda path: path.name)
def test_our_run_files_obey_it(path: Path) -> None:
    assert faults(yaml.safe_load(path.read_text()), SCHEMA) == []


@pytest.mark.parametrize(
    "overrides", [[], ["model.preset=llama3.1-8b", "train.rampup={start: 1, increment: 1, samples: 2}"]]
)
def test_whole_configurations_obey_it(overrides: list[str]) -> None:
    config = load_config(None, [*overrides, "data.train=[a]"])
    assert faults(yaml.safe_load(dump_config(config)), SCHEMA) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("train: {steps: 0}", ".train.steps: exclusiveMinimum"),
        ("train: {stepz: 1}", ".train.stepz is unknown"),
        ("optim: {schedule: cosin}", ".optim.schedule: 'cosin'"),
        ("data: {train: [{weight: 1}]}", ".data.train.0.path is missing"),
        ("model: {tie_embeddings: 1}", ".model.tie_embeddings: 1 is no boolean"),
        ("data: {train: one}", None),
        ("data: {train: [one, {path: two, weight: 2}]}", None),
    ],
)
def test_it_finds_what_the_loader_refuses(text: str, fault: str | None, tmp_path: Path) -> None:
    assert faults(yaml.safe_load(text), SCHEMA) == ([] if fault is None else [fault])


def test_a_saved_configuration_names_a_schema_that_is_there(tmp_path: Path) -> None:
    config = load_config(None, [f"run_dir={tmp_path}", "seed=7"])
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert text.startswith(SCHEMA_LINE)
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert named and json.loads((tmp_path / named[1]).read_text()) == SCHEMA
    assert load_config(tmp_path / "config.yaml") == config
    write_schema(tmp_path)


def test_differences_are_named_with_their_origins(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model:\n  preset: debug\n  num_layers: 3\ndata:\n  train:\n  - path: a\ntrain: {steps: 100}\n")
    config, origins = load_with_origins(path, ["tp=2", "train.rampup={start: 1, increment: 1, samples: 9}"], print)
    found = {one.name: (one.value, one.default, origin_of(one.name, origins)) for one in differences(config)}
    assert found["model.num_layers"] == ("3", "4", "run.yaml:3")
    assert found["model.hidden_size"] == ("64", "256", "preset debug")
    assert found["data.train"] == ("[{path: a}]", "[]", "run.yaml:6")
    assert found["parallel.tp"] == ("2", "1", "override")
    assert found["train.rampup"] == ("{start: 1, increment: 1, samples: 9}", "none", "override")
    assert "train.steps" not in found, "given as it is by default"
    changed = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 400})})
    assert origin_of(next(one.name for one in differences(changed) if "vocab" in one.name), origins) == "derived"
    assert differences(RunConfig()) == []


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "none"), (True, "true"), ((), "[]"), (("q", "v"), "[q, v]"), (1e-5, "1.0e-05"), ("a: b", "'a: b'")],
)
def test_values_are_written_as_in_an_override(value: Any, words: str) -> None:
    assert in_words(value) == words
    assert len(in_words("x" * 200)) <= 72


def test_a_finished_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llm_parallel.checkpoint.folders import COMPLETE, folder_name

    config = load_config(None, [f"run_dir={tmp_path}", "train.steps=12"])
    assert not is_finished(config)
    for step in (11, 12):
        folder = tmp_path / "checkpoints" / folder_name(step)
        folder.mkdir(parents=True)
        for name in COMPLETE:
            (folder / name).touch()
        assert is_finished(config) is (step == 12)
    assert f"{tmp_path} is finished: {folder} holds step 12" in capsys.readouterr().out
