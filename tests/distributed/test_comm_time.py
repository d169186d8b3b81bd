"""Every collective and message of a step is seen, and a delay shows in the column of the group that it was put into."""

from __future__ import annotations

import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.commands import Corpus, read_records, train_in_ranks, write_run_file
from tests.support.data_helpers import write_token_file
from tests.support.harness import run_ranks
from tests.support.job import base_config, changed, open_engine, own_batches

pytestmark = pytest.mark.gloo

PROFILED = {
    "c10d::_allgather_base_": "_allgather_base", "c10d::_reduce_scatter_base_": "_reduce_scatter_base",
    "c10d::allgather_": "allgather", "c10d::allgather_into_tensor_coalesced_": "allgather_into_tensor_coalesced",
    "c10d::allreduce_": "allreduce", "c10d::allreduce_coalesced_": "allreduce_coalesced",
    "c10d::alltoall_base_": "alltoall_base", "c10d::barrier": "barrier", "c10d::broadcast_": "broadcast",
    "c10d::recv_": "recv", "c10d::reduce_scatter_": "reduce_scatter",
    "c10d::reduce_scatter_tensor_coalesced_": "reduce_scatter_tensor_coalesced", "c10d::send": "send",
}  # fmt: skip
"""What torch's dispatcher calls a collective → method that it came through."""

NEWER_NAMES = {
    "all_gather_single": "_allgather_base", "all_gather_single_coalesced": "allgather_into_tensor_coalesced",
    "reduce_scatter_single": "_reduce_scatter_base", "all_to_all_single": "alltoall_base",
    "reduce_scatter_single_coalesced": "reduce_scatter_tensor_coalesced",
}  # fmt: skip
"""Methods of torch 2.13 → what older ones, and the dispatcher still, call them."""

LAYOUTS = {
    "tp 2 x pp 2 with sp": (4, {"parallel.tp": 2, "parallel.pp": 2, "parallel.sequence_parallel": True}),
    "tp 2 without sp": (2, {"parallel.tp": 2, "parallel.sequence_parallel": False}),
    "cp 2": (2, {"parallel.cp": 2}),
    "dp 2": (2, {"parallel.dp": 2}),
    "pp 2, tied, interleaved": (2, {"parallel.pp": 2, "parallel.vpp": 2, "model.tie_embeddings": True}),
}
AXES = {
    "tp 2 x pp 2 with sp": {"tp", "pp", "other"},
    "tp 2 without sp": {"tp", "other"},
    "cp 2": {"cp", "dp", "other"},
    "dp 2": {"dp", "other"},
    "pp 2, tied, interleaved": {"pp", "other"},
}


def one_step(engine: Any, config: Any) -> None:
    from llm_parallel.objectives.likelihood import Likelihood
    from llm_parallel.train.step import apply_gradient, forward_backward

    outcome = forward_backward(engine, Likelihood(), own_batches(config, engine.groups))
    apply_gradient(engine, outcome, config.optim.lr, config.optim.clip_grad)


def profiled_step(rank: int, world_size: int, changes: dict[str, Any]) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    """Collectives of the second step by torch's dispatcher, and as recorded."""
    import torch

    from llm_parallel.parallel.comm_time import open_comm_time
    from llm_parallel.parallel.groups import close_groups

    config = changed(base_config(), changes)
    engine = open_engine(config, rank, world_size)
    comm = open_comm_time(engine.groups, message_bytes=1 << 12)
    one_step(engine, config)
    with comm.recording(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        one_step(engine, config)
    events = Counter(event.name for event in profile.events() if event.name.startswith("c10d::"))
    close_groups(world=False)
    return events, comm.calls


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in {"tp 2 x pp 2 with sp", "cp 2"} else [pytest.mark.slow])
        for name in LAYOUTS
    ],
)
def test_every_call_is_seen(name: str) -> None:
    processes, changes = LAYOUTS[name]
    axes: set[str] = set()
    for events, calls in run_ranks(profiled_step, processes, changes):
        assert set(events) <= set(PROFILED), "a collective that this test has no name for"
        seen: Counter[str] = Counter()
        for (axis, method), count in calls.items():
            seen[NEWER_NAMES.get(method, method)] += count
            axes |= {axis} - {"self"}
        assert seen == {PROFILED[event]: count for event, count in events.items()}
        assert sum(seen.values()) >= 5
    assert axes == AXES[name]


PARTS = ("tp", "cp", "dp", "pp", "bubble", "optimizer", "data", "compute", "other")
SHORTEST_DELAY_S, LONGEST_DELAY_S, MICRO_BATCHES = 0.15, 1.5, 4


