"""Adapters → PEFT's files, or merged into the weights under them, one matrix at a time."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from llm_parallel.checkpoint.base import path_of_base
from llm_parallel.checkpoint.folders import find_checkpoint
from llm_parallel.checkpoint.load import content_of
from llm_parallel.checkpoint.run_file import TOKENIZER_NAME, read_config
from llm_parallel.checkpoint.tensors import CheckpointTensors
from llm_parallel.config.tree import ModelConfig, RunConfig
from llm_parallel.convert.export import write_hf_folder
from llm_parallel.convert.settings import CARRIED, carry
from llm_parallel.errors import UserError
from llm_parallel.files import copy_inside, folder_in_whole, refuse_outside
from llm_parallel.generate.load import describe_folder
from llm_parallel.lines import say
from llm_parallel.model import dora
from llm_parallel.model.adapters import PROJECTIONS, targets_of, whole_delta, whole_rows_met
from llm_parallel.model.hf import HfReader, is_hf_folder, read_rows
from llm_parallel.model.hf_config import family_of
from llm_parallel.model.hf_families import FAMILIES
from llm_parallel.model.hf_files import is_peft_folder, read_hf_config
from llm_parallel.model.peft_files import (
    SCORE,
    PeftFolder,
    peft_tensors,
    peft_vocabulary_tensors,
    peft_whole_tensor,
    write_peft,
)
from llm_parallel.model.quant import QuantizedMatrix
from llm_parallel.model.tensors import ADAPTER_MARK, EMBEDDING, LAYERS, OUTPUT, VALUE, Role, kind_of, split_name
from llm_parallel.model.vocabulary_adapters import EMBED_TOKENS, LM_HEAD, PREFIXES, WEIGHTS, vocabulary_delta

OF_VOCABULARY = {weight: name for name, weight in WEIGHTS.items()}
"""Hugging Face's names of the embedding and the output projection, by ours."""
Factors = Callable[[int, str], tuple[Tensor, Tensor]]
"""Whole A and B of the adapter of one linear, by layer and linear."""


def base_of(source: str | Path) -> str:
    """Path of the weights under the adapters in a checkpoint or a PEFT folder. Raises UserError if they are gone."""
    if is_peft_folder(source):
        return PeftFolder(source).base_path()
    folder = find_checkpoint(source)
    return path_of_base(folder, content_of(folder))


Magnitudes = Callable[[int, str, Tensor], Tensor]
"""Of DoRA: magnitudes of the rows of one linear's whole weight, by layer, linear and the weight itself in fp32."""


def _magnitudes(source: str | Path, model: ModelConfig) -> Magnitudes:
    """A PEFT folder holds them, and a checkpoint their differences from the norms of the weight's rows."""
    if is_peft_folder(source):
        peft = PeftFolder(source)
        return lambda layer, linear, weight: peft.magnitudes(model, layer, linear).float()
    tensors = CheckpointTensors(find_checkpoint(source))

    def read(layer: int, linear: str, weight: Tensor) -> Tensor:
        return weight.norm(dim=1) + tensors.read(f"{LAYERS}{layer}.{linear}{ADAPTER_MARK}m").float()

    return read


def _factors(source: str | Path, model: ModelConfig) -> Factors:
    if is_peft_folder(source):
        peft = PeftFolder(source)
        peft.check(model)
        return lambda layer, linear: peft.factors(model, layer, linear)
    tensors = CheckpointTensors(find_checkpoint(source))

    def read(layer: int, linear: str) -> tuple[Tensor, Tensor]:
        name = f"{LAYERS}{layer}.{linear}{ADAPTER_MARK}"
        return tensors.read(name + "a"), tensors.read(name + "b")

    return read


