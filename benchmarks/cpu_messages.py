"""Exchange of tensors between processes on one machine over gloo, with and without the scheduling policy that
``parallel/platform.py`` asks for: processor time and wall time of one exchange, for the mean process.

    python benchmarks/cpu_messages.py [--processes 4] [--exchanges 2000] [--rounds 3]

Neighbours swap a tensor as the stages of a pipeline and the ranks of a reduce-scatter do, and all add one up. With more
processes than cores, or beside other work, a writer loses its core to whom it wakes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measured_on import sentence

Times = dict[tuple[str, int], tuple[float, float]]
"""By kind of exchange and numbers in the tensor: microseconds of processor time and of wall time of one."""
SIZES = (1_000, 30_000)


def worker(rank: int, given: argparse.Namespace, batch: bool, folder: str, out: Any) -> None:
    """One process of a job."""
    from llm_parallel.parallel.gloo_device import share_gloo_device
    from llm_parallel.parallel.platform import _let_writers_finish

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if batch:
        _let_writers_finish()
    share_gloo_device()
    store = dist.FileStore(f"{folder}/store", given.processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=given.processes)
    found: Times = {}
    for numbers in SIZES:
        sent, received = torch.zeros(numbers), torch.empty(numbers)

        def swap(sent: torch.Tensor = sent, received: torch.Tensor = received) -> None:
            works = [dist.irecv(received, (rank - 1) % given.processes), dist.isend(sent, (rank + 1) % given.processes)]
            for work in works:
                assert work is not None
                work.wait()

        kinds: dict[str, Callable[[], Any]] = {"swap": swap, "all-reduce": lambda sent=sent: dist.all_reduce(sent)}
        for kind, exchange in kinds.items():
            for _ in range(given.exchanges // 10):
                exchange()
            dist.barrier()
            used, began = time.process_time(), time.perf_counter()
            for _ in range(given.exchanges):
                exchange()
            each = 1e6 / given.exchanges
            found[kind, numbers] = (time.process_time() - used) * each, (time.perf_counter() - began) * each
    out.put(found)
    dist.barrier()


def job(given: argparse.Namespace, batch: bool) -> Times:
    """Means over the processes of one job."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        out = context.Queue()
        members = [
            context.Process(target=worker, args=(rank, given, batch, folder, out)) for rank in range(given.processes)
        ]
        for member in members:
            member.start()
        found: list[Times] = [out.get() for _ in members]
        for member in members:
            member.join()
    return {
        key: (statistics.mean(one[key][0] for one in found), statistics.mean(one[key][1] for one in found))
        for key in found[0]
    }


def main() -> None:
    """Prints the table, of the medians over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--exchanges", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    rounds = [{batch: job(given, batch) for batch in (False, True)} for _ in range(given.rounds)]
    print(f"{sentence()}\n")
    print("| exchange | fp32 numbers | policy | processor time, µs | wall time, µs |\n| --- | --- | --- | --- | --- |")
    for kind, numbers in rounds[0][False]:
        for batch in (False, True):
            times = [one[batch][kind, numbers] for one in rounds]
            used, wall = (statistics.median(time[place] for time in times) for place in (0, 1))
            print(f"| {kind} | {numbers:,} | {'SCHED_BATCH' if batch else 'default'} | {used:.0f} | {wall:.0f} |")


if __name__ == "__main__":
    main()
