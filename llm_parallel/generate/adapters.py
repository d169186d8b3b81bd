"""Several adapters on one model: each request names the one that answers it, and all of them share passes.

The matrices of the model multiply the tokens of all requests together; what an adapter adds is computed for the rows of
its own requests. The keys of equal tokens differ between adapters, so the pages of the cache are known by them too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llm_parallel.checkpoint.base import load_adapters
from llm_parallel.checkpoint.folders import find_checkpoint
from llm_parallel.checkpoint.run_file import read_config
from llm_parallel.config.tree_tune import AdapterConfig
from llm_parallel.errors import UserError
from llm_parallel.generate.scheduler import Part
from llm_parallel.generate.sizes import in_few_sizes
from llm_parallel.model.adapters import add_adapters, linears_of
from llm_parallel.model.deterministic import cut, parted_product, product, sum_over_ranks
from llm_parallel.model.hf_files import is_peft_folder
from llm_parallel.model.peft_files import PeftFolder
from llm_parallel.model.vocabulary_adapters import EMBED_TOKENS, LM_HEAD
from llm_parallel.parallel.engine import Network

Rows = tuple[tuple[str, Tensor | None], ...]
"""Adapters of a pass and their rows, None for all of them."""
Function = Callable[[Tensor], Tensor]
Added = Callable[[Tensor, Tensor], Tensor]
"""A linear's output and input → the output with what adapters add to it."""


@dataclass(frozen=True)
class _Factors:
    a: Tensor
    wide_b: Tensor
    scale: float


class AdapterBank:
    """Adapters by their names. ``rows``: those of the pass under way, which ``select`` sets."""

    def __init__(self, factors: Mapping[str, Mapping[int, _Factors]]) -> None:
        self._factors = factors
        self.rows: Rows = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names that requests may give."""
        return tuple(self._factors)

    def select(self, parts: Sequence[Part], device: torch.device) -> None:
        """Sets the rows of a pass."""
        wanted: dict[str | None, list[int]] = {}
        row = 0
        for part in parts:
            wanted.setdefault(part.sequence.request.adapter, []).extend(range(row, row + part.count))
            row += part.count
        alone = len(wanted) == 1
        self.rows = tuple(
            (name, None if alone else torch.tensor(rows, device=device))
            for name, rows in wanted.items()
            if name is not None
        )

    def added(self, module: Any, group: Any = None) -> Added | None:
        """What the selected adapters add to a linear's output; None where there is none. ``group``: ranks that divide
        the linear's input, whose parts of A x are summed."""
        own = {name: held[id(module)] for name, held in self._factors.items() if id(module) in held}
        if not own:
            return None
        make = _deterministic_delta if module.config.kernels.deterministic else _delta
        deltas = {name: make(factors, module, group) for name, factors in own.items()}

        def add(y: Tensor, x: Tensor) -> Tensor:
            for name, rows in self.rows:
                if name in deltas:
                    delta = deltas[name](x if rows is None else x.index_select(0, rows))
                    y = y.add_(delta) if rows is None else y.index_add_(0, rows, delta)
            return y

        return add


def _delta(factors: _Factors, module: Any, group: Any) -> Function:
    several = group is not None and group.size() > 1
    b_t = (factors.scale * factors.wide_b).t().contiguous()
    lower, widen = in_few_sizes(lambda x: F.linear(x, factors.a)), in_few_sizes(lambda low: low @ b_t)

    def delta(x: Tensor) -> Tensor:
        low = lower(x)
        if several:
            dist.all_reduce(low, group=group)
        return widen(low)

    return delta


def _deterministic_delta(factors: _Factors, module: Any, group: Any) -> Function:
    """As in training (``model/adapters.py``), by products whose rows do not depend on their number, and sums over ranks
    in one order."""
    parts = [factors.a] if group is None else cut(factors.a, module.config.row_parts)

    def delta(x: Tensor) -> Tensor:
        if group is None:
            low = product(x, factors.a)
        else:
            low = sum_over_ranks(parted_product(x, parts), group, False).to(x.dtype)
        return factors.scale * product(low, factors.wide_b)

    return delta


def settings_of(path: str | Path) -> AdapterConfig:
    """What the adapter in a PEFT folder or in a checkpoint of adapters is. Raises UserError if it is none."""
    if not Path(path).exists():
        raise UserError(f"adapter {path} does not exist; give a PEFT folder or a checkpoint of adapters")
    settings = PeftFolder(path).settings if is_peft_folder(path) else read_config(find_checkpoint(path)).adapter
    if settings is None:
        raise UserError(f"{path} holds whole weights and no adapter; give a PEFT folder or a checkpoint of adapters")
    return settings


@torch.no_grad()
def load_bank(adapters: Mapping[str, str], network: Network, seed: int) -> AdapterBank:
    """Loads adapters for a network whose base is loaded, and leaves its own linears without any. Raises UserError for
    an adapter of another model."""
    assert network.base is not None
    found: dict[str, dict[int, _Factors]] = {}
    for name, path in adapters.items():
        settings = settings_of(path)
        if settings.dora:
            raise UserError(
                f"adapter {path} has magnitudes (DoRA), which requests cannot choose among; merge it with "
                "`llm-parallel convert --merge`"
            )
        whole = {EMBED_TOKENS, LM_HEAD} & {*settings.targets, *settings.modules_to_save}
        if whole:
            raise UserError(
                f"adapter {path} changes {' and '.join(sorted(whole))}, which requests cannot choose among; merge it "
                "with `llm-parallel convert --merge`"
            )
        _without_adapters(network)
        for chunk in network.models:
            add_adapters(chunk, settings, network.groups, seed)
        load_adapters(path, replace(network, base=replace(network.base, adapter=settings)))
        found[name] = {
            id(module): _Factors(module.adapter.a, _wide_b(module.adapter).contiguous(), module.adapter.scale)
            for chunk in network.models
            for _, _, module in linears_of(chunk)
            if module.adapter is not None
        }
    _without_adapters(network)
    return AdapterBank(found)


def _wide_b(adapter: Any) -> Tensor:
    return adapter.wide_b() if hasattr(adapter, "wide_b") else adapter.b


def _without_adapters(network: Network) -> None:
    for chunk in network.models:
        for _, _, module in linears_of(chunk):
            module.adapter = None
