"""Peers of ``bench step`` under data parallelism alone: Hugging Face's LlamaForCausalLM in torch's
DistributedDataParallel or FSDP2, with the weights, samples, learning rate, clipping and fused AdamW of ours."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from llm_parallel.bench.contenders import MainWeights, adamw, hugging_face_model
from llm_parallel.bench.rounds import Turns
from llm_parallel.config.tree import RunConfig
from llm_parallel.data.loader import Batch, MicroBatchLoader
from llm_parallel.data.samples import SampleSource
from llm_parallel.errors import UserError
from llm_parallel.model.numerics import dtype_of
from llm_parallel.parallel.layout import Layout
from llm_parallel.train.step_settings import learning_rate

PEERS = ("ddp", "fsdp")


def chosen_in_layout(names: Sequence[str], config: RunConfig) -> list[str]:
    """Who is measured on a layout: ours, and DDP where it can run, if nobody is named. Raises UserError for one that is
    unknown or can't run."""
    for name in names:
        if name not in ("ours", *PEERS):
            raise UserError(
                f"--providers {name} does not run in layouts of several processes; there are ours, {', '.join(PEERS)}"
            )
    problem = _why_no_peer(config)
    asked = [name for name in dict.fromkeys(names) if name in PEERS]
    if problem and asked:
        raise UserError(f"--providers {asked[0]} {problem}, or take --providers ours")
    return list(dict.fromkeys(names)) or ["ours", *([] if problem else ["ddp"])]


def _why_no_peer(config: RunConfig) -> str | None:
    parallel = config.parallel
    if parallel.tp * parallel.pp * parallel.cp > 1:
        return (
            f"knows data parallelism alone, and this layout has tp {parallel.tp}, pp {parallel.pp}, cp {parallel.cp}; "
            "set parallel.tp=1 parallel.pp=1 parallel.cp=1"
        )
    if config.data.packing == "isolate":
        return "attends across documents; set data.packing=concatenate"
    if importlib.util.find_spec("transformers") is None:
        return "needs transformers, which is not installed here; install it"
    return None


class Peer:
    """One rank's replica or shard, and its step."""

    def __init__(self, name: str, config: RunConfig, device: torch.device) -> None:
        self._config, self._fsdp, self._device = config, name == "fsdp", device
        model = hugging_face_model(config, device)
        self._mains: MainWeights | None = None
        weights: list[Tensor]
        if self._fsdp:
            self._run = _fully_sharded(model, config)
            weights = list(self._run.parameters())
        else:
            self._mains = MainWeights(config, model)
            weights = self._mains.weights
            index = None if device.index is None else [device.index]
            self._run = nn.parallel.DistributedDataParallel(model, device_ids=index, gradient_as_bucket_view=True)
        self._weights = weights
        self._optimizer = adamw(config, weights)

    def step(self, batches: Sequence[Batch], lr: float) -> float:
        """One training step on this replica's micro batches; mean of their losses before it."""
        total = torch.zeros((), device=self._device)
        for number, batch in enumerate(batches, 1):
            with self._reducing(number == len(batches)):
                loss = self._run(batch.tokens, batch.labels) / len(batches)
                loss.backward()
            total += loss.detach()
        if self._mains:
            self._mains.take_gradients()
        if self._config.optim.clip_grad > 0.0:
            nn.utils.clip_grad_norm_(self._weights, self._config.optim.clip_grad)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._mains:
            self._mains.write_back()
        return total.item()

    def _reducing(self, last: bool) -> Any:
        """Gradients are reduced in the backward pass of the last micro batch alone, as in ours."""
        if self._fsdp:
            self._run.set_requires_gradient_sync(last)
        return contextlib.nullcontext() if last or self._fsdp else self._run.no_sync()


def _fully_sharded(model: Any, config: RunConfig) -> Any:
    """FSDP2 by layer; with bf16 it gathers and computes in bf16, and reduces and keeps fp32, as ours."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if dtype_of(config.train.precision) is torch.bfloat16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.model.layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def run_peer(
    name: str, config: RunConfig, store: Any, place: tuple[int, int], turns: Turns, steps: int, trace: Path | None
) -> None:
    """Trains ``steps`` steps as rank and number of ranks in ``place`` say, and traces the last into ``trace`` if a
    folder is given. Rank 0 writes records of them, in the names of ours, into ``NAME.jsonl`` of the run folder."""
    rank, ranks = place
    cuda = config.device == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    elif config.train.threads_per_process:
        torch.set_num_threads(config.train.threads_per_process)
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=rank, world_size=ranks, device_id=device if cuda else None
    )
    peer = Peer(name, config, device)
    layout = Layout.from_config(config, ranks)
    losses, seconds = [], []
    source = SampleSource(config.data, config.seed, "train")
    with MicroBatchLoader(source, _numbers(config, layout, rank), device, config.data.prefetch_batches) as loader:
        turns.barrier = dist.barrier
        turns.begin()
        for step in range(1, steps + 1):
            started = time.perf_counter()
            with _traced(trace / f"{name}_rank_{rank:04d}.json" if trace and step == steps else None, cuda):
                batches = [next(loader) for _ in range(layout.num_micro_batches(config.train.global_batch_size, rank))]
                losses.append(peer.step(batches, learning_rate(config.optim, config.train.steps, step)))
                if cuda:
                    torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
            turns.step_done()
    means = torch.tensor(losses, dtype=torch.float64, device=device) / ranks
    dist.all_reduce(means)
    if rank == 0:
        used = torch.cuda.max_memory_allocated() if cuda else psutil.Process().memory_info().rss
        common = {"memory/allocated_gib": used / 2**30}
        found = [{"train/loss": a, "perf/step_time": b, **common} for a, b in zip(means.tolist(), seconds)]
        Path(config.run_dir).mkdir(parents=True, exist_ok=True)
        Path(config.run_dir, f"{name}.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in found))


@contextlib.contextmanager
def _traced(path: Path | None, cuda: bool) -> Iterator[None]:
    if path is None:
        yield
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        yield
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))


def _numbers(config: RunConfig, layout: Layout, rank: int) -> Iterator[range]:
    first = 0
    while True:
        yield from layout.micro_batches(first, config.train.global_batch_size, rank)
        first += config.train.global_batch_size
