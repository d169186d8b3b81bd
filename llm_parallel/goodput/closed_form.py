"""Expected goodput by formula, without simulation.

Kokolis et al. 2024 (arXiv 2410.21680) for the first order, Young 1974 and Daly 2006 (Future Generation Computer Systems
22, 303) for checkpoints, Erlang's loss formula for spares.
"""

from __future__ import annotations

import math
from dataclasses import replace

from llm_parallel.goodput.rates import RANGES, Job


def kokolis_ettr(mtbf_s: float, down_s: float, interval_s: float, write_s: float) -> float:
    """Share of time that trains, ``(1 - (u0 + dt/2) / M) / (1 + w / dt)``, 0 if that is negative.

    It ignores a second failure within ``down_s`` or within an interval, so it holds while (u0 + dt/2 + w) / M < 0.1.
    """
    return max(0.0, 1.0 - (down_s + interval_s / 2) / mtbf_s) / (1.0 + write_s / interval_s)


def exact_ettr(mtbf_s: float, down_s: float, interval_s: float, write_s: float) -> float:
    """Share of time that trains when failures follow a Poisson process at all times, also during recovery.

    One interval and its checkpoint take ``M exp(u0 / M) (exp((dt + w) / M) - 1)`` on average (Daly 2006).
    """
    exponent = (down_s + interval_s + write_s) / mtbf_s
    if exponent > 700:  # exp would overflow; no interval is ever finished
        return 0.0
    return interval_s / (mtbf_s * math.exp(down_s / mtbf_s) * math.expm1((interval_s + write_s) / mtbf_s))


def young_interval_s(mtbf_s: float, write_s: float) -> float:
    """First-order best interval ``sqrt(2 w M)``, seconds."""
    return math.sqrt(2 * write_s * mtbf_s)


def best_interval_s(mtbf_s: float, write_s: float) -> float:
    """The interval at which ``exact_ettr`` is largest, seconds: the root of ``1 - dt/M = exp(-(dt + w)/M)``.

    Recovery time does not move it. It is 0 if a checkpoint costs nothing.
    """
    ratio = write_s / mtbf_s
    low, high = 0.0, 1.0  # of dt / M
    for _ in range(200):
        middle = (low + high) / 2
        if -math.expm1(-middle - ratio) > middle:
            low = middle
        else:
            high = middle
    return low * mtbf_s


def erlang_b(servers: int, load: float) -> float:
    """Erlang's loss formula: the share of time in which all ``servers`` are busy under ``load`` erlang."""
    blocked = 1.0
    for server in range(1, servers + 1):
        blocked = load * blocked / (server + load * blocked)
    return blocked


def goodput(job: Job) -> float:
    """Training done, relative to the same GPUs without failures or checkpoints, 0 to 1.

    Exact for ``restart``, and for ``wait`` too: failures come only while the job is not waiting, so that waiting is
    time put in between, and its share is Erlang's loss formula with one server more than spares. For ``shrink`` it is
    the mean over how many nodes are out, with one restart for each node that comes back.
    """
    full = exact_ettr(job.mtbf_s, job.down_s, job.interval_s, job.write_s)
    if job.policy == "restart":
        return full
    load = job.failures_per_s * job.hardware_share * job.repair_s
    if job.policy == "wait":
        return full * (1.0 - erlang_b(job.spare_nodes + 1, load))
    total = 0.0
    for nodes_out, share in shares_of_nodes_out(job):
        capacity = job.capacity(nodes_out)
        if capacity == 0.0:
            continue
        grows = job.returns_to_grow(nodes_out) == 1
        total += share * capacity * _resizing_ettr(job, capacity, nodes_out / job.repair_s if grows else 0.0)
    return total


