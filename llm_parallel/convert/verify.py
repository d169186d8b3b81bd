"""Compares a Hugging Face folder, as transformers reads it, with our checkpoint of the same model."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from llm_parallel.checkpoint.folders import find_checkpoint
from llm_parallel.checkpoint.run_file import read_config
from llm_parallel.checkpoint.tensors import CheckpointTensors
from llm_parallel.config.tree import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from llm_parallel.errors import UserError
from llm_parallel.generate.forward import pipeline_logits
from llm_parallel.generate.load import describe_folder, load_model
from llm_parallel.model.flops import parameter_count
from llm_parallel.model.gpt import build_policy
from llm_parallel.model.hf import HfReader, is_hf_folder, read_rows
from llm_parallel.model.hf_files import is_peft_folder
from llm_parallel.model.peft_files import PeftFolder
from llm_parallel.model.tensors import all_names, canonical_parameters, kind_of
from llm_parallel.parallel.groups import close_groups, open_groups
from llm_parallel.parallel.layout import Layout
from llm_parallel.parallel.platform import open_platform
from llm_parallel.versions import parse

PROBE_TOKENS = 64
LIMIT = 1e-3
"""Largest difference of logits, relative to the largest logit, that rounding in fp32 explains: 80 layers stay below
1e-4."""
ROUNDED_LIMIT = 0.1
"""The same where weights of one side were rounded to bf16 or fp16: a relative 2^-9 for each weight."""
USED_SHARE = 0.7
"""Share of the available memory that one model in fp32 may take; the rest is for activations and one file's tensors."""


@dataclass(frozen=True)
class Outcome:
    """What was compared: ``layers`` of the model's ``num_layers``, and the largest difference and size of logits."""

    difference: float
    largest: float
    tokens: int
    layers: int
    num_layers: int

    def sentence(self) -> str:
        """The result, with what it was measured on."""
        part = f"all {self.layers} layers" if self.layers == self.num_layers else f"the first {self.layers} layers"
        rest = "" if self.layers == self.num_layers else f"; the tensors of all {self.num_layers} are equal bit for bit"
        return (
            f"largest logit difference from transformers {metadata.version('transformers')}: {self.difference:.1e} of "
            f"logits up to {self.largest:.1f} ({self.tokens} random tokens through {part}, weights as stored, fp32 "
            f"compute){rest}"
        )


def verify(folder: Path, checkpoint: Path, *, rounded: bool = False) -> str:
    """Compares the logits of a Hugging Face folder in transformers with those of our checkpoint, and says the result in
    a sentence. One model at a time is in memory, in fp32 on the CPU: 4 bytes for each parameter. Where that is more
    than the machine has, the first layers are compared that fit, and all tensors bit for bit.

    rounded: the weights of one side were rounded on purpose. Raises UserError if the two are not the same model.
    """
    if importlib.util.find_spec("transformers") is None:
        return "written as read, and not compared with transformers, which is not installed"
    model = read_config(find_checkpoint(checkpoint)).model
    layers = layers_that_fit(model, int(psutil.virtual_memory().available * USED_SHARE))
    if layers == 0:
        needed = 4 * parameter_count(model.model_copy(update={"num_layers": 1})).total / 1e9
        return (
            "written as read, and not compared with transformers: one layer with the embeddings needs "
            f"{needed:.1f} GB of memory"
        )
    if layers < model.num_layers and not rounded:
        _refuse_other_tensors(folder, checkpoint, model)
    tokens = _tokens(model)
    try:
        theirs = their_logits(folder, tokens, layers)
    except Exception as error:  # transformers raises errors of many kinds, all of which mean the same here
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        version = metadata.version("transformers")
        return f"written as read, and not compared: transformers {version} cannot load {folder} ({first})"
    gc.collect()
    ours = our_logits(checkpoint, _shortened(model, layers), tokens)
    said = _judged(ours, theirs, layers, model.num_layers, (folder, checkpoint), rounded)
    return said + (", with weights rounded to the dtype that was asked for" if rounded else "")


def verify_adapters(source: str | Path, written: Path) -> str:
    """The same for adapters: the merged model in transformers, or the PEFT folder in peft, against the adapters and the
    model under them as we load them. Compares all layers or, where they do not fit into memory, none."""
    needs = ["transformers", "peft"] if is_peft_folder(written) else ["transformers"]
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"not compared: {' and '.join(missing)}, in which the written model would compute the same numbers once "
            f"more, {'is' if len(missing) == 1 else 'are'} not installed"
        )
    config = describe_folder(source)
    model = config.model
    if layers_that_fit(model, int(psutil.virtual_memory().available * USED_SHARE)) < model.num_layers:
        return (
            f"not compared with transformers: two models of {4 * parameter_count(model).total / 1e9:.1f} GB in fp32, "
            "one after the other, do not fit into this machine's memory"
        )
    folder = Path(PeftFolder(written).base_path()) if is_peft_folder(written) else written
    if not is_hf_folder(folder):
        return (
            f"not compared with peft, which loads folders of Hugging Face alone: the model under these adapters, "
            f"{folder}, is a checkpoint of ours. To use them with peft, write that model by `llm-parallel convert "
            f"{folder} TARGET`, and name TARGET as base_model_name_or_path in {written / 'adapter_config.json'}"
        )
    tokens = _tokens(model)
    theirs = their_logits(folder, tokens, model.num_layers, written if is_peft_folder(written) else None)
    gc.collect()
    loaded = load_model(source, "cpu", "fp32")
    try:
        with torch.no_grad():
            ours = pipeline_logits(loaded.models, tokens)
    finally:
        close_groups()
    assert ours is not None, "one process is the last stage"
    folders = (written, Path(source))
    if is_peft_folder(written) and config.adapter is not None and config.adapter.base != "full":
        # peft has the matrices as they are in the files; how far those are from ours is no error.
        outcome = _outcome(ours, theirs, model.num_layers, model.num_layers)
        return f"{outcome.sentence()}; the adapters were trained on matrices in {config.adapter.base}"
    with HfReader(folder) as reader:
        rounded = not is_peft_folder(written) and reader.dtype() is not torch.float32
    return _judged(ours, theirs, model.num_layers, model.num_layers, folders, rounded)


