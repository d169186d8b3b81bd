"""Other systems' names in run files and overrides: read, left out with a notice, or answered with what to do here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from llm_parallel.config.aliases import ALIASES
from llm_parallel.config.derived import DERIVED
from llm_parallel.config.fields import known_names
from llm_parallel.config.foreign import ROWS, foreign
from llm_parallel.config.load import load_config
from llm_parallel.config.tree import RampUp, RunConfig, Source
from llm_parallel.config.tree_tune import ChatSource
from llm_parallel.errors import UserError


def loaded(*overrides: str, file: Path | None = None) -> tuple[RunConfig, list[str]]:
    notices: list[str] = []
    return load_config(file, overrides, notice=notices.append), notices


def refusal(*overrides: str, file: Path | None = None) -> list[str]:
    with pytest.raises(UserError) as raised:
        load_config(file, overrides, notice=lambda _: None)
    return str(raised.value).splitlines()


def value_of(config: RunConfig, name: str) -> Any:
    found: Any = config
    for part in name.split("."):
        found = getattr(found, part)
    return found


def test_every_field_that_the_tables_name_exists() -> None:
    known = set(known_names())
    assert {alias.target for alias in ALIASES.values()} <= known
    for row in ROWS:
        assert set(row.fields) <= known, row.names
        # What an advice says must be a field too, for example "train.precision=bf16".
        named = re.findall(r"\b((?:[a-z_]+\.)+[a-z_]+)(?==|\b)", row.advice)
        sections = {name.split(".")[0] for name in known}
        fields = [name for name in named if name.split(".")[0] in sections and not name.endswith(".jsonl")]
        assert set(fields) <= known, row.names


def test_derived_values_belong_to_fields() -> None:
    others = {"dataset": "one", "eval_dataset": None, "dataset_dir": None}
    for name, rule in DERIVED.items():
        value: Any = name if "dataset" in name else 1
        target, _, how = rule(value, lambda field: others[field] if field in others else value_of(RunConfig(), field))
        assert target in known_names() and how, name


def test_no_name_is_hidden_by_another_or_by_a_field() -> None:
    names = [name for row in ROWS for name in row.names]
    assert len(names) == len(set(names))
    for name in names:
        assert name == "optim" or name not in known_names()
        assert name not in DERIVED
        if name in ALIASES:  # the row's values are left out, all others are read
            assert foreign(name).same  # type: ignore[union-attr]
    assert not set(DERIVED) & set(ALIASES)


MEGATRON = """--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2
 --sequence-parallel --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --num-layers 16
 --hidden-size 512 --ffn-hidden-size 1536 --num-attention-heads 8 --group-query-attention --num-query-groups 4
 --seq-length 1024 --max-position-embeddings 1024 --micro-batch-size 1 --global-batch-size 8 --train-samples 8000
 --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-fraction 0.01 --weight-decay 0.1 --adam-beta2 0.95
 --clip-grad 1.0 --bf16 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
 --untie-embeddings-and-output-weights --attention-dropout 0.0 --hidden-dropout 0.0 --use-flash-attn
 --transformer-impl transformer_engine --tokenizer-type Llama2Tokenizer --tokenizer-model tok.model
 --no-masked-softmax-fusion --distributed-backend nccl --save runs/m --save-interval 100 --log-interval 10
 --recompute-activations --rampup-batch-size 4 4 100 --exit-duration-in-mins 30 --optimizer adam
 --data-path 0.3 a 0.7 b --split 949,50,1 --eval-iters 10 --reset-position-ids --eod-mask-loss --reset-attention-mask"""


def test_a_command_line_of_megatron_lm() -> None:
    config, notices = loaded(*MEGATRON.split())
    assert (config.parallel.tp, config.parallel.pp, config.parallel.vpp) == (2, 2, 4)
    assert (config.parallel.sequence_parallel, config.parallel.overlap, config.parallel.recompute) == (
        True, True, "selective",
    )  # fmt: skip
    assert (config.train.steps, config.optim.warmup_steps, config.train.precision) == (1000, 10, "bf16")
    assert config.train.rampup == RampUp(start=4, increment=4, samples=100)
    assert (config.data.eval_fraction, config.train.eval_samples, config.data.packing) == (0.051, 80, "isolate")
    assert (config.train.time_limit_s, config.model.tie_embeddings) == (1800.0, False)
    assert config.data.train == (Source(path="a", weight=0.3), Source(path="b", weight=0.7))
    said = "\n".join(notices)
    assert "override swiglu=true: swiglu is left out: the MLP is SwiGLU" in said
    assert "is read as parallel.vpp=4: model.num_layers 16 / parallel.pp 2 / 2" in said
    assert "is read as train.steps=1000: 8000 / train.global_batch_size 8" in said


def test_a_file_with_megatrons_options(tmp_path: Path) -> None:
    """Options copied from a command line keep their hyphens, and one that is given twice is refused."""
    path = tmp_path / "run.yaml"
    path.write_text("tensor-model-parallel-size: 2\ndata-path: [0.3, a, 0.7, b]\nsplit: 99,1,0\nseq_length: 64\n")
    config, _ = loaded(file=path)
    assert (config.parallel.tp, config.data.eval_fraction, len(config.data.train)) == (2, 0.01, 2)
    path.write_text("seq-length: 64\nseq_length: 128\n")
    assert "seq_length is given twice, first in line 1" in refusal(file=path)[0]


@pytest.mark.parametrize(
    ("override", "share"), [("split=100,0,0", 0.0), ("split=100", 0.0), ("split=[8,1,1]", 0.2), ("split=98,2", 0.02)]
)
def test_megatrons_split_is_the_share_that_is_held_out(override: str, share: float) -> None:
    assert loaded(override)[0].data.eval_fraction == share


def test_separate_documents_by_one_of_megatrons_switches() -> None:
    assert loaded("--eod-mask-loss")[0].data.packing == "isolate"
    assert loaded("eod_mask_loss=false")[0].data.packing == "concatenate"
    assert loaded("eod_mask_loss=false", "data.packing=isolate")[0].data.packing == "isolate"
    assert "data.packing" in refusal("--reset-position-ids", "data.packing=concatenate")[0]


LLAMA_FACTORY = """\
model_name_or_path: models/base
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
cutoff_len: 2048
preprocessing_num_workers: 16
output_dir: saves/llama3
overwrite_output_dir: false
logging_steps: 10
save_steps: 500
plot_loss: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
packing: true
neat_packing: true
quantization_bit: 4
quantization_method: bnb
optim: adamw_torch
report_to: none
dataset: identity,alpaca_en_demo
dataset_dir: corpora
"""


def test_a_file_of_llama_factory(tmp_path: Path) -> None:
    path = tmp_path / "llama3_lora_sft.yaml"
    path.write_text(LLAMA_FACTORY)
    config, _ = loaded("parallel.dp=2", file=path)
    assert config.adapter is not None
    assert (config.adapter.rank, config.adapter.targets, config.run_dir) == (8, ("q", "v"), "saves/llama3")
    assert config.adapter.base == "nf4"
    assert (config.train.micro_batch_size, config.train.global_batch_size) == (1, 16)
    assert (config.train.epochs, config.optim.warmup_fraction) == (3.0, 0.1)
    assert config.optim.warmup(5000) == 500
    assert (config.chat.eval_fraction, config.chat.packing) == (0.1, "best_fit")
    assert config.chat.train == tuple(
        ChatSource(path="corpora", dataset=name) for name in ("identity", "alpaca_en_demo")
    )
    assert config.checkpoint.load == "models/base"


def test_what_a_file_of_llama_factory_says_otherwise_is_answered(tmp_path: Path) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text("dataset: [1, 2]\ntemplate: alpaca\nfp16: true\n")
    lines = refusal(file=path)
    assert len(lines) == 3
    for line, parts in zip(
        lines,
        (
            (":2: template = ", "chatml", "the tokenizer's own template"),
            (":3: fp16 = true is not a field here: fp16 is not supported; use train.precision=bf16",),
            (":1: dataset = ", "chat.train", "dataset: NAME"),
        ),
    ):
        assert all(part in line for part in parts), line


@pytest.mark.parametrize("first", ["dataset", "dataset_dir"])
def test_data_sets_of_llama_factory_in_any_order(tmp_path: Path, first: str) -> None:
    lines = ["dataset: one, two\n", "dataset_dir: here\n"]
    path = tmp_path / "sft.yaml"
    path.write_text("".join(lines if first == "dataset" else reversed(lines)))
    config, notices = loaded(file=path)
    assert config.chat.train == (ChatSource(path="here", dataset="one"), ChatSource(path="here", dataset="two"))
    assert any("dataset" in said and "here/dataset_info.json" in said for said in notices)
    assert loaded("dataset=three", file=path)[0].chat.train == (ChatSource(path="here", dataset="three"),)
    assert loaded("chat.train=x.jsonl", file=path)[0].chat.train == (ChatSource(path="x.jsonl"),)


def test_data_sets_lie_in_the_folder_data_if_none_is_named() -> None:
    config, _ = loaded("dataset=one", "eval_dataset=two")
    assert (config.chat.train[0].path, config.chat.eval) == ("data", (ChatSource(path="data", dataset="two"),))
    assert "no data set is named" in refusal("dataset_dir=there")[0]


@pytest.mark.parametrize(
    "order", [("finetuning_type: full", "lora_rank: 8"), ("lora_rank: 8", "finetuning_type: full")]
)
def test_all_weights_and_adapters_contradict_each_other(tmp_path: Path, order: tuple[str, str]) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text("\n".join(order) + "\n")
    (line,) = refusal(file=path)
    assert line.startswith(f"{path}:2: ") and f"{path}:1" in line and "contradict" in line and "keep one" in line
    path.write_text("finetuning_type: full\n")
    assert loaded(file=path)[0].adapter is None


TORCHTITAN = """\
job: {dump_folder: runs/t}
training: {local_batch_size: 2, seq_len: 128, max_norm: 1.0, steps: 50, mixed_precision_param: bfloat16}
parallelism: {tensor_parallel_degree: 2, pipeline_parallel_degree: 1, data_parallel_replicate_degree: 2}
optimizer: {name: AdamW, lr: 8.0e-4, eps: 1.0e-8}
lr_scheduler: {warmup_steps: 5, min_lr_factor: 0.1}
activation_checkpoint: {mode: full}
checkpoint: {enable: true, interval: 25, keep_latest_k: 2, async_mode: async}
metrics: {log_freq: 5, enable_tensorboard: false}
"""


def test_sections_of_torchtitan(tmp_path: Path) -> None:
    path = tmp_path / "titan.yaml"
    path.write_text(TORCHTITAN)
    config, _ = loaded(file=path)
    assert (config.run_dir, config.train.micro_batch_size, config.data.seq_length_tokens) == ("runs/t", 2, 128)
    assert (config.train.steps, config.train.precision, config.optim.clip_grad) == (50, "bf16", 1.0)
    assert (config.parallel.tp, config.parallel.dp, config.parallel.recompute) == (2, 2, "full")
    assert (config.optim.lr, config.optim.epsilon, config.optim.warmup_steps) == (8e-4, 1e-8, 5)
    assert config.optim.min_lr == pytest.approx(8e-5)
    assert (config.checkpoint.interval_steps, config.checkpoint.keep_last) == (25, 2)
    assert (config.log.interval_steps, config.log.tensorboard) == (5, False)


def test_sections_of_nemo_and_deepspeed(tmp_path: Path) -> None:
    path = tmp_path / "nemo.yaml"
    path.write_text(
        "trainer: {precision: bf16-mixed, max_steps: 30, gradient_clip_val: 0.5}\n"
        "model:\n  micro_batch_size: 2\n  encoder_seq_length: 64\n  optim: {name: fused_adam, lr: 1e-3}\n"
        "zero_optimization: {stage: 1}\ngradient_clipping: 0.5\n".replace("gradient_clipping: 0.5\n", "")
    )
    config, _ = loaded(file=path)
    assert (config.train.precision, config.train.steps, config.optim.clip_grad) == ("bf16", 30, 0.5)
    assert (config.train.micro_batch_size, config.data.seq_length_tokens, config.optim.lr) == (2, 64, 1e-3)
    assert config.parallel.distributed_optimizer is True


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("fp8=hybrid", ["fp8", "8-bit training is not supported", "train.precision=bf16"]),
        ("--fp8-format=hybrid", ["fp8_format", "8-bit training is not supported"]),
        ("train.fp8=true", ["train.fp8", "8-bit training is not supported"]),
        ("num_experts=8", ["mixtures of experts are not supported"]),
        ("moe_router_topk=2", ["mixtures of experts are not supported"]),
        ("zero_optimization.stage=3", ["zero_optimization.stage = 3 must be 0 or 1", "parallel.tp, parallel.pp"]),
        ("fsdp=full_shard", ["ZeRO", "parallel.distributed_optimizer"]),
        ("optimizer=muon", ["AdamW is the only optimizer"]),
        ("optim=adamw_8bit", ["AdamW is the only optimizer"]),
        ("normalization=LayerNorm", ["norms are RMSNorm"]),
        ("attention_dropout=0.1", ["dropout in the model is not supported"]),
        ("exp_manager.exp_dir=x", ["exp_manager.exp_dir", "run_dir"]),
        ("split=0,1", ["split", "949,50,1"]),
        ("eval_iters=0", ["eval_iters = 0", "data.eval_fraction=0"]),
        ("lora_target=embed", ["lora_target", "q_proj"]),
        ("val_size=100", ["val_size = 100", "a share"]),
        ("packing=maybe", ["must be true or false"]),
        ("num_layers_per_virtual_pipeline_stage=3", ["3 layers do not divide the 4 of a stage"]),
        ("warmup_ratio=much", ["warmup_ratio", "must be a number"]),
        ("--use-unsloth", ["use_unsloth = true", "Unsloth is not used"]),
        ("--moe-grouped-gemm", ["mixtures of experts are not supported"]),
    ],
)
def test_settings_without_a_counterpart(override: str, parts: list[str]) -> None:
    lines = refusal(override)
    assert len(lines) == 1
    assert all(part in lines[0] for part in parts), lines


def test_a_derived_value_that_contradicts_a_given_one_is_refused() -> None:
    (line,) = refusal("train.global_batch_size=8", "train.micro_batch_size=2", "gradient_accumulation_steps=2")
    assert "makes train.global_batch_size 4 (2 x micro batch 2 x parallel.dp 1), which is given as 8" in line
    config, _ = loaded("train.global_batch_size=4", "train.micro_batch_size=2", "gradient_accumulation_steps=2")
    assert config.train.global_batch_size == 4


def test_an_override_takes_the_place_of_a_derived_value_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("eval_iters: 2\n")
    assert loaded("train.eval_samples=5", file=path)[0].train.eval_samples == 5


@pytest.mark.parametrize("name", ["zzz", "fantastic_option", "train.qqq", "model.blub"])
def test_far_names_get_no_suggestion(name: str) -> None:
    (line,) = refusal(f"{name}=1")
    assert "nearest" not in line and "`llm-parallel fields" in line


def test_a_run_file_that_is_missing_before_options() -> None:
    (line,) = refusal("tp=2", file=Path("--tensor-model-parallel-size"))
    assert "write the run file first" in line


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("optim=adamw_8bit", "optim.moment_bits=8 holds its moments in 8 bits"),
        ("optim=paged_adamw_8bit", "They are not moved to the host"),
        ("additional_target=wte", "must be embed_tokens and lm_head"),
    ],
)
def test_what_is_not_there_is_refused_by_its_own_sentence(given: str, said: str) -> None:
    (line,) = refusal(given)
    assert said in line
    assert loaded("modules_to_save=null", "optim=adamw_torch")[0].adapter is None
