"""Reading run files: what is understood, and what is said about what is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_parallel.config.aliases import ALIASES
from llm_parallel.config.fields import known_names, nearest_name
from llm_parallel.config.load import config_schema, describe_fields, dump_config, load_config
from llm_parallel.config.presets import MODEL_PRESETS
from llm_parallel.config.tree import RampUp, RunConfig, Source
from llm_parallel.errors import UserError


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path | None, *overrides: str) -> str:
    with pytest.raises(UserError) as raised:
        load_config(path, overrides, notice=lambda _: None)
    return str(raised.value)


def test_nothing_given_is_the_default_tree():
    assert load_config(None) == RunConfig()


def test_file_over_defaults_and_overrides_over_file(tmp_path):
    path = write(tmp_path, "train:\n  steps: 7\n  micro_batch_size: 2\noptim:\n  lr: 1e-3\n")
    config = load_config(path, ["train.steps=9", "run_dir=/tmp/x"])
    assert (config.train.steps, config.train.micro_batch_size) == (9, 2)
    assert (config.optim.lr, config.run_dir) == (1e-3, "/tmp/x")
    assert config.train.global_batch_size == RunConfig().train.global_batch_size


def test_three_ways_to_write_an_override():
    ways = (["optim.min_lr=1e-6"], ["--optim.min_lr=1e-6"], ["--optim.min_lr", "1e-6"], ["--optim.min-lr", "1e-6"])
    for way in ways:
        assert load_config(None, [*way, "train.steps=3"]).optim.min_lr == 1e-6


def test_values_of_overrides_are_yaml():
    config = load_config(
        None,
        [
            "parallel.stage_layers=[1, 3]",
            "parallel.sequence_parallel=false",
            "train.guard.spike_zscore=null",
            "train.rampup={start: 2, increment: 2, samples: 1e3}",
            "data.train=[{path: a, weight: 2}, b]",
            "data.train.1.weight=5",
            "data.eval=held/out",
            "run_dir=a=b:c",
        ],
    )
    assert config.parallel.stage_layers == (1, 3)
    assert config.parallel.sequence_parallel is False
    assert config.train.guard.spike_zscore is None
    assert config.train.rampup == RampUp(start=2, increment=2, samples=1000)
    assert config.data.train == (Source(path="a", weight=2.0), Source(path="b", weight=5.0))
    assert config.data.eval == (Source(path="held/out"),)
    assert config.run_dir == "a=b:c"


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "1E-3", "+1e-3"])
def test_numbers_with_an_exponent_need_no_point(tmp_path, text):
    """PyYAML reads 1e-3 as text, as YAML 1.1 says."""
    assert load_config(write(tmp_path, f"optim: {{lr: {text}, min_lr: 0}}")).optim.lr == 1e-3
    assert load_config(None, [f"optim.lr={text}"]).optim.lr == 1e-3


def test_a_later_override_opens_or_closes_a_section(tmp_path):
    path = write(tmp_path, "train:\n  rampup: {start: 2, increment: 2, samples: 10}\n")
    assert load_config(path, ["train.rampup=null"]).train.rampup is None
    config = load_config(path, ["train.rampup=null", "train.rampup={start: 4, increment: 1, samples: 9}"])
    assert config.train.rampup == RampUp(start=4, increment=1, samples=9)
    assert load_config(path, ["train.rampup.start=4"]).train.rampup == RampUp(start=4, increment=2, samples=10)


@pytest.mark.parametrize("text", ["", "null\n", "# only a comment\n", "optim:\n  # lr: 1\n", "train: {}\n", "---\n"])
def test_empty_files_and_sections_are_defaults(tmp_path, text):
    assert load_config(write(tmp_path, text)) == RunConfig()


def test_anchors_and_merges_are_yaml(tmp_path):
    path = write(tmp_path, "train: &t {steps: 5}\noptim: {lr: 1e-4, min_lr: 0}\n")
    assert load_config(path).train.steps == 5
    path = write(tmp_path, "data:\n  train:\n    - &a {path: x, weight: 3}\n    - {<<: *a, path: y}\n")
    assert load_config(path).data.train == (Source(path="x", weight=3), Source(path="y", weight=3))


def test_preset_fills_what_is_not_given(tmp_path):
    path = write(tmp_path, "model:\n  num_layers: 3\n  preset: llama3.1-8b\n")
    model = load_config(path, ["model.rope_scaling.factor=4"]).model
    assert (model.num_layers, model.hidden_size, model.vocab_size) == (3, 4096, 128256)
    assert model.rope_scaling is not None
    assert (model.rope_scaling.factor, model.rope_scaling.high_freq_factor) == (4.0, 4.0)
    assert load_config(path, ["model.rope_scaling=null"]).model.rope_scaling is None
    assert load_config(path, ["model.preset=debug"]).model.hidden_size == 64


@pytest.mark.parametrize("preset", [None, *MODEL_PRESETS])
def test_dumped_configuration_is_complete_and_reads_back(tmp_path, preset):
    overrides = [f"model.preset={preset}", "model.num_layers=5"] if preset else []
    config = load_config(None, [*overrides, "data.train=[a, 'weird: \"name\" é #1']", "optim.lr=1e-5", "seed=0"])
    text = dump_config(config)
    assert load_config(write(tmp_path, text)) == config
    optional = ("train.rampup", "model.rope_scaling", "adapter")
    for name in known_names():
        section, _, field = name.rpartition(".")
        if not section.startswith(("data.", "chat.", "method.rollout.judges")) and section not in optional:
            node = yaml.safe_load(text)
            for part in filter(None, section.split(".")):
                node = node[part]
            assert field in node, name


@settings(max_examples=100, deadline=None)
@given(
    st.builds(
        lambda text, ratio, number, layers: RunConfig.model_validate(
            {
                "run_dir": text,
                "seed": number,
                "data": {"tokenizer": text, "eval_fraction": ratio, "train": [{"path": text}]},
                "optim": {"lr": ratio + 1e-30, "min_lr": 0},
                "parallel": {"stage_layers": layers},
            }
        ),
        st.text(max_size=20) | st.text("\x85\u2028\n\t\x07:#'\" é", max_size=5) | st.text("01.eE+-_", max_size=5),
        st.floats(0, 0.999),
        st.integers(0, 2**70),
        st.lists(st.integers(1, 9), max_size=4),
    )
)
def test_any_dump_reads_back_bit_for_bit(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_all_mistakes_are_named_at_once_with_their_lines(tmp_path):
    path = write(
        tmp_path,
        """\
