"""Reduce-scatter and all-gather on a CPU as direct messages, in fewer bytes and copies than gloo's own.

torch's gloo backend reduces the whole tensor everywhere and then takes a part of it: 2 (n - 1) / n times its size from
every process, against (n - 1) / n where the processes send each other their parts and add them. It gathers into a
buffer of its own and copies that; direct messages arrive in the output. Processor time for 69 MB (17.3 M parameters in
fp32) on 2 processes, where the allocator keeps freed memory (platform.py): all-gather 9 ms, reduce-scatter 12 ms,
gloo's all-reduce of the same tensor, which DistributedDataParallel calls, 24 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d


class _Messages:
    """Messages on their way; ``wait`` blocks until all are sent and received, and then calls ``done``."""

    def __init__(self, works: list[Any], done: Callable[[], None] = lambda: None) -> None:
        self._works, self._done = works, done

    def wait(self) -> None:
        """Blocks until the output is there."""
        for work in self._works:
            work.wait()
        self._done()


def _send_parts(to: list[Tensor], parts: list[Tensor], group: Any) -> list[Any]:
    """Sends ``parts[i]`` to rank ``i`` of the group and receives ``to[i]`` from there, this rank itself left out. The
    first message goes to the next rank, so that the others' do not all reach the same rank at once."""
    rank, size = dist.get_rank(group), len(parts)
    works = []
    for step in range(1, size):
        before, after = (rank - step) % size, (rank + step) % size
        works.append(dist.irecv(to[before], group=group, group_src=before))
        works.append(dist.isend(parts[after], group=group, group_dst=after))
    return works


def _add(parts: list[Tensor], rank: int, output: Tensor) -> None:
    """Sum of the parts in the order of the ranks, whichever is this one's. ``parts[rank]`` may be ``output``; the
    others are overwritten. Low precision is added in fp32 and rounded once."""
    if output.dtype.itemsize < 4:
        output.copy_(torch.stack([part.float() for part in parts]).sum(0))
        return
    total = parts[0]
    for number, part in enumerate(parts[1:], 1):
        total = torch.add(total, part, out=output if number >= rank else parts[0])


def _left_to_torch(tensor: Tensor, group: Any, async_op: bool) -> bool:
    """Whether torch's own collective is used: on a GPU, and inside of a coalescing manager, whose handle would not wait
    for these messages."""
    coalesced = async_op and (group or dist.group.WORLD) in distributed_c10d._world.pg_coalesce_state
    return not tensor.is_cpu or coalesced or dist.get_world_size(group) == 1


def reduce_scatter(
    output: Tensor, input: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    """Does what ``torch.distributed.reduce_scatter_tensor`` does, and calls that where direct messages cannot be used,
    such as for another operation than the sum. ``output`` may be this rank's part of ``input``, whose other parts stay
    as they are."""
    if op != dist.ReduceOp.SUM or _left_to_torch(input, group, async_op):
        return dist.reduce_scatter_tensor(output, input, op=op, group=group, async_op=async_op)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    sent = [part.view(output.shape) for part in input.view(size, -1)]
    parts = [sent[rank] if number == rank else torch.empty_like(output) for number in range(size)]
    messages = _Messages(_send_parts(parts, sent, group), lambda: _add(parts, rank, output))
    if async_op:
        return messages
    messages.wait()
    return None


def all_gather(output: Tensor, input: Tensor, group: Any = None, async_op: bool = False) -> Any:
    """Does what ``torch.distributed.all_gather_into_tensor`` does, and calls that where direct messages cannot be used.
    ``input`` may be this rank's part of ``output``."""
    if _left_to_torch(input, group, async_op):
        return dist.all_gather_into_tensor(output, input, group=group, async_op=async_op)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    parts = [part.view(input.shape) for part in output.view(size, -1)]
    messages = _Messages(_send_parts(parts, [input] * size, group))
    if parts[rank].data_ptr() != input.data_ptr():
        parts[rank].copy_(input)
    if async_op:
        return messages
    messages.wait()
    return None
