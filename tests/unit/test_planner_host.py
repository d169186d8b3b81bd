"""Steps of processes on shared cores against counts by hand, and their calibration against known machines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_parallel.bench.collectives import Sample
from llm_parallel.bench.comm import as_row, fits_of
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError
from llm_parallel.planner.calibrate import calibrate_command
from llm_parallel.planner.hardware import load_cluster
from llm_parallel.planner.host import OPERATIONS, Host, HostModel, Link, host_step
from llm_parallel.planner.shapes import Shape, Strategy, shape_of, strategy_of
from llm_parallel.planner.steptime import step_time

FREE = {name: {2: Link(0.0, 0.0), 4: Link(0.0, 0.0)} for name in OPERATIONS}
MACHINE = Host(2, 1.0, 1e-11, 2e-10, 3e-4, 1e-3, 1e-9, FREE)
SHAPE = Shape(layers=8, hidden=64, heads=4, groups=4, ffn=128, vocab=256)
ONE = Strategy(1, 8, 1, 32, precision="fp32", sequence_parallel=False)
CPU = "Some CPU"


def total(strategy: Strategy, host: Host = MACHINE) -> float:
    return sum(host_step(SHAPE, strategy, host).values())


def test_flops_by_hand() -> None:
    """Six for every weight of a matrix and token, and causal attention; see Shape.flops_per_token for the full one."""
    work = HostModel(SHAPE, ONE, MACHINE).alone()
    weights = 8 * (4 * 64 * 64 + 3 * 64 * 128) + 256 * 64
    attention = 3 * 4 * 0.5 * 32 * 64 * 8
    assert work.flops == pytest.approx(8 * 32 * (6 * weights + attention))
    assert work.calls == 8 * 8 * 3
    seconds = work.flops * 1e-11 + work.traffic * 2e-10 + work.calls * 3e-4 + 8e-3 + SHAPE.parameters * 1e-9
    assert total(ONE) == pytest.approx(seconds)


@pytest.mark.parametrize(("processes", "slower"), [(2, 0.5), (4, 0.5), (8, 0.5)])
def test_replicas_share_two_cores(processes: int, slower: float) -> None:
    """Two cores halve the time of the same work for any number of replicas; the sharded update is divided too."""
    assert total(replace(ONE, gpus=processes)) == pytest.approx(slower * total(ONE))


@pytest.mark.parametrize(("pp", "vpp"), [(2, 1), (4, 1), (2, 2), (8, 1)])
def test_pipelines_do_all_the_work(pp: int, vpp: int) -> None:
    """On one core there is no bubble to see; on two at least half the time, and less bubble with more stages."""
    pipeline = replace(ONE, gpus=pp, pp=pp, vpp=vpp)
    assert total(pipeline, replace(MACHINE, cores=1)) == pytest.approx(total(ONE))
    assert 0.5 * total(ONE) < total(pipeline) < 0.8 * total(ONE)


def test_tensor_parallel_products_are_split() -> None:
    """The fixed cost of each layer is not divided: both processes pay it."""
    fast = replace(MACHINE, traffic_s=0.0, call_s=0.0, micro_batch_s=0.0, update_s=0.0)
    split = replace(ONE, gpus=2, tp=2)
    assert total(split, fast) == pytest.approx(total(ONE, fast) / 2)
    passes = replace(fast, product_s=0.0, call_s=1e-3)
    assert total(split, passes) == pytest.approx(total(ONE, passes))


def test_bytes_sent_by_hand() -> None:
    """Seconds of communication alone with a core for each process, where a byte of one operation takes 1 s."""
    idle = Host(64, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, FREE)

    def sent(operation: str, strategy: Strategy) -> float:
        links = {**FREE, operation: {2: Link(0.0, 1.0), 4: Link(0.0, 1.0)}}
        return total(strategy, replace(idle, links=links))

    tokens, activation = 32, 4 * 32 * 64
    scalars = 4 * 64
    layers = 8 * 8  # layers x micro batches
    tensor = replace(ONE, gpus=2, tp=2)
    # Two each way, the embedding's and the output's, three of a number for every token for the loss.
    assert sent("all_reduce", tensor) == pytest.approx((4 * layers + 16) * activation + 8 * 3 * 4 * tokens + scalars)
    sequence = replace(tensor, sequence_parallel=True)
    assert sent("reduce_scatter", sequence) == pytest.approx((4 * layers + 16) * activation)
    assert sent("all_gather", sequence) == pytest.approx((6 * layers + 24) * activation)
    replicas = replace(ONE, gpus=2)
    assert sent("reduce_scatter", replicas) == pytest.approx(4 * SHAPE.parameters)
    assert sent("all_gather", replicas) == pytest.approx(4 * SHAPE.parameters)
    assert sent("all_reduce", replace(replicas, zero=0)) == pytest.approx(4 * SHAPE.parameters + scalars)
    context = replace(ONE, gpus=2, cp=2)
    assert sent("all_gather", context) == pytest.approx(layers * 2 * 4 * 32 * 64 + 4 * SHAPE.parameters)


def test_links_between_measured_numbers() -> None:
    host = replace(MACHINE, links={"all_reduce": {2: Link(1.0, 10.0), 4: Link(3.0, 16.0)}, "one": {2: Link(1.0, 1.0)}})
    assert host.link("all_reduce", 3) == Link(2.0, 13.0) and host.link("all_reduce", 8) == Link(7.0, 28.0)
    assert host.link("one", 4) == Link(3.0, 1.5)


def config_of(heads: int = 4, seq: int = 64, layers: int = 4, threads: int = 1) -> RunConfig:
    return RunConfig.model_validate(
        {
            "device": "cpu",
            "model": {"num_layers": layers, "hidden_size": 128, "ffn_hidden_size": 64 * heads, "head_dim": 32,
                      "num_attention_heads": heads, "num_query_groups": heads, "vocab_size": 512},
            "data": {"seq_length_tokens": seq},
            "train": {"global_batch_size": 4, "micro_batch_size": 1, "threads_per_process": threads},
        }
    )  # fmt: skip


def save(path: Path, tree: dict[str, Any]) -> str:
    where = {"chip": CPU, "cores": 2, "date": "2026-11-23", "commit": "abc1234"}
    path.write_text(json.dumps({"environment": where, **tree}))
    return str(path)


def step_file(path: Path, host: Host, config: RunConfig, beside: int = 0) -> str:
    """Writes a result of ``bench step`` on this machine, whose split was measured in a step a third slower."""
    shape, strategy = shape_of(config.model), strategy_of(config, 1)
    update = host.update_s * shape.parameters
    seconds = HostModel(shape, strategy, host).alone().seconds(host) + host.micro_batch_s * 4 + update
    seconds /= host.crowded if beside else 1.0
    split = {"forward": 1.33 * (seconds - update), "clip and AdamW": 1.33 * update}
    row = {"provider": "ours", "median_ms": 1e3 * seconds, "split_s": split}
    extra = {"processes_beside": beside} if beside else {}
    return save(path, {"mfu": {}, "config": config.model_dump(mode="json"), "rows": [row], **extra})


def comm_file(path: Path, host: Host, ranks: int, operations: tuple[str, ...] = OPERATIONS) -> str:
    """Writes a result of ``bench comm`` on this machine, in which processes that share cores take longer."""
    slower = max(1.0, ranks / host.cores) / (host.crowded if ranks >= host.cores else 1.0)
    rows = []
    for name in operations:
        link = host.link(name, ranks)
        for size in (4096, 2**20, 2**24):
            seconds = (link.latency_s + size * link.s_per_byte) * slower
            rows.append(as_row(Sample(name, size, 3, [seconds] * 3), ranks, "gloo"))
    return save(path, {"processes": ranks, "processes_per_machine": ranks, "backend": "gloo", "rows": rows,
                       "fits": fits_of(rows)})  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(st.floats(2e-12, 1e-10), st.floats(1e-11, 1e-9), st.floats(1e-5, 1e-3), st.floats(1e-10, 1e-8),
       st.floats(0.6, 1.0))  # fmt: skip
def test_a_known_machine_comes_out(
    tmp_path_factory: pytest.TempPathFactory, product: float, traffic: float, call: float, update: float, crowded: float
) -> None:
    folder = tmp_path_factory.mktemp("host")
    links = {name: {2: Link(1e-4, 1e-9), 4: Link(2e-4, 3e-9)} for name in OPERATIONS}
    host = Host(2, crowded, product, traffic, call, 10 * call, update, links)
    variants = [config_of(), config_of(heads=2), config_of(seq=32), config_of(layers=2), config_of(seq=16, layers=1)]
    files = [step_file(folder / f"step{number}.json", host, config) for number, config in enumerate(variants)]
    files.append(step_file(folder / "beside.json", host, config_of(), beside=1))
    files += [comm_file(folder / f"comm{ranks}.json", host, ranks) for ranks in (2, 4)]
    assert calibrate_command(files, None, str(folder / "mine.yaml")) == 0
    cluster = load_cluster(str(folder / "mine.yaml"))
    assert cluster.host is not None and cluster.host.crowded == pytest.approx(crowded, rel=1e-2)
    assert cluster.host.update_s == pytest.approx(update, rel=1e-2)
    for ranks in (2, 4):
        found, true = cluster.host.link("all_reduce", ranks), host.link("all_reduce", ranks)
        assert found.latency_s == pytest.approx(true.latency_s, rel=1e-2)
        assert found.s_per_byte == pytest.approx(true.s_per_byte, rel=1e-2)
    shape = shape_of(config_of().model)
    for changes in ({"gpus": 1}, {"gpus": 4, "tp": 2, "sequence_parallel": True}, {"gpus": 4, "pp": 2}, {"gpus": 8}):
        strategy = replace(strategy_of(config_of(), 1), global_batch=8, **changes)
        expected = sum(host_step(shape, strategy, host).values())
        assert step_time(shape, strategy, cluster).total == pytest.approx(expected, rel=1e-2), changes


def test_what_cannot_describe_a_cpu_is_refused(tmp_path: Path) -> None:
    links = {name: {2: Link(1e-4, 1e-9)} for name in OPERATIONS}
    host = replace(MACHINE, links=links)
    good, talk = step_file(tmp_path / "step.json", host, config_of()), comm_file(tmp_path / "comm.json", host, 2)
    cases = [
        ([talk], "a one-process bench step has to be among"),
        ([good], "no bench comm over gloo with all_reduce"),
        ([good, comm_file(tmp_path / "few.json", host, 2, OPERATIONS[:1])], "with all_gather at two sizes"),
        ([step_file(tmp_path / "threads.json", host, config_of(threads=2)), talk], "threads_per_process=2"),
        ([step_file(tmp_path / "beside.json", host, config_of(), beside=1), talk], "measured beside others"),
    ]
    for files, message in cases:
        with pytest.raises(UserError, match=message):
            calibrate_command(files, None, str(tmp_path / "mine.yaml"))
    calibrate_command([good, talk], None, str(tmp_path / "mine.yaml"))
    text = (tmp_path / "mine.yaml").read_text()
    (tmp_path / "broken.yaml").write_text(text.replace("send_recv", "send_only"))
    with pytest.raises(UserError, match=r"host\.links\.send_recv"):
        load_cluster(str(tmp_path / "broken.yaml"))