class _Vocabulary:
    """What adapters hold of the embedding, the output projection and a value head, without rows that round the
    vocabulary up."""

    def __init__(self, source: str | Path, model: ModelConfig) -> None:
        self._peft = PeftFolder(source) if is_peft_folder(source) else None
        self._tensors = None if self._peft else CheckpointTensors(find_checkpoint(source))
        self._model = model

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Whole A and B of an adapter."""
        if self._peft is not None:
            return self._peft.vocabulary_factors(name)
        a, b = (self._read(f"{PREFIXES[name]}{factor}") for factor in "ab")
        size = self._model.vocab_size
        return (a[:size], b) if name == EMBED_TOKENS else (a, b[:size])

    def whole(self, name: str) -> Tensor:
        """A weight that was trained whole."""
        if self._peft is not None:
            return self._peft.whole(name)
        shared = name == LM_HEAD and self._model.tie_embeddings
        return self._read(EMBEDDING.name if shared else WEIGHTS[name])[: self._model.vocab_size]

    def head(self) -> Tensor:
        """The value head of a reward model."""
        return self._peft.head() if self._peft is not None else self._read(VALUE.name)

    def _read(self, name: str) -> Tensor:
        assert self._tensors is not None
        return self._tensors.read(name)


class MergedTensors:
    """The weights under adapters with the adapters added, by canonical name, in the dtype of the weights. Where the
    adapters were trained on matrices in few bits, these are what is merged; ``rounding``: their relative distance from
    the matrices of the files, as a root mean square."""

    def __init__(self, base: Callable[[str], Tensor], source: str | Path, config: RunConfig) -> None:
        self._base, self._config, self._tied = base, config, config.model.tie_embeddings
        self._factors = _factors(source, config.model)
        self._magnitudes = _magnitudes(source, config.model)
        self._vocabulary = _Vocabulary(source, config.model)
        self._lost = self._whole = 0.0

    @property
    def rounding(self) -> float:
        """0 where nothing was rounded."""
        return (self._lost / self._whole) ** 0.5 if self._whole else 0.0

    def read(self, name: str) -> Tensor:
        """The whole tensor ``name``."""
        if name == VALUE.name:
            return self._vocabulary.head()
        in_base = EMBEDDING.name if name == OUTPUT.name and self._tied else name
        weight, (kind, layer) = self._base(in_base), split_name(name)
        linear, adapter = kind.name.removesuffix(".weight"), self._config.adapter
        assert adapter is not None
        if name in OF_VOCABULARY:
            return self._of_vocabulary(OF_VOCABULARY[name], weight)
        if layer is None or linear not in PROJECTIONS or kind.role is Role.BIAS:
            return weight
        held = self._as_held(weight, adapter.base)
        if targets_of(linear, adapter):
            model = self._config.model
            delta = whole_delta(model, adapter, linear, *self._factors(layer, linear))
            if adapter.dora:
                magnitudes = self._magnitudes(layer, linear, held)
                held = dora.merged(held, delta, magnitudes, whole_rows_met(model, adapter, linear))
            else:
                held = held + delta
        return held.to(weight.dtype)

    def _of_vocabulary(self, name: str, weight: Tensor) -> Tensor:
        """The embedding or the output projection, with its adapter or as it was trained whole."""
        adapter = self._config.adapter
        assert adapter is not None
        weight = weight[: self._config.model.vocab_size]
        if name in adapter.modules_to_save:
            return self._vocabulary.whole(name).to(weight.dtype)
        if name not in adapter.targets:
            return weight
        return (weight.float() + vocabulary_delta(adapter, name, *self._vocabulary.factors(name))).to(weight.dtype)

    def magnitudes(self, layer: int, linear: str) -> Tensor | None:
        """Of DoRA: magnitudes of the rows of one linear's whole weight; else None."""
        adapter = self._config.adapter
        assert adapter is not None
        if not adapter.dora:
            return None
        weight = self._as_held(self._base(f"{LAYERS}{layer}.{linear}.weight"), adapter.base)
        return self._magnitudes(layer, linear, weight)

    def _as_held(self, weight: Tensor, kind: str) -> Tensor:
        """A matrix in fp32 as it was under the adapters in training."""
        values = weight.float()
        if kind == "full":
            return values
        rows, columns = values.shape
        matrix = QuantizedMatrix(kind, rows, range(columns), columns, values.device, None)  # type: ignore[arg-type]
        held = matrix.copy_(values).values(torch.float32)
        self._lost += float((held - values).square().sum())
        self._whole += float(values.square().sum())
        return held


@contextmanager
def merged_tensors(source: str | Path) -> Iterator[MergedTensors]:
    """While inside, the tensors of an adapter's model with the adapter added can be read."""
    config, base = describe_folder(source), base_of(source)
    with ExitStack() as opened:
        if is_hf_folder(base):
            reader = opened.enter_context(HfReader(base))
            reader.check()
            read = _hf_tensor(reader, config.model)
        else:
            read = CheckpointTensors(find_checkpoint(base)).read
        yield MergedTensors(read, source, config)


