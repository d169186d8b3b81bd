"""The tables by which the paged attention kernel finds the keys of each request, on devices that run it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_kernels.device import arch
from llm_kernels.paged_attention.op import backend_for
from llm_kernels.paged_attention.plan import Plan, Tables
from llm_kernels.paged_attention.tiles import Heads
from llm_parallel.generate.scheduler import Part
from llm_parallel.generate.seen import PageArrays
from llm_parallel.model.gpt import LlamaModel


def backend_of(attention: str) -> str:
    """The back end of paged attention for a value of ``kernels.attention``; Gluon has no kernel for it."""
    return "triton" if attention == "gluon" else attention


class Paging:
    """Plans of passes."""

    def __init__(self, heads: Heads, device: torch.device) -> None:
        self._heads, self._device = heads, device
        self._arrays = PageArrays()

    @staticmethod
    def of(model: LlamaModel) -> Paging | None:
        """Of a model chunk's attention; None where attention is torch's."""
        config, tp, device = model.model_config, model.groups.mesh.tp, model.groups.platform.device
        probe = torch.empty(0, config.kv_channels, dtype=model.numerics.dtype, device=device)
        if backend_for(probe, backend_of(model.config.kernels.attention)) == "torch":
            return None
        groups = max(config.num_query_groups // tp, 1)
        members = config.num_attention_heads // tp // groups
        return Paging(Heads(members, config.kv_channels, probe.element_size(), arch(probe)), device)

    def tables(self, parts: Sequence[Part], page_tokens: int) -> Tables:
        """The tables of a pass on the host."""
        lengths = [part.start + part.count for part in parts]
        pages = [self._arrays.of(part.sequence) for part in parts]
        return Tables.make([part.count for part in parts], lengths, pages, page_tokens, self._heads)

    def plan(self, parts: Sequence[Part], page_tokens: int) -> Plan:
        """The plan of a pass on the device."""
        return self.tables(parts, page_tokens).to(self._device)
