"""One process of ``llm-parallel bench comm``: ``python -m llm_parallel.bench.collectives PLAN.json``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llm_launch.worker import WorkerEnv
from llm_parallel.bench.rank import run_plan
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write
from llm_parallel.parallel.groups import store_here
from llm_parallel.parallel.scatter import all_gather, reduce_scatter

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv")
ELEMENT_BYTES = 4  # float32
TIMEOUT_S = 600.0
MAX_CALLS = 1000


@dataclass(frozen=True)
class Sample:
    """Times of one operation with one size, over all ranks."""

    operation: str
    size_bytes: int
    """As nccl-tests count it: the larger of the bytes that a rank sends in all and receives in all."""
    calls: int
    """Number of consecutive calls that each time is the mean of."""
    seconds: list[float]
    """For each round the time of the slowest rank."""


def whole_size(size_bytes: int, num_ranks: int) -> int:
    """The largest size up to ``size_bytes`` that divides into equal shares for all ranks; at least one element each."""
    share = num_ranks * ELEMENT_BYTES
    return max(1, size_bytes // share) * share


class Call:
    """One operation with one size, and its buffers."""

    def __init__(self, operation: str, size_bytes: int, device: torch.device) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        whole, part = size_bytes // ELEMENT_BYTES, size_bytes // ELEMENT_BYTES // self.ranks
        one_share = operation == "all_gather"
        # Sums of small whole numbers are exact in any order.
        self.sent = torch.full((part if one_share else whole,), float(self.rank + 1), device=device)
        self.got = torch.zeros(part if operation == "reduce_scatter" else whole, device=device)
        self._do: Callable[[], Any] = getattr(self, f"_{operation}")
        self._expected: Callable[[], torch.Tensor] = getattr(self, f"_expected_{operation}")

    def run(self) -> None:
        """Runs the operation once; on a GPU it may still be running on return."""
        self._do()

    def wrong(self) -> int:
        """Runs the operation on fresh buffers and counts the wrong elements of its result."""
        self.sent.fill_(float(self.rank + 1))
        self.got.zero_()
        self.run()
        inplace = self._do in (self._all_reduce, self._broadcast)
        found = self.sent if inplace else self.got
        return int((found != self._expected().to(found)).sum())

    def _all_reduce(self) -> None:
        dist.all_reduce(self.sent)

    def _expected_all_reduce(self) -> torch.Tensor:
        return torch.tensor(float(self.ranks * (self.ranks + 1) // 2))

    def _all_gather(self) -> None:
        all_gather(self.got, self.sent)  # the trainer's own

    def _expected_all_gather(self) -> torch.Tensor:
        return torch.arange(1.0, self.ranks + 1).repeat_interleave(self.sent.numel())

    def _reduce_scatter(self) -> None:
        reduce_scatter(self.got, self.sent)  # the trainer's own

    def _expected_reduce_scatter(self) -> torch.Tensor:
        return self._expected_all_reduce()

    def _all_to_all(self) -> None:
        dist.all_to_all_single(self.got, self.sent)

    def _expected_all_to_all(self) -> torch.Tensor:
        return torch.arange(1.0, self.ranks + 1).repeat_interleave(self.sent.numel() // self.ranks)

    def _broadcast(self) -> None:
        dist.broadcast(self.sent, 0)

    def _expected_broadcast(self) -> torch.Tensor:
        return torch.tensor(1.0)

    def _send_recv(self) -> None:
        """Each rank sends to the next and receives from the previous one at the same time."""
        following, before = (self.rank + 1) % self.ranks, (self.rank - 1) % self.ranks
        requests = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, self.sent, following), dist.P2POp(dist.irecv, self.got, before)]
        )
        for request in requests:
            request.wait()

    def _expected_send_recv(self) -> torch.Tensor:
        return torch.tensor(float((self.rank - 1) % self.ranks + 1))


def measure(plan: dict[str, Any], device: torch.device) -> list[Sample]:
    """All samples of the plan, the same on every rank.

    A call is checked before it is timed. A round times every operation and size once, so that changes of the machine's
    load affect all of them. Raises RuntimeError if a result is wrong."""
    ranks = dist.get_world_size()
    sizes = list(dict.fromkeys(whole_size(size, ranks) for size in plan["sizes_bytes"]))
    pairs = [(operation, size) for operation in plan["operations"] for size in sizes]
    calls = [_num_calls(operation, size, device, plan["sample_s"]) for operation, size in pairs]
    mine: list[list[float]] = [[] for _ in pairs]
    for _ in range(plan["rounds"]):
        for index, (operation, size) in enumerate(pairs):
            mine[index].append(_time(Call(operation, size, device), calls[index], device))
    slowest = torch.tensor(mine, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return [
        Sample(operation, size, count, seconds)
        for (operation, size), count, seconds in zip(pairs, calls, slowest.tolist())
    ]


def _num_calls(operation: str, size: int, device: torch.device, sample_s: float) -> int:
    """Warms up, checks the result, and returns how many calls take about ``sample_s``, the same number on all ranks."""
    call = Call(operation, size, device)
    wrong = torch.tensor([float(call.wrong())], device=device)
    dist.all_reduce(wrong)
    if wrong.item():
        raise RuntimeError(f"{operation} of {size} bytes gave {int(wrong.item())} wrong elements")
    _time(call, 2, device)
    once = torch.tensor([_time(call, 2, device)], device=device)
    dist.all_reduce(once, dist.ReduceOp.MAX)
    return max(1, min(MAX_CALLS, int(sample_s / once.item())))


def _time(call: Call, count: int, device: torch.device) -> float:
    """Mean seconds of ``count`` consecutive calls, which all ranks begin together."""
    call.sent.zero_()  # repeated sums would overflow
    call.run()
    dist.barrier()
    _synchronize(device)
    begin = time.perf_counter()
    for _ in range(count):
        call.run()
    _synchronize(device)
    return (time.perf_counter() - begin) / count


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_rank(plan: dict[str, Any], place: WorkerEnv) -> list[Sample]:
    """Opens the process group of ``place``, measures, and closes it."""
    place.export()
    cuda = plan["device"] == "cuda"
    if cuda and place.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"--processes asks for GPU {place.local_rank + 1} of this machine, which has {torch.cuda.device_count()}"
        )
    device = torch.device("cuda", place.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    store = store_here(place.rank, place.world_size, TIMEOUT_S)
    where: dict[str, Any] = (
        {} if store is None else {"store": store, "rank": place.rank, "world_size": place.world_size}
    )
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=TIMEOUT_S), **where)
    try:
        return measure(plan, device)
    finally:
        dist.destroy_process_group()


def measure_rank(plan: dict[str, Any], place: WorkerEnv, folder: Path) -> None:
    """Measures as one rank; rank 0 writes the samples beside the plan."""
    samples = run_rank(plan, place)
    if place.rank == 0:
        with atomic_write(folder / "samples.json") as handle:
            json.dump([vars(sample) for sample in samples], handle)


if __name__ == "__main__":
    run_plan(measure_rank)
