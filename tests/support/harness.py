"""Runs a function on several gloo ranks. Children fork from a server that has torch and megatron-core loaded already,
so a job of eight starts in about two seconds instead of forty."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import queue
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

PRELOAD = ["tests.support.preload"]


def _child(
    rank: int, world_size: int, folder: str, timeout_s: float, fn: Callable[..., Any], args: tuple, out: Any
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo"
    )
    warnings.filterwarnings("ignore")
    faulthandler.dump_traceback_later(timeout_s, exit=False)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        store = dist.FileStore(f"{folder}/store", world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
        )
        dist.barrier()  # ``fn`` may destroy this group at once, and another rank may still be connecting
        out.put((rank, True, fn(rank, world_size, *args)))
        if dist.is_initialized():  # else fn ended the job itself
            dist.barrier()
    except BaseException:
        out.put((rank, False, traceback.format_exc()))
    finally:
        out.close()
        out.join_thread()
        os._exit(0)  # no teardown of groups whose peers may be gone


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300.0) -> list[Any]:
    """Calls ``fn(rank, world_size, *args)`` on every rank of one gloo job and returns the results in rank order.

    ``fn`` is a top-level function whose results pickle by value (numpy arrays, not tensors). Raises AssertionError with
    the first rank's traceback if one fails, and with the missing ranks' numbers if they do not answer in time (their
    stacks are on stderr).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = context.Queue()
        children = [
            context.Process(target=_child, args=(rank, world_size, folder, timeout_s, fn, args, out), daemon=False)
            for rank in range(world_size)
        ]
        for child in children:
            child.start()
        failure, deadline = None, time.monotonic() + timeout_s + 20.0
        try:
            while len(results) < world_size and failure is None:
                try:
                    rank, ok, value = out.get(timeout=1.0)
                except queue.Empty:
                    died = {r: c.exitcode for r, c in enumerate(children) if r not in results and c.exitcode}
                    if died:
                        failure = f"ranks died without an answer, rank: exit status {died}"
                    elif time.monotonic() > deadline:
                        raise
                    continue
                if ok:
                    results[rank] = value
                else:
                    failure = f"rank {rank} failed:\n{value}"
        except queue.Empty:
            failure = f"no answer in {timeout_s} s from ranks {sorted(set(range(world_size)) - set(results))}"
        finally:
            for child in children:
                child.join(timeout=0.1 if failure else 15.0)
                if child.is_alive():
                    child.kill()
                    child.join()
    assert failure is None, failure
    return [results[rank] for rank in range(world_size)]