def _hf_tensor(reader: HfReader, model: ModelConfig) -> Callable[[str], Tensor]:
    def read(name: str) -> Tensor:
        kind = kind_of(name)
        [*parts] = read_rows(reader, name, model, range(kind.shape(model)[kind.piece_dim]))
        return torch.cat(parts, dim=kind.piece_dim)

    return read


def export_merged(
    source: str | Path, target: str | Path, max_shard_bytes: int = 5 * 10**9, dtype: torch.dtype | None = None
) -> Path:
    """Writes the model under adapters with the adapters added, as a Hugging Face folder; returns it. Tokenizer and
    settings are those beside the adapters, and for what is not there those of the model."""
    base = Path(base_of(source))
    with tempfile.TemporaryDirectory() as folder, merged_tensors(source) as tensors:
        settings = Path(folder)
        beside = settings / TOKENIZER_NAME
        if is_hf_folder(base):
            carry(base, settings)
        elif (theirs := find_checkpoint(base) / TOKENIZER_NAME).is_dir():
            copy_inside(theirs, beside)
        for path in _tokenizer_files(source):
            beside.mkdir(exist_ok=True)
            shutil.copy2(path, beside / path.name)
        config = untied(describe_folder(source))
        written = write_hf_folder(tensors, config, settings, target, max_shard_bytes, dtype)
        if tensors.rounding and config.adapter is not None:
            say(
                f"the matrices under the adapters were merged in {config.adapter.base}, as in training; they differ "
                f"from those of {base} by {tensors.rounding:.2%} (root mean square)"
            )
        return written


def untied(config: RunConfig) -> RunConfig:
    """The configuration of a model with its adapters merged. Tied embeddings with adapters become two matrices."""
    adapter = config.adapter
    if adapter is None or not config.model.tie_embeddings or not set(OF_VOCABULARY.values()) & set(adapter.targets):
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"tie_embeddings": False})})


def _tokenizer_files(source: str | Path) -> list[Path]:
    """Files of the tokenizer and the settings beside adapters."""
    folder = Path(source) if is_peft_folder(source) else find_checkpoint(source) / TOKENIZER_NAME
    found = folder.iterdir() if folder.is_dir() else ()
    files = [path for path in found if path.is_file() and any(path.match(pattern) for pattern in CARRIED)]
    for path in files:
        refuse_outside(path, folder)
    return files


def export_to_peft(source: str | Path, target: str | Path) -> Path:
    """Writes a checkpoint's adapters as a PEFT folder; returns it. Raises UserError if the target is not empty, or the
    model's family keeps several projections in one module, for which PEFT has one pair of factors."""
    folder, target = find_checkpoint(source), Path(target)
    config, base = read_config(folder), base_of(source)
    assert config.adapter is not None
    name = read_hf_config(base)["model_type"] if is_hf_folder(base) else family_of(config.model, None)
    if FAMILIES[name].fused:
        raise UserError(
            f"{name} keeps several projections in one module, so that PEFT cannot have the adapters in {folder}; merge "
            "them with --merge"
        )
    with folder_in_whole(target) as making, merged_tensors(source) as merged:
        read, found = _factors(source, config.model), dict[str, Tensor]()
        for layer in range(config.model.num_layers):
            for linear in PROJECTIONS:
                if targets_of(linear, config.adapter):
                    factors = (*read(layer, linear), merged.magnitudes(layer, linear))
                    found |= peft_tensors(config.model, config.adapter, layer, linear, *factors)
        vocabulary = _Vocabulary(source, config.model)
        for part in set(config.adapter.targets) & set(OF_VOCABULARY.values()):
            found |= peft_vocabulary_tensors(config.model, part, *vocabulary.factors(part))
        for part in config.adapter.modules_to_save:
            found |= peft_whole_tensor(config.model, part, vocabulary.whole(part))
        if config.model.value_head:
            found[SCORE] = vocabulary.head().clone()
        write_peft(making, found, config.adapter, base, config.model)
        for path in _tokenizer_files(folder):
            if path.name != "config.json":  # that of the model, by which the folder would be taken for one
                shutil.copy2(path, making / path.name)
    return target