def _outcome(ours: Tensor, theirs: Tensor, layers: int, num_layers: int) -> Outcome:
    difference, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    return Outcome(difference, largest, theirs.shape[1], layers, num_layers)


def _judged(
    ours: Tensor, theirs: Tensor, layers: int, num_layers: int, folders: tuple[Path, Path], rounded: bool
) -> str:
    """The sentence about two models' logits. Raises UserError if they are further apart than rounding explains."""
    outcome = _outcome(ours, theirs, layers, num_layers)
    limit = (ROUNDED_LIMIT if rounded else LIMIT) * max(outcome.largest, 1.0)
    if not outcome.difference <= limit:  # so that not-a-number is refused too
        raise UserError(
            f"{folders[0]} in transformers and {folders[1]} are not the same model: {outcome.sentence()}; do not use "
            "what was written, and report this"
        )
    return outcome.sentence()


def layers_that_fit(model: ModelConfig, available_bytes: int) -> int:
    """How many of a model's layers fit into memory in fp32, with its embeddings; all at most."""
    count = parameter_count(model)
    beside = count.total - count.num_layers * count.per_layer
    return max(min((available_bytes // 4 - beside) // count.per_layer, model.num_layers), 0)


def _shortened(model: ModelConfig, layers: int) -> ModelConfig:
    """The first layers of a model."""
    kept = tuple(layer for layer in model.layers_without_rope if layer < layers)
    return model.model_copy(update={"num_layers": layers, "layers_without_rope": kept})


def _tokens(model: ModelConfig) -> Tensor:
    length = min(PROBE_TOKENS, model.max_seq_length_tokens)
    return torch.randint(0, model.vocab_size or 1, (1, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def our_logits(checkpoint: Path, model: ModelConfig, tokens: Tensor) -> Tensor:
    """Logits fp32 [1, s, v] of the first layers of a checkpoint, ``model``, in fp32 on the CPU."""
    config = RunConfig(
        device="cpu",
        model=model,
        parallel=ParallelConfig(sequence_parallel=False),
        train=TrainConfig(precision="fp32"),
    )
    stored = CheckpointTensors(find_checkpoint(checkpoint))
    groups = open_groups(Layout.from_config(config, 1), 0, open_platform("cpu"), 0)
    try:
        network = build_policy(config, groups)
        for name, parameter in canonical_parameters(network.models[0]):
            # Another layout may have padded the vocabulary to more rows.
            parameter.copy_(stored.read(name)[: parameter.shape[0]])
        logits = pipeline_logits(network.models, tokens)
    finally:
        close_groups()
    assert logits is not None, "one process is the last stage"
    return logits


@torch.no_grad()
def their_logits(folder: Path, tokens: Tensor, layers: int, adapters: Path | None = None) -> Tensor:
    """Logits fp32 [1, s, v] that transformers gives with the first layers of a Hugging Face folder in fp32, with the
    adapters of a PEFT folder if one is given."""
    from transformers import AutoConfig, AutoModelForCausalLM

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with _quiet():
        config = AutoConfig.from_pretrained(folder, **local)
        if layers < config.num_hidden_layers:
            config.num_hidden_layers = layers
            for name in ("layer_types", "no_rope_layers"):
                if getattr(config, name, None):
                    setattr(config, name, getattr(config, name)[:layers])
        dtype = "dtype" if parse(metadata.version("transformers")) >= (4, 56) else "torch_dtype"
        options: dict[str, Any] = {dtype: torch.float32, **local}
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, **options).eval()
        if adapters is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapters).eval()
        return model(input_ids=tokens).logits.float()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and warnings: layers that are left out on purpose would be listed."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _refuse_other_tensors(folder: Path, checkpoint: Path, model: ModelConfig) -> None:
    """Raises UserError that names the first tensor in which the two differ. Two tensors at a time are in memory."""
    stored = CheckpointTensors(find_checkpoint(checkpoint))
    with HfReader(folder) as reader:
        for name in all_names(model):
            kind = kind_of(name)
            rows = range(kind.shape(model)[kind.piece_dim])
            theirs = torch.cat(list(read_rows(reader, name, model, rows)), dim=kind.piece_dim)
            ours = stored.read(name).narrow(kind.piece_dim, 0, len(rows))
            if not torch.equal(ours, theirs.to(ours.dtype)):
                raise UserError(f"{name} in {checkpoint} is not what {folder} holds; convert again, and report this")