def train(
    folder: Path, processes: int, layout: dict[str, Any], prepare: Any = None, comm_time: bool = True
) -> tuple[list[dict[str, float]], float]:
    """Records of six steps, of which the first two are left out, and what ``prepare``'s delays add to a step."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 400, 600, dtype=np.int32) for _ in range(8)]
    prefix = Path(write_token_file(folder / "tokens", documents))
    size = MICRO_BATCHES * layout.get("dp", 1)
    path = write_run_file(
        Corpus(prefix, prefix, ""),
        folder,
        model={"vocab_size": 400},
        data={"tokenizer": None, "eval_fraction": 0.0},
        parallel=layout,
        train={"global_batch_size": size, "steps": 6},
        log={"comm_time": comm_time},
    )
    found = train_in_ranks(path, processes, prepare=prepare)
    delay_s = max(slept for (slept,) in found) if prepare else 0.0
    return [found for found in read_records(folder / "run" / "metrics.jsonl") if found.get("step", 0) > 2], delay_s


class Delay:
    """A sleep that is long beside a step on this machine as it is at the moment: four of them take at least ten times
    as long as the second step. The first two steps have none."""

    def __init__(self, loop: Any) -> None:
        self.slept: list[float] = [0.0]
        self._delay_s, self._steps = 0.0, 0
        train_step = loop.train_step

        def timed(*arguments: Any) -> Any:
            start = time.monotonic()
            outcome = train_step(*arguments)
            self._steps += 1
            if self._steps == 2:
                self._delay_s = max(SHORTEST_DELAY_S, 10 * (time.monotonic() - start) / MICRO_BATCHES)
                self._delay_s = min(self._delay_s, LONGEST_DELAY_S)
            return outcome

        loop.train_step = timed

    def sleep(self, micro_batches: int) -> None:
        """Sleeps from the third step on."""
        if self._steps >= 2:
            time.sleep(micro_batches * self._delay_s)
            self.slept[0] = MICRO_BATCHES * self._delay_s


def slow_forward(slow_rank: int, rank: int, loop: Any) -> list[float]:
    """One rank sleeps before each forward pass; the list will hold a step's sleep."""
    from llm_parallel.train import open as opening

    delay, original = Delay(loop), opening.policy_engine

    def slow_engine(*arguments: Any) -> Any:
        engine = original(*arguments)
        engine.models[0].register_forward_pre_hook(lambda *_: delay.sleep(1))
        return engine

    if rank == slow_rank:
        opening.policy_engine = slow_engine
    return delay.slept


def slow_update(rank: int, loop: Any) -> list[float]:
    """Every rank sleeps before the update; the list will hold a step's sleep."""
    delay, original = Delay(loop), loop.apply_gradient

    def apply_gradient(*arguments: Any) -> None:
        delay.sleep(MICRO_BATCHES)
        original(*arguments)

    loop.apply_gradient = apply_gradient
    return delay.slept


@pytest.mark.parametrize(
    ("layout", "processes", "prepare", "column"),
    [
        ({"tp": 2}, 2, partial(slow_forward, 1), "tp"),
        pytest.param({"cp": 2}, 2, partial(slow_forward, 1), "cp", marks=pytest.mark.slow),
        pytest.param({"dp": 2}, 2, partial(slow_forward, 1), "dp", marks=pytest.mark.slow),
        ({"pp": 2}, 2, partial(slow_forward, 1), "bubble"),
        pytest.param({"tp": 2}, 2, partial(slow_forward, 0), "compute", marks=pytest.mark.slow),
        ({"pp": 2}, 2, slow_update, "optimizer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_delay_shows_in_its_column(
    tmp_path: Path, layout: dict[str, Any], processes: int, prepare: Any, column: str
) -> None:
    """A step holds four delays. The rank that waits for the delayed one works meanwhile, and waits less by as much:
    about a step without delays, a tenth of their time, or several tenths where others take the processors. Of four
    steps the one with the longest wait counts."""
    records, delay_s = train(tmp_path, processes, layout, prepare)
    least = {name: min(record[f"time/{name}_s"] for record in records) for name in PARTS}
    longest = max(record[f"time/{column}_s"] for record in records)
    assert longest > 0.5 * delay_s, (longest, delay_s, least)
    assert max(seconds for name, seconds in least.items() if name != column) < 0.9 * longest, (longest, least)
    for record in records:
        parts = [record[f"time/{name}_s"] for name in PARTS]
        assert sum(parts) == pytest.approx(record["perf/step_time"], rel=1e-6)
        assert min(parts) > -0.02 * record["perf/step_time"], "communication was booked to a phase it was not in"
        for name in PARTS:
            mean, largest = record[f"time/{name}_mean_s"], record[f"time/{name}_max_s"]
            assert mean <= largest + 1e-9 and record[f"time/{name}_s"] <= largest + 1e-9


def test_without_it_nothing_is_recorded(tmp_path: Path) -> None:
    layout = {"dp": 2}
    with_it, _ = train(tmp_path / "on", 2, layout)
    without, _ = train(tmp_path / "off", 2, layout, comm_time=False)
    assert any(name.startswith("time/tp") for record in with_it for name in record)
    assert {name for record in without for name in record if name.startswith("time/")} == {"time/eta_s"}
    assert [record["train/loss"] for record in with_it] == [record["train/loss"] for record in without]
