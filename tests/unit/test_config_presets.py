"""Presets against published parameter counts, and the run files in configs/."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_parallel.config.load import load_config
from llm_parallel.config.presets import MODEL_PRESETS
from llm_parallel.config.rules import find_problems, num_processes
from llm_parallel.config.tree import ModelConfig, RopeScaling
from llm_parallel.model.flops import parameter_count

CONFIGS = Path(__file__).parents[2] / "configs"

# Elements of the published checkpoints' safetensors, from their model cards on the Hugging Face hub.
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-34b": 33_743_970_304,  # Code Llama 34B, whose vocabulary is also 32,000
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "smollm2-135m": 134_515_008,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
}


def model(preset: str) -> ModelConfig:
    return load_config(None, [f"model.preset={preset}"]).model


def count(config: ModelConfig) -> int:
    hidden, head = config.hidden_size, config.kv_channels
    assert config.vocab_size is not None
    attention = 2 * hidden * head * (config.num_attention_heads + config.num_query_groups)
    layer = attention + 3 * hidden * config.ffn_hidden_size + 2 * hidden
    layer += head * (config.num_attention_heads + 2 * config.num_query_groups) if config.qkv_bias else 0
    layer += 2 * head if config.qk_norm else 0
    embeddings = config.vocab_size * hidden * (1 if config.tie_embeddings else 2)
    return embeddings + config.num_layers * layer + hidden


@pytest.mark.parametrize("preset", PUBLISHED)
def test_parameter_count_is_the_published_one(preset):
    assert count(model(preset)) == parameter_count(model(preset)).total == PUBLISHED[preset]


def test_every_published_preset_is_counted():
    assert set(MODEL_PRESETS) - set(PUBLISHED) == {"tiny", "debug"}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_widths_fit_tensor_parallelism(preset):
    found = model(preset)
    assert found.kv_channels * found.num_attention_heads == found.hidden_size
    largest = {"smollm2-135m": 3, "qwen2.5-7b": 4}.get(preset, 8)
    assert found.ffn_hidden_size % largest == found.num_query_groups % largest == 0


def test_values_that_no_parameter_count_shows():
    assert [model(name).rope_base for name in ("llama2-7b", "llama3-8b", "smollm2-135m")] == [1e4, 5e5, 1e5]
    assert [model(name).max_seq_length_tokens for name in ("llama2-70b", "llama3-70b", "llama3.1-8b")] == [
        4096,
        8192,
        131072,
    ]
    assert model("llama3-8b").rope_scaling is None
    assert model("llama3.1-8b").rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    )
    for name in PUBLISHED:
        assert model(name).norm_epsilon == (1e-6 if name.startswith("qwen") else 1e-5)


@pytest.mark.parametrize("name", ["tiny", "debug"])
def test_small_presets_take_the_vocabulary_from_the_tokenizer(name):
    assert model(name).vocab_size is None


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*x[0-9]*.yaml")), ids=lambda path: path.stem)
def test_run_file_fits_the_machines_in_its_name(path):
    gpus = int(path.stem.rpartition("x")[2])
    notices: list[str] = []
    config = load_config(path, notice=notices.append)
    assert num_processes(config) == gpus
    assert find_problems(config, gpus, "cuda") == []
    assert notices == []
    assert path.stem.startswith(str(config.model.preset))


def test_there_are_run_files_to_check():
    assert len(list(CONFIGS.glob("*x[0-9]*.yaml"))) >= 3


@pytest.mark.parametrize(
    "path", sorted(path for path in CONFIGS.glob("*.yaml") if path.stem != "first-sweep"), ids=lambda path: path.stem
)
def test_every_run_file_is_a_run_that_the_rules_allow(path):
    """A sweep is no run file. A run file that takes its model from a checkpoint has no vocabulary of its own."""
    notices: list[str] = []
    overrides = [] if load_config(path).data.tokenizer else ["model.vocab_size=4096"]
    config = load_config(path, overrides, notice=notices.append)
    assert find_problems(config, num_processes(config), "cuda" if "x" in path.stem else "cpu") == []
    assert notices == []