# a comment
train:
  steps: abc
  micro_batch: 2
  precision: fp16
data:
  train:
    - {path: a}
    - path: b
      wieght: 2
  eval_fraction: 1.5
optim: 3
""",
    )
    lines = refusal(path, "parallel.tp=0", "lgo.interval_steps=1").splitlines()
    assert set(lines) == {
        f'{path}:3: train.steps = "abc" must be a whole number over 0',
        f"{path}:4: unknown key train.micro_batch; the nearest known one is train.micro_batch_size",
        f'{path}:5: train.precision = "fp16" must be one of bf16, fp32',
        f"{path}:10: unknown key data.train.1.wieght; the nearest known one is data.train.1.weight",
        f"{path}:11: data.eval_fraction = 1.5 must be a number of at least 0.0 and below 1.0",
        f"{path}:12: optim = 3 must be a section with lr, min_lr, schedule, warmup_steps, warmup_fraction,"
        " decay_steps, beta1, beta2, epsilon, weight_decay, clip_grad, implementation, moment_bits",
        "override parallel.tp=0: parallel.tp = 0 must be a whole number over 0",
        "override lgo.interval_steps=1: unknown key lgo; the nearest known one is log",
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.steps=true"], "train.steps = true must be a whole number over 0"),
        (["optim.lr=.inf"], "optim.lr = inf must be finite"),
        (["optim.lr=.nan"], "optim.lr = nan must be finite"),
        (["train.steps=1.5"], "train.steps = 1.5 must be a whole number over 0"),
        (["model.tie_embeddings=3"], "model.tie_embeddings = 3 must be true or false"),
        (["data.tokenizer=7"], "data.tokenizer = 7 must be text, or null"),
        (["parallel.stage_layers=4"], "parallel.stage_layers = 4 must be a list, each item a whole number over 0"),
        (["parallel.stage_layers=[4, x]"], 'parallel.stage_layers.1 = "x" must be a whole number over 0'),
        (["train.rampup.start=4"], "train.rampup.increment is missing; it must be a whole number over 0"),
        (["data.train=[a]", "data.train.1.weight=2"], "data.train.1.weight does not exist; data.train has 1 items"),
        (["data.train=[{weight: 2}]"], "data.train.0.path is missing; it must be text"),
        (
            ["model.preset=lama2-7b"],
            'model.preset = "lama2-7b" is unknown; the nearest known one is llama2-7b, all are',
        ),
        (["model=llama2-7b"], 'model = "llama2-7b" must be a section with preset, num_layers'),
        (["train.steps"], "override 'train.steps' has no value; write train.steps=value"),
        (["--train.steps"], "override '--train.steps' has no value"),
        (["--train.steps", "--seed=1"], "override '--train.steps' has no value"),
        (["=3"], "override '=3' names no field; write section.field=value"),
        (["train..steps=3"], "override 'train..steps=3' names no field"),
        (["train.steps=[1"], "override train.steps=[1: not valid YAML"),
        (["train.steps={a: {b: 1}}"], 'train.steps = {"a": {"b": 1}} must be a whole number over 0'),
        (["train.steps.count=3"], "train.steps"),
        (["bf16=maybe"], 'bf16 = "maybe" must be true or false'),
    ],
)
def test_wrong_overrides(overrides, message):
    assert message in refusal(None, *overrides)


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("train.microbatch_size", "train.micro_batch_size"),
        ("train.Steps", "train.steps"),
        ("optim.learn_rate", "optim.lr"),
        ("data.seq_len_tokens", "data.seq_length_tokens"),
        ("train.spike_zscore", "train.guard.spike_zscore"),
        ("model.seq_length_tokens", "data.seq_length_tokens"),
        ("modle.hidden_size", "model"),
        ("tensor_model_paralel_size", "parallel.tp"),
        ("checkpoint.keep_laast", "checkpoint.keep_last"),
        ("sead", "seed"),
    ],
)
def test_nearest_known_name(unknown, nearest):
    assert f"the nearest known one is {nearest}" in refusal(None, f"{unknown}=1").splitlines()[0] + "\n"


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([name for name in known_names() if ".N." not in name]), st.data())
def test_one_typing_slip_finds_the_field(name, data):
    section, _, leaf = name.rpartition(".")
    if len(leaf) < 6:
        return
    at = data.draw(st.integers(0, len(leaf) - 2))
    slip = leaf[:at] + leaf[at + 1] + leaf[at] + leaf[at + 2 :]
    path = [*filter(None, section.split(".")), slip]
    if ".".join(path) not in known_names():
        assert nearest_name(path) == name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", ":1: a configuration file must consist of"),
        (b"just text\n", ":1: a configuration file must consist of"),
        (b"train:\n  steps: [1\n", ":3: not valid YAML"),
        (b"train:\n\tsteps: 1\n", ":2: not valid YAML"),
        (b"a: 1\n---\nb: 2\n", "not valid YAML"),
        (b"\xff\xfe\x00", "cannot be read as a YAML text file"),
        (b"train: \x00", "not valid YAML"),
        (b"run_dir: !!python/object/apply:os.system [ls]\n", ":1: not valid YAML"),
        (b"run_dir: 2020-13-45\n", "not valid YAML"),
        (b"train: {steps: 1}\noptim: {lr: 1, lr: 2}\n", ":2: optim.lr is given twice, first in line 2; keep one"),
        (b"train: {steps: 1}\ntrain: {steps: 2}\n", ":2: train is given twice, first in line 1; keep one"),
        (b"train: &a {steps: *a}\n", ":1: nested deeper than 20 levels"),
        (b"x: &x\n  y: *x\n", "nested deeper than 20 levels"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    found = refusal(path)
    assert message in found
    assert str(path) in found


def test_missing_file_and_folder(tmp_path):
    assert refusal(tmp_path / "no.yaml") == (
        f"configuration file {tmp_path / 'no.yaml'} does not exist; give the path of a YAML file"
    )
    assert refusal(tmp_path) == f"configuration file {tmp_path} is a folder; give the path of a YAML file"


def test_names_of_megatron_and_hugging_face(tmp_path):
    path = write(
        tmp_path,
        """\
