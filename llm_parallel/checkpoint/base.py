"""The frozen weights under adapters: loaded from the model that the adapters were made for, and recognised again.

A checkpoint of adapters does not hold them. It holds where they were and their fingerprint, which is the same whatever
layout, precision or kind of folder they are loaded from, and another for a model that differs in one bit.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm_parallel.checkpoint.content import BASE, MODELS
from llm_parallel.checkpoint.folders import find_checkpoint
from llm_parallel.checkpoint.load import DAMAGE, content_of, load_weights
from llm_parallel.checkpoint.run_file import CONFIG_NAME, read_config
from llm_parallel.checkpoint.tensors import CheckpointTensors
from llm_parallel.config.tree import ModelConfig
from llm_parallel.errors import UserError
from llm_parallel.model.architecture import check_same_architecture
from llm_parallel.model.hf import is_hf_folder, load_hf_weights
from llm_parallel.model.hf_files import is_peft_folder
from llm_parallel.model.peft_files import PeftFolder, load_peft
from llm_parallel.model.tensors import EMBEDDING, Role, kind_of, weights_of
from llm_parallel.parallel.engine import Network
from llm_parallel.parallel.groups import Groups


class Fingerprint:
    """Sums the bit patterns of all weights as they stand in the files, in fp32, each tensor's times a number that its
    name gives. Rows of zeros, which round a vocabulary up, add nothing."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._sum = torch.zeros(1, dtype=torch.int64)

    def add(self, chunk: Any, name: str, values: Tensor) -> None:
        """Counts this process's part of a tensor, unless another process counts it."""
        at = self._groups.at
        copied = name == EMBEDDING.name and not chunk.pre_process  # a tied output projection
        first = at.dp == 0 and at.cp == 0 and (kind_of(name).sharded_dim is not None or at.tp == 0)
        if first and not copied:
            factor = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little") | 1
            bits = values.float().contiguous().view(torch.int32)
            self._sum += bits.sum(dtype=torch.int64).cpu() * factor

    def value(self) -> str:
        """The sum over all processes, as 16 digits. Collective."""
        total = self._sum.to(self._groups.platform.device)
        dist.all_reduce(total)
        return f"{int(total) & (2**64 - 1):016x}"


@torch.no_grad()
def load_base(path: str | Path, network: Network) -> list[str]:
    """Loads the weights under a network's adapters from a Hugging Face folder or one of our checkpoints, one matrix at
    a time, and notes their fingerprint. Returns the names of the folder's tensors that the model does not use.

    Every process of the job calls this. Raises UserError if there is no such model, or it is another one.
    """
    assert network.base is not None
    fingerprint, unused = Fingerprint(network.groups), list[str]()
    folder = Path(path) if is_hf_folder(path) else find_checkpoint(path)  # the one of now: a run's latest may change
    if is_hf_folder(path):
        unused = load_hf_weights(folder, network.models, fingerprint.add)
    else:
        _load_from_checkpoint(folder, network, fingerprint)
    network.base.path, network.base.fingerprint = str(folder.absolute()), fingerprint.value()
    return unused


def path_of_base(folder: Path, content: dict[str, Any]) -> str:
    """Where the weights under the adapters of a checkpoint are. Raises UserError if they are not there."""
    configured = read_config(folder).checkpoint.load
    for path in (content[BASE]["path"], configured):
        if path is not None and Path(path).exists():
            return path
    raise UserError(
        f"{folder} holds adapters of the model in {content[BASE]['path']}, which does not exist; put it there, or its "
        f"path as checkpoint.load into {folder / CONFIG_NAME}"
    )


def load_adapters(path: str | Path, network: Network) -> None:
    """Loads adapters from a PEFT folder or one of our checkpoints of adapters. Raises UserError if they do not fit."""
    if is_peft_folder(path):
        load_peft(PeftFolder(path), network)
    else:
        load_weights(path, network)


@torch.no_grad()
def load_trunk(path: str | Path, network: Network) -> None:
    """Loads one of our checkpoints of a language model into a network with a value head, which stays as it is. Raises
    UserError if it is another model."""
    _load_from_checkpoint(find_checkpoint(path), network, Fingerprint(network.groups), ("value_head",))


@torch.no_grad()
def load_other(path: str | Path, name: str, network: Network) -> None:
    """Loads the weights of a model that one of our checkpoints holds besides the policy. Raises UserError if it is
    another model."""
    folder = find_checkpoint(path)
    theirs = ModelConfig.model_validate(content_of(folder)[MODELS][name])
    check_same_architecture(folder, theirs, network.models[0].model_config)
    _read_weights(folder, network, Fingerprint(network.groups), of=f"{name}.")


def _load_from_checkpoint(
    folder: Path, network: Network, fingerprint: Fingerprint, but_for: tuple[str, ...] = ()
) -> None:
    if base := content_of(folder).get(BASE):
        raise UserError(
            f"{folder} holds adapters, and no model under them; give theirs, checkpoint.load={base['path']}, and "
            f"adapter.load={folder} to begin from these adapters"
        )
    theirs, ours = read_config(folder).model, network.models[0].model_config
    if network.base is not None and ours.value_head and not theirs.value_head:  # under a new head
        but_for = ("value_head",)
    check_same_architecture(folder, theirs, ours, but_for)
    _read_weights(folder, network, fingerprint, without_value=bool(but_for))


def _read_weights(
    folder: Path, network: Network, fingerprint: Fingerprint, of: str = "", without_value: bool = False
) -> None:
    """``of``: what the keys of the model's tensors begin with; ``without_value``: whether the value head is left as it
    is."""
    mesh, at = network.groups.mesh, network.groups.at
    try:
        tensors = CheckpointTensors(folder, of)
        for chunk in network.models:
            for name, weight in weights_of(chunk):
                kind = kind_of(name)
                if without_value and kind.role is Role.VALUE:
                    continue
                size = weight.shape[kind.piece_dim] * (1 if kind.sharded_dim is None else mesh.tp)
                parts = [tensors.rows(name, wanted) for wanted in kind.shard(size, mesh.tp, at.tp)]
                values = torch.cat(parts, dim=kind.piece_dim)
                fingerprint.add(chunk, name, values)
                weight.copy_(values)
    except DAMAGE as error:
        raise UserError(f"{folder} cannot be read ({error}); it is damaged: give another model") from error
