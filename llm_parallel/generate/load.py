"""Loads a model and its tokenizer from any folder that holds one, into this process."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm_parallel.checkpoint.base import load_adapters, load_base, path_of_base
from llm_parallel.checkpoint.folders import find_checkpoint
from llm_parallel.checkpoint.load import content_of, load_weights
from llm_parallel.checkpoint.run_file import read_config
from llm_parallel.config.rules import check_layout, check_model
from llm_parallel.config.tree import DataConfig, KernelsConfig, ParallelConfig, RunConfig
from llm_parallel.data.tokenizer import Tokenizer, load_tokenizer
from llm_parallel.errors import UserError
from llm_parallel.generate.adapters import AdapterBank, load_bank, settings_of
from llm_parallel.generate.deterministic import deterministic_notice
from llm_parallel.generate.held import FEW_BITS, Held
from llm_parallel.generate.weights import check_packable, difference, pack_network, sample_tokens, text_logits
from llm_parallel.lines import note
from llm_parallel.model.flops import parameter_count
from llm_parallel.model.gpt import LlamaModel, build_policy
from llm_parallel.model.hf import HfReader, is_hf_folder, load_hf_weights
from llm_parallel.model.hf_config import hf_config_to_model
from llm_parallel.model.hf_files import is_peft_folder
from llm_parallel.model.peft_files import PeftFolder
from llm_parallel.parallel.engine import Network
from llm_parallel.parallel.groups import Groups, close_groups, open_groups
from llm_parallel.parallel.layout import Layout
from llm_parallel.parallel.platform import open_platform, resolve_device

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class Loaded:
    """A model on this process's device; ``tokenizer`` is None where none lies beside the weights; ``folder``: the one
    that was loaded, of a run the checkpoint."""

    config: RunConfig
    network: Network
    tokenizer: Tokenizer | None
    folder: Path
    bank: AdapterBank | None = None

    @property
    def models(self) -> list[LlamaModel]:
        """The network's chunks."""
        return list(self.network.models)


def newest(path: str | Path) -> str:
    """The checkpoint that a run or a folder of checkpoints means now; other folders are returned as they are. A run may
    save another one at any time, so a command asks once."""
    if not (is_hf_folder(path) or is_peft_folder(path)):
        with suppress(UserError):
            return str(find_checkpoint(path))
    return str(path)


def newest_said(path: str) -> str:
    """As ``newest``, and says which checkpoint it is."""
    meant = newest(path)
    if meant != path:
        note(f"[the checkpoint is {meant}]")
    return meant


def describe_folder(path: str | Path) -> RunConfig:
    """Configuration of the model in a Hugging Face folder, in one of our run, checkpoints or ``iter_…`` folders, or
    under the adapter in a PEFT folder, set for one process. Raises UserError if there is no model."""
    if not Path(path).exists():
        raise UserError(
            f"{path} does not exist; give a run, a checkpoint or a Hugging Face folder on this machine: models are not "
            "downloaded"
        )
    if is_peft_folder(path):
        return _describe_peft(path)
    if is_hf_folder(path):
        with HfReader(path) as reader:
            model = hf_config_to_model(reader.config)
            precision = "bf16" if "bfloat16" in str(reader.dtype()) else "fp32"
        has_tokenizer = any((Path(path) / name).is_file() for name in TOKENIZER_FILES)
        tree: dict[str, Any] = {
            "model": model.model_dump(),
            "data": {"tokenizer": str(path) if has_tokenizer else None},
            "train": {"precision": precision},
        }
        config = RunConfig.model_validate(tree)
        check_model(config)
        return config
    return read_config(find_checkpoint(path))


def _describe_peft(path: str | Path) -> RunConfig:
    peft = PeftFolder(path)
    config = describe_folder(peft.base_path())
    config = config.model_copy(update={"model": config.model.model_copy(update={"value_head": peft.has_head})})
    peft.check(config.model)
    has_tokenizer = any((Path(path) / name).is_file() for name in TOKENIZER_FILES)
    data = config.data.model_copy(update={"tokenizer": str(path)} if has_tokenizer else {})
    return config.model_copy(update={"adapter": peft.settings, "data": data})