tensor_model_parallel_size: 2
pipeline_model_parallel_size: 4
micro_batch_size: 2
global_batch_size: 64
seq_length: 512
train_iters: 10
lr_warmup_iters: 3
bf16: true
untie_embeddings_and_output_weights: false
model:
  num_hidden_layers: 8
  rms_norm_eps: 1e-6
optim:
  learning_rate: 1e-3
checkpoint:
  save_steps: 5
output_dir: here
""",
    )
    notices: list[str] = []
    config = load_config(path, ["--max-grad-norm", "0.5"], notice=notices.append)
    assert (config.parallel.tp, config.parallel.pp) == (2, 4)
    assert (config.train.micro_batch_size, config.train.global_batch_size, config.train.steps) == (2, 64, 10)
    assert (config.data.seq_length_tokens, config.train.precision) == (512, "bf16")
    assert (config.model.tie_embeddings, config.model.num_layers, config.model.norm_epsilon) == (True, 8, 1e-6)
    assert (config.optim.lr, config.optim.warmup_steps, config.optim.clip_grad) == (1e-3, 3, 0.5)
    assert (config.checkpoint.interval_steps, config.run_dir) == (5, "here")
    assert len(notices) == 16
    assert notices[-1].startswith(
        "defaults that differ from those of Megatron-LM: optim.schedule=cosine (there linear)"
    )
    assert notices[0] == f"{path}:1: tensor_model_parallel_size is read as parallel.tp"


def test_an_alias_beside_its_field_is_refused_in_a_file_and_wins_as_an_override(tmp_path):
    path = write(tmp_path, "train:\n  steps: 3\n  train_iters: 4\n")
    assert refusal(path) == (
        f"{path}:3: train.train_iters is another name of train.steps, which is given at {path}:2 too; keep one"
    )
    path = write(tmp_path, "train:\n  steps: 3\n")
    assert load_config(path, ["train_iters=9"], notice=lambda _: None).train.steps == 9


def test_the_names_of_config_json_are_understood_in_the_rotary_scaling(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model:\n  vocab_size: 100\n  no_rope_layers: [1, 1, 1, 0]\n  rope_scaling:\n    rope_type: linear\n"
        "    factor: 4.0\n    original_max_position_embeddings: 2048\n"
    )
    said: list[str] = []
    model = load_config(path, notice=said.append).model
    assert model.layers_without_rope == (3,)
    assert model.rope_scaling is not None
    assert (model.rope_scaling.kind, model.rope_scaling.original_max_position) == ("linear", 2048)
    assert len(said) == 3 and any("model.rope_scaling.rope_type is read as model.rope_scaling.kind" in s for s in said)


def test_every_alias_leads_to_a_field_and_hides_none():
    for name, alias in ALIASES.items():
        assert alias.target in known_names()
        assert name not in RunConfig.model_fields


def test_notices_go_to_the_error_stream_by_default(capsys):
    load_config(None, ["tp=2"])
    assert capsys.readouterr() == ("", "override tp=2: tp is read as parallel.tp\n")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.steps=5", "train.steps=7"], "override train.steps=5 does not count, since override train.steps=7"),
        (["optim.lr=1e-3", "--lr", "2e-3"], "override optim.lr=1e-3 does not count, since override lr=2e-3"),
        (["data.train.0.path=a", "data.train=b"], "override data.train.0.path=a does not count, since override data"),
        (["train.steps=5", "train.steps=5", "parallel.tp=2"], ""),
        (["data.train=b", "data.train.0.weight=2"], ""),
    ],
)
def test_overrides_that_do_not_count_are_named(overrides: list[str], said: str) -> None:
    notices: list[str] = []
    load_config(None, [*overrides, "optim.warmup_steps=0"], notice=notices.append)
    assert [text[: len(said)] for text in notices if "count" in text] == ([said] if said else [])


def test_every_field_is_described():
    fields = {field.name: field for field in describe_fields()}
    dumped: dict[str, Any] = RunConfig().model_dump()
    for section, values in dumped.items():
        assert section in fields
        if isinstance(values, dict):
            for name, value in values.items():
                described = fields[f"{section}.{name}"]
                assert described.is_section or described.default == value
    assert all(len(field.doc) > 10 for field in fields.values() if "." in field.name and not field.is_section)
    assert fields["train.rampup.start"].default is ...
    assert fields["optim.lr"].type == "a number over 0"
    assert fields["parallel.tp"].doc.startswith("Tensor-parallel size")
    assert {"data.train.N.path", "model.rope_scaling.factor", "train.guard.spike_zscore"} <= set(fields)


def test_schema_knows_every_field_and_its_meaning():
    schema = config_schema()
    parallel = schema["$defs"]["ParallelConfig"]["properties"]
    assert parallel["tp"]["description"].startswith("Tensor-parallel size")
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    assert schema["$defs"]["TrainConfig"]["additionalProperties"] is False


@pytest.mark.processes
def test_reading_a_configuration_does_not_import_torch():
    code = "import sys, llm_parallel.config.load, llm_parallel.config.rules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
