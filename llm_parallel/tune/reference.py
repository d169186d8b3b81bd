"""The model that a preference method holds the trained one to: which it is, and what it says of the run's data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llm_parallel.checkpoint.base import load_adapters, load_base, path_of_base
from llm_parallel.checkpoint.content import BASE
from llm_parallel.checkpoint.folders import find_checkpoint
from llm_parallel.checkpoint.load import content_of, load_weights
from llm_parallel.checkpoint.run_file import read_config
from llm_parallel.config.tree import RunConfig
from llm_parallel.data.batch import Batch
from llm_parallel.data.group_data import GroupData
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write
from llm_parallel.model.adapters import adapters_off
from llm_parallel.model.gpt import build_network, build_policy
from llm_parallel.model.hf import is_hf_folder, load_hf_weights
from llm_parallel.model.hf_files import is_peft_folder
from llm_parallel.model.numerics import Numerics
from llm_parallel.objectives.base import Objective, Output, Terms
from llm_parallel.parallel.engine import POLICY, Network, network_of
from llm_parallel.parallel.groups import Groups
from llm_parallel.parallel.layout import Layout
from llm_parallel.train.run import Run
from llm_parallel.tune.score import describe_model, is_whole, log_probabilities, read_scores, score

REFERENCE = "reference"
"""Name of the second model of a run that holds one in memory."""
POINTER = "reference.json"
"""File of a run folder that says which log-probabilities the run uses."""


def is_the_base(config: RunConfig) -> bool:
    """Whether the reference is the policy without its adapters, in every step of the run."""
    adapter = config.adapter
    frozen = adapter is not None and adapter.load is None and not adapter.modules_to_save
    return frozen and config.method.reference.load is None


def second_model(config: RunConfig, groups: Groups) -> Network:
    """The reference as a model of its own, in the run's precision: ``method.reference.load``, else the model that the
    run began with. Raises UserError."""
    path = config.method.reference.load
    if path is None:
        network = build_policy(config, groups)
        assert config.checkpoint.load is not None
        if network.base is None:
            _load(config.checkpoint.load, network)
        else:
            load_base(config.checkpoint.load, network)
            assert config.adapter is not None
            if config.adapter.load is not None:
                load_adapters(config.adapter.load, network)
        network.set_training(False)
        return network
    stages = Layout.from_config(config, groups.mesh.world_size).stages
    adapter = None if is_hf_folder(path) or is_peft_folder(path) else read_config(find_checkpoint(path)).adapter
    numerics = replace(Numerics.from_config(config), base="full" if adapter is None else adapter.base)
    network = build_network(config.model, numerics, groups, stages, config.seed, adapter)
    if adapter is not None:
        folder = find_checkpoint(path)
        load_base(path_of_base(folder, content_of(folder)), network)
        assert BASE in content_of(folder)
    _load(path, network)
    network.set_training(False)
    return network


def _load(path: str, network: Network) -> None:
    if is_peft_folder(path):
        raise UserError(
            f"{path} holds adapters and no model; give the model with them as a run of ours, or merge them by "
            "`llm-parallel convert`"
        )
    if is_hf_folder(path):
        load_hf_weights(path, network.models)
    else:
        load_weights(path, network)


@contextmanager
def reference_of(run: Run) -> Iterator[Network]:
    """The reference for as long as the block lasts: the policy without its adapters or, before the first step, as it
    is; else a second model, which takes memory."""
    network, config = network_of(run.models[POLICY]), run.config
    if is_the_base(config):
        with adapters_off(network):
            yield network
    elif run.state.step == 0 and config.method.reference.load is None:
        yield network
    else:
        yield second_model(config, run.groups)


def scored(run: Run, data: GroupData) -> GroupData:
    """The data with the log-probabilities of the reference, which are computed if no file has them. A run that goes on
    uses what it used before. Collective. Raises UserError."""
    config, groups = run.config, run.groups
    pointer = Path(config.run_dir) / POINTER
    asked = config.method.reference
    wanted = {"load": asked.load or config.checkpoint.load, "data": data.chat.folder.name}
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        known = json.loads(pointer.read_text(encoding="utf-8"))
    same = all(known.get(name) == value for name, value in wanted.items())
    # Files are looked at by the first process, and all decide alike.
    path = Path(known.get("file", "")) if same and run.state.step else None
    if groups.sum_over_world(float(path is None))[0] or path is None or not is_whole(path, data, groups):
        with reference_of(run) as network:
            folder = Path(asked.folder) if asked.folder is not None else data.chat.folder.parent
            path = folder / f"{data.chat.folder.name}-{describe_model(network)}.logps"
            if is_whole(path, data, groups):
                run.metrics.message(f"log-probabilities of the reference are those in {path}")
            else:
                score(config, network, data, path, run.metrics.message)
                run.metrics.event("scored", file=str(path), values=data.num_values)
        if groups.is_first_rank:
            with atomic_write(pointer) as handle:
                json.dump({**wanted, "file": str(path)}, handle)
    return data.with_reference(read_scores(path, data))


@dataclass(frozen=True)
class LiveReference:
    """An objective for which the reference's log-probabilities are computed in every step, by the policy without its
    adapters if ``of_base``, else by the model ``reference``. Everything else is the objective's own."""

    objective: Objective
    of_base: bool

    @property
    def unit(self) -> Literal["token", "document", "pair", "group"]:
        """See ``Objective``."""
        return self.objective.unit

    @property
    def reads(self) -> tuple[str, ...]:
        """See ``Objective``; the column ``reference`` is added here."""
        return tuple(name for name in self.objective.reads if name != REFERENCE)

    @property
    def statistics(self) -> tuple[str, ...]:
        """See ``Objective``."""
        return self.objective.statistics

    @property
    def ratios(self) -> Mapping[str, str]:
        """See ``Objective``."""
        return self.objective.ratios

    @property
    def weighted_in_model(self) -> bool:
        """See ``Objective``."""
        return self.objective.weighted_in_model

    @property
    def loss_options(self) -> Mapping[str, float]:
        """See ``Objective``."""
        return self.objective.loss_options

    def prepare(self, models: Mapping[str, Any], batches: Sequence[Batch]) -> Sequence[Batch]:
        """The batches with the column ``reference``, prepared by the objective."""
        if self.of_base:
            policy = network_of(models[POLICY])
            with adapters_off(policy):
                ready = with_reference(policy, batches)
        else:
            ready = with_reference(models[REFERENCE], batches)
        return self.objective.prepare(models, ready)

    def __call__(self, batch: Batch, groups: Groups, output: Output) -> Terms:
        """See ``Objective``."""
        return self.objective(batch, groups, output)


def with_reference(network: Network, batches: Sequence[Batch]) -> list[Batch]:
    """The batches, and what they have beside them, with the log-probabilities of a model. Collective."""
    beside = [batch.mismatched for batch in batches if batch.mismatched is not None]
    others = with_reference(network, beside) if beside else [None] * len(batches)
    found = log_probabilities(network, batches) or [None] * len(batches)  # another stage has the output
    ready = []
    for batch, values, other in zip(batches, found, others):
        columns = batch.columns if values is None else {**batch.columns, REFERENCE: values}
        ready.append(replace(batch, columns=columns, mismatched=other))
    return ready