@dataclass(frozen=True)
class Member:
    """Which of the processes this is that hold the model together, and how they divide it."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    parallel: ParallelConfig = ParallelConfig()  # noqa: RUF009  (frozen)


def load_model(
    path: str | Path,
    device: str = "auto",
    precision: str | None = None,
    *,
    weights: str = "saved",
    deterministic: bool = False,
    member: Member | None = None,
    adapters: Mapping[str, str] | None = None,
    values: bool = False,
) -> Loaded:
    """Loads the model in ``path`` into this process, or this process's part of it. ``precision``: fp32 or bf16; the
    saved one if not given. ``weights``: one of ``WEIGHTS``; int8 and int4 need a CPU, compute in bf16, and say on
    standard error how far their logits are from those in fp32. ``deterministic``: as ``kernels.deterministic`` of a run
    file; raises UserError where it cannot be had, and says what it costs. ``adapters``: PEFT folders or checkpoints of
    adapters on the model, by the names under which requests choose them. ``values``: whether the model may be one that
    gives texts a value and writes none; ``weights`` is for those that write."""
    Held(device, weights, deterministic)
    precision = "bf16" if weights in FEW_BITS else precision if weights == "saved" else weights
    config, member = describe_folder(path), member or Member()
    if config.model.value_head and not values:
        raise UserError(f"{path} holds a reward model, which values answers and writes none; give a language model")
    if config.model.value_head and weights != "saved":
        raise UserError(f"weights is {weights}, and {path} holds a reward model, which is held as saved; leave it out")
    if adapters:
        if config.adapter is not None:
            raise UserError(f"{path} is an adapter, and others are given too; give the model under it")
        first = settings_of(next(iter(adapters.values())))
        config = config.model_copy(update={"adapter": first.model_copy(update={"base": "full"})})
    train = config.train.model_copy(update={"precision": precision or config.train.precision})
    data = DataConfig(tokenizer=config.data.tokenizer, seq_length_tokens=config.data.seq_length_tokens)
    kept: dict[str, Any] = {"model": config.model, "adapter": config.adapter, "chat": config.chat}
    if deterministic:
        kept["kernels"] = KernelsConfig(deterministic=True)
        note(deterministic_notice(config.model, resolve_device(device)))
    config = RunConfig(device=device, seed=config.seed, data=data, train=train, **kept)
    parallel = member.parallel.model_copy(update={"sequence_parallel": False, "overlap": False})
    config = config.model_copy(update={"parallel": parallel})
    platform = open_platform(device, member.local_rank)
    if member.world_size > 1:
        check_layout(config, member.world_size)
    if weights in FEW_BITS:
        check_packable(platform.device)
    layout = Layout.from_config(config, member.world_size)
    groups = open_groups(layout, member.rank, platform, config.seed)
    try:
        if not (is_hf_folder(path) or is_peft_folder(path)):  # a run may save another checkpoint while processes look
            path = groups.of_first_rank(str(find_checkpoint(path)) if groups.is_first_rank else None)
        return _loaded(path, config, groups, weights, adapters)
    except BaseException:
        close_groups()  # the next model of this process can be opened
        raise


def _loaded(
    path: str | Path, config: RunConfig, groups: Groups, weights: str, adapters: Mapping[str, str] | None
) -> Loaded:
    tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
    compared = weights in ("bf16", *FEW_BITS) and _has_room(config, groups)
    text = sample_tokens(tokenizer, config.model.vocab_size or 0)
    exact: Tensor | None = None
    if compared:
        train = config.train.model_copy(update={"precision": "fp32"})
        exact = text_logits(_filled(path, config.model_copy(update={"train": train}), groups, adapters)[0], text)
    network, bank, said = _filled(path, config, groups, adapters)
    if weights in FEW_BITS:
        said.append(str(pack_network(network, FEW_BITS[weights])))
        if not compared:
            said.append("logits are not compared with those in fp32, for which there is too little memory")
    if compared and (found := text_logits(network, text)) is not None:
        assert exact is not None
        said.append(f"weights in {weights}: {difference(found, exact)}")
    if groups.reports_loss and groups.at.dp == groups.at.cp == 0:
        for sentence in said:
            note(sentence)
    return Loaded(config, network, tokenizer, Path(path), bank)


def _has_room(config: RunConfig, groups: Groups) -> bool:
    """Whether the model in fp32 takes less than half of the free memory, on all processes."""
    needed = 4 * parameter_count(config.model).total / (groups.mesh.tp * groups.mesh.pp)
    processes = 1 if groups.platform.is_cuda else groups.mesh.world_size
    fits = torch.tensor(int(needed * processes < 0.5 * groups.platform.free_bytes()), device=groups.platform.device)
    if groups.mesh.world_size > 1:
        dist.all_reduce(fits, op=dist.ReduceOp.MIN)
    return bool(fits)


def _filled(
    path: str | Path, config: RunConfig, groups: Groups, adapters: Mapping[str, str] | None
) -> tuple[Network, AdapterBank | None, list[str]]:
    """The network with the weights of the folder, and what is to be said about them."""
    network = build_policy(config, groups)
    said: list[str] = []
    bank = None
    if adapters:
        said = load_base(path, network)
        bank = load_bank(adapters, network, config.seed)
    elif is_hf_folder(path):
        said = load_hf_weights(path, network.models)
    elif is_peft_folder(path):
        said = load_base(PeftFolder(path).base_path(), network)
        load_adapters(path, network)
    else:
        folder = find_checkpoint(path)
        if network.base is not None:
            said = load_base(path_of_base(folder, content_of(folder)), network)
        load_weights(folder, network)
    return network, bank, said