def _resizing_ettr(job: Job, capacity: float, returns_per_s: float) -> float:
    """Share of time that trains at ``capacity`` while nodes come back that let the job grow.

    A span begins with a restart and ends with a failure, or with the first checkpoint after a return, which is when
    the job grows. Failures come at a constant rate, so that a span's mean time is its chance of failing over that rate.
    """
    rate = job.failures_per_s * capacity
    cycle_s = job.interval_s + job.write_s
    unfailed, unreturned = math.exp(-rate * cycle_s), math.exp(-returns_per_s * cycle_s)

    def span(start_s: float) -> tuple[float, float]:
        """Expected cycles that are kept, and the chance that it ends by growing."""
        first = math.exp(-rate * start_s) * unfailed
        still = math.exp(-returns_per_s * start_s) * unreturned
        more = still * unfailed / -math.expm1(-(rate + returns_per_s) * cycle_s)
        return first * (1.0 + more), first * (1.0 - still + more * (1.0 - unreturned))

    kept_after_failure, grows_after_failure = span(job.down_s)
    kept_after_growth, grows_after_growth = span(job.restart_s)
    after_failure, after_growth = 1.0 - grows_after_growth, grows_after_failure  # how often each kind comes
    kept = after_failure * kept_after_failure + after_growth * kept_after_growth
    failed = after_failure * (1.0 - grows_after_failure) + after_growth * (1.0 - grows_after_growth)
    return job.interval_s * kept * rate / failed


def shares_of_nodes_out(job: Job) -> list[tuple[int, float]]:
    """Numbers of nodes in repair with the share of time of each, those over 1e-12 of the largest; failures are in
    proportion to the nodes at work.

    With more nodes out failures come more rarely and nodes come back more often, so the shares rise to one largest and
    fall from there. It is found by bisection, and the neighbours are followed as far as they matter."""
    per_node = job.failures_per_s * job.hardware_share / job.num_nodes * job.repair_s

    def growth(nodes_out: int) -> float:
        """Share of time with one more node out over that with ``nodes_out``."""
        return job.nodes_at_work(nodes_out) * per_node / (nodes_out + 1)

    low, high = 0, job.num_nodes + job.spare_nodes
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if growth(middle) > 1.0 else (low, middle)
    weights = {low: 1.0}
    for nodes_out in range(low, job.num_nodes + job.spare_nodes):
        weight = weights[nodes_out] * growth(nodes_out)
        if weight < 1e-12:
            break
        weights[nodes_out + 1] = weight
    for nodes_out in range(low - 1, -1, -1):
        weight = weights[nodes_out + 1] / growth(nodes_out)
        if weight < 1e-12:
            break
        weights[nodes_out] = weight
    total = math.fsum(weights.values())
    return [(nodes_out, weight / total) for nodes_out, weight in sorted(weights.items())]


def goodput_per_reserved_gpu(job: Job) -> float:
    """``goodput`` with the spares counted as GPUs that are paid for."""
    return goodput(job) * job.num_nodes / (job.num_nodes + job.spare_nodes)


def best_spares(job: Job) -> int:
    """The number of spare nodes with the most training per reserved GPU, at most the largest that ``--spares`` may be;
    0 where the policy never lacks a node.

    Over a wide range the best of 17 numbers is looked for, and then between its neighbours, so at most a hundred
    numbers are tried."""
    if job.policy == "restart":
        return 0
    load = job.failures_per_s * job.hardware_share * job.repair_s
    low, high = 0, min(math.ceil(load + 8 * math.sqrt(load) + 4), int(RANGES["spare_nodes"][2]))
    known: dict[int, float] = {}

    def value(spares: int) -> float:
        if spares not in known:
            known[spares] = goodput_per_reserved_gpu(replace(job, spare_nodes=spares))
        return known[spares]

    while high - low > 32:
        step = (high - low) / 16
        tried = [low + round(step * number) for number in range(17)]
        best = max(range(17), key=lambda number: value(tried[number]))
        low, high = tried[max(best - 1, 0)], tried[min(best + 1, 16)]
    return max(range(low, high + 1), key=value)
