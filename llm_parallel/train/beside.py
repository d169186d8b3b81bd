"""The models that a run in rounds has beside the one that answers, critic and reward models: what their folders hold,
and whether that fits the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_parallel.checkpoint.folders import find_checkpoint
from llm_parallel.checkpoint.run_file import read_config
from llm_parallel.config.rules import check_layout, num_processes
from llm_parallel.config.rules_rounds import models_beside
from llm_parallel.config.tree import ModelConfig, RunConfig
from llm_parallel.config.tree_online import OF_POLICY
from llm_parallel.config.tree_tune import AdapterConfig
from llm_parallel.data.tokenizer import Tokenizer
from llm_parallel.errors import UserError
from llm_parallel.model.hf_config import hf_config_to_model
from llm_parallel.model.hf_files import check_weight_files, is_hf_folder, read_hf_config
from llm_parallel.train.inherit import changed_tokens

CRITIC = "critic"
"""Name of the second model that PPO trains, among a run's models."""


def model_in(path: str) -> ModelConfig:
    """The model that a folder holds: that of a run of PPO is its critic. Raises UserError."""
    if is_hf_folder(path):
        check_weight_files(path)
        return hf_config_to_model(read_hf_config(path))
    folder = find_checkpoint(path)
    critic = critic_in(folder)
    return read_config(folder).model if critic is None else critic


def critic_in(folder: Path) -> ModelConfig | None:
    """The critic that a checkpoint holds beside its policy, if it has one."""
    if read_config(folder).trains != "ppo":
        return None
    from llm_parallel.checkpoint.content import MODELS  # megatron-core takes seconds to import
    from llm_parallel.checkpoint.load import content_of

    described: dict[str, Any] = content_of(folder).get(MODELS) or {}
    return ModelConfig.model_validate(described[CRITIC]) if CRITIC in described else None


def critic_adapter(config: RunConfig) -> AdapterConfig | None:
    """The adapters of a run's critic, if it has them: those of the policy, but for the output projection."""
    adapter = config.adapter
    if adapter is None or not config.method.critic.adapters:
        return None
    return adapter.model_copy(update={"targets": tuple(name for name in adapter.targets if name != "lm_head")})


def adapter_in(path: str) -> AdapterConfig | None:
    """The adapters of the reward model that a folder holds, if it is a checkpoint of some."""
    return None if is_hf_folder(path) else read_config(find_checkpoint(path)).adapter


def critic_model(config: RunConfig) -> ModelConfig:
    """The critic of a run. Raises UserError."""
    load = config.method.critic.load
    model = config.model if load == OF_POLICY else model_in(load)
    return model.model_copy(update={"value_head": True})


def check_beside(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Raises UserError if a critic or a reward model has another tokenizer than the policy, or cannot be divided as the
    run's layout divides it, or if what is to be a reward model gives no values."""
    for field, path in models_beside(config):
        assert path is not None  # or the judges were refused
        try:
            model = model_in(path)
        except UserError as error:
            raise UserError(f"{field} = {path} cannot be taken: {error}") from None
        if field != "method.critic.load" and not model.value_head:
            raise UserError(
                f"{field} = {path} holds a language model, which gives texts no value; give a run of method.kind = "
                "reward, or a Hugging Face folder of a model for sequence classification with one label"
            )
        changed = changed_tokens(path, tokenizer)
        if changed or (model.vocab_size or 0) < tokenizer.vocab_size:
            what = (
                f"{changed:,} tokens of its tokenizer are other texts than in"
                if changed
                else "it has fewer tokens than"
            )
            raise UserError(
                f"{field} = {path} cannot read the answers, since {what} data.tokenizer = {config.data.tokenizer}; "
                "give a model with the tokenizer of the policy"
            )
        try:
            check_layout(config.model_copy(update={"model": model}), num_processes(config))
        except UserError as error:
            said = "; ".join(str(error).splitlines())
            raise UserError(f"{field} = {path} is a model that the run's layout does not divide: {said}") from None
