"""Time of a step on the CPU of one machine, whose processes communicate over gloo and share its cores.

The step of one process is a program: a list of computations, collectives and sends. sharing.py runs the programs of all
processes together. Communication over the loopback device takes processor time as well (copies into and out of the
kernel, sums), so it shares the cores like any computation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llm_parallel.planner.memory import parameters_of_stage, stage_layers
from llm_parallel.planner.pipeline_simulation import order
from llm_parallel.planner.shapes import Shape, Strategy
from llm_parallel.planner.sharing import IDLE, Op, share_cores

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "send_recv")
"""Operations whose measured cost a description must hold."""
SCALAR_CALLS = 4
"""All-reduces of a step that carry a few numbers each: losses, token count, gradient norm, and whether all agree."""


@dataclass(frozen=True)
class Link:
    """Cost of an operation among processes that have a core each: every member's core takes ``latency_s + bytes *
    s_per_byte``, with the size as nccl-tests counts it."""

    latency_s: float
    """Seconds of an operation on no bytes."""
    s_per_byte: float
    """Seconds for each further byte."""


@dataclass(frozen=True)
class Host:
    """The CPU of one machine, as measured with one thread per process."""

    cores: int
    """Cores that the processes share."""
    crowded: float
    """Speed of one core while all cores work, relative to one that works alone."""
    product_s: float
    """Seconds of a FLOP in a matrix product."""
    traffic_s: float
    """Seconds of a byte that elementwise operators move."""
    call_s: float
    """Seconds of one layer's forward or backward that do not depend on its size."""
    micro_batch_s: float
    """Seconds of a micro batch that do not depend on its size."""
    update_s: float
    """Seconds of clipping and AdamW for one parameter."""
    links: Mapping[str, Mapping[int, Link]]
    """Cost of communication by operation and number of members."""

    def link(self, operation: str, members: int) -> Link:
        """The measured cost; for a number of members that was not measured, a line through the two nearest ones.

        With only one measured number, the cost is scaled as in a ring of n members, in which each sends (n - 1) / n of
        the bytes in n - 1 messages.
        """
        known = self.links[operation]
        if members in known:
            return known[members]
        nearest = sorted(known, key=lambda count: abs(count - members))[:2]
        first = nearest[0]
        if len(nearest) == 1:
            messages, share = (members - 1) / (first - 1), (members - 1) / members * first / (first - 1)
            return Link(known[first].latency_s * messages, known[first].s_per_byte * share)
        low, high = sorted(nearest)

        def line(small: float, large: float) -> float:
            return max(small + (large - small) * (members - low) / (high - low), 0.0)

        return Link(
            line(known[low].latency_s, known[high].latency_s), line(known[low].s_per_byte, known[high].s_per_byte)
        )


@dataclass(frozen=True)
class Work:
    """What one process computes."""

    flops: float = 0.0
    """FLOPs of matrix products."""
    traffic: float = 0.0
    """Bytes that elementwise operators move, in fp32."""
    calls: float = 0.0
    """Number of layers' forwards and backwards."""

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.traffic + other.traffic, self.calls + other.calls)

    def times(self, factor: float) -> Work:
        """This work, ``factor`` times."""
        return Work(factor * self.flops, factor * self.traffic, factor * self.calls)

    def seconds(self, host: Host) -> float:
        """Seconds on a core while the other cores are idle."""
        return self.flops * host.product_s + self.traffic * host.traffic_s + self.calls * host.call_s


class HostModel:
    """Programs of all processes of a strategy on a host."""

    def __init__(self, shape: Shape, strategy: Strategy, host: Host) -> None:
        self.shape, self.strategy, self.host = shape, strategy, host
        self.size = 2 if strategy.precision == "bf16" else 4

    def layer(self) -> Work:
        """Forward of one layer for one micro batch. Causal attention counts half of the pairs, which context
        parallelism divides evenly."""
        shape, strategy = self.shape, self.strategy
        tokens, tp = strategy.tokens, strategy.tp
        scores = 4.0 * 0.5 * tokens * strategy.seq * shape.heads * shape.channels / tp
        rows = 12 * shape.hidden / (tp if strategy.sequence_parallel else 1)
        inner = (6 * (shape.heads + shape.groups) * shape.channels + (4 if shape.gated else 3) * shape.ffn) / tp
        return Work(2.0 * tokens * shape.layer_matrices / tp + scores, 4.0 * tokens * (rows + inner), 1.0)

    def output(self) -> Work:
        """Forward of the output projection and the loss."""
        logits = self.strategy.tokens * self.shape.vocab / self.strategy.tp
        return Work(2.0 * logits * self.shape.hidden, 4.0 * 4 * logits)

    def chunk(self, layers: int, last: bool, backward: bool) -> Work:
        """Forward or backward of one model chunk. A backward is two forwards, and three where the forward is
        recomputed."""
        whole = self.layer().times(layers)
        if not backward:
            return whole + self.output() if last else whole
        again = 1.0 if self.strategy.recompute == "full" else 0.0
        found = whole.times(2.0 + again)
        return found + self.output().times(2.0) if last else found

    def alone(self) -> Work:
        """A whole step of one process."""
        count, layers = self.strategy.micro_batches, self.shape.layers
        return (self.chunk(layers, True, False) + self.chunk(layers, True, True)).times(count)

    def _spoken(self, operation: str, size: float, members: int, count: float) -> float:
        """Seconds of a core for ``count`` operations of ``size`` bytes each."""
        if members == 1 or count == 0:
            return 0.0
        link = self.host.link(operation, members)
        return count * (link.latency_s + size * link.s_per_byte)

    def tensor_s(self, layers: int, first: bool, last: bool, backward: bool) -> float:
        """Seconds of tensor-parallel communication in a chunk's forward or backward.

        Attention and the MLP each end with an all-reduce. With sequence parallelism each begins with an all-gather and
        ends with a reduce-scatter, and backward gathers once more for the weights' gradient. The embedding, the logits
        and the loss add theirs at the ends of the pipeline."""
        strategy = self.strategy
        size = float(self.size * strategy.tokens * self.shape.hidden)
        tp = strategy.tp
        again = 1 if backward and strategy.recompute == "full" else 0
        if not strategy.sequence_parallel:
            ends = int(first and not backward) + int(last and backward)
            found = self._spoken("all_reduce", size, tp, 2 * layers * (1 + again) + ends)
        else:
            gathers = 2 * layers * (2 if backward else 1) + 2 * layers * again
            scatters = 2 * layers * (1 + again)
            gathers += int(last) + int(first and backward)
            scatters += int(first and not backward) + int(last and backward)
            found = self._spoken("all_gather", size, tp, gathers)
            found += self._spoken("reduce_scatter", size, tp, scatters)
        if last and not backward:
            found += self._spoken("all_reduce", 4.0 * strategy.tokens, tp, 3)
        return found

    def context_s(self, layers: int, backward: bool) -> float:
        """Seconds of context-parallel communication: all-gathers of keys and values, and in backward reduce-scatters of
        their gradient."""
        strategy = self.strategy
        size = 2.0 * self.size * strategy.micro_batch * strategy.seq * self.shape.groups * self.shape.channels
        again = backward and strategy.recompute == "full"
        found = self._spoken("reduce_scatter" if backward else "all_gather", size / strategy.tp, strategy.cp, layers)
        return found + (self._spoken("all_gather", size / strategy.tp, strategy.cp, layers) if again else 0.0)

    def _ranks(self, place: tuple[int, int, int, int], axis: str) -> tuple[int, ...]:
        """Ranks of the ``axis`` group that the process at (tp, cp, dp, pp) belongs to; empty if it is alone."""
        strategy = self.strategy
        tensor, context, replica, stage = place
        tensors = range(strategy.tp) if axis == "tp" else [tensor]
        contexts = range(strategy.cp) if axis in ("cp", "dp") else [context]
        replicas = range(strategy.dp) if axis == "dp" else [replica]
        ranks = sorted(self.rank(t, c, d, stage) for t in tensors for c in contexts for d in replicas)
        return tuple(ranks) if len(ranks) > 1 else ()

    def rank(self, tensor: int, context: int, replica: int, stage: int) -> int:
        """Rank of the process at these coordinates; tp varies fastest."""
        strategy = self.strategy
        return tensor + strategy.tp * (context + strategy.cp * (replica + strategy.dp * stage))

    def program(self, tensor: int, context: int, replica: int, stage: int) -> list[Op]:
        """The whole step of one process."""
        strategy, place = self.strategy, (tensor, context, replica, stage)
        stages, chunks = strategy.pp, strategy.vpp
        found: list[Op] = []
        for chunk, number, backward in order(stage, stages, chunks, strategy.micro_batches):
            found += self._pass(place, chunk, number, backward)
        return found + self._end(place)

    def _pass(self, place: tuple[int, int, int, int], chunk: int, number: int, backward: bool) -> list[Op]:
        strategy, (*beside, stage) = self.strategy, place
        virtual, total = chunk * strategy.pp + stage, strategy.pp * strategy.vpp
        first, last = virtual == 0, virtual == total - 1
        layers = stage_layers(self.shape, strategy)[stage][chunk]
        before = virtual + 1 if backward else virtual - 1
        after = virtual - 1 if backward else virtual + 1
        size = self.size * strategy.tokens * self.shape.hidden / (strategy.tp if strategy.sequence_parallel else 1)
        # send_recv was measured with a message in each direction, so one direction is half of it.
        send = self._spoken("send_recv", size, 2, 0.5) if strategy.pp > 1 else 0.0
        received = 0 <= before < total
        mark = (*beside, number, backward)
        work = self.chunk(layers, last, backward).seconds(self.host)
        work += self.host.micro_batch_s / (2 * total)
        found = [Op(send, "pp", needs=(before, *mark))] if received else []
        found.append(Op(work, "compute"))
        for axis, seconds in (("tp", self.tensor_s(layers, first, last, backward)),
                              ("cp", self.context_s(layers, backward))):  # fmt: skip
            if seconds:
                found.append(Op(seconds, axis, self._ranks(place, axis)))
        if 0 <= after < total:
            found.append(Op(send, "pp", gives=(virtual, *mark)))
        return found

    def _end(self, place: tuple[int, int, int, int]) -> list[Op]:
        """End of the step: the gradient's reduction, the scalars, the update, and the all-gather of the weights."""
        strategy = self.strategy
        members = strategy.dp * strategy.cp
        parameters = parameters_of_stage(self.shape, strategy, place[3])
        size, sharded = strategy.grad_bytes * parameters, strategy.zero == 1
        group = self._ranks(place, "dp")
        everyone = tuple(range(strategy.gpus)) if strategy.gpus > 1 else ()
        found = []
        if group:
            operation = "reduce_scatter" if sharded else "all_reduce"
            found.append(Op(self._spoken(operation, size / strategy.vpp, members, strategy.vpp), "dp", group))
        if everyone:
            found.append(Op(self._spoken("all_reduce", 64, strategy.gpus, SCALAR_CALLS), "dp", everyone))
        share = parameters / members if sharded else parameters
        found.append(Op(self.host.update_s * share, "optimizer"))
        if group and sharded:
            found.append(Op(self._spoken("all_gather", self.size * parameters, members, 1), "dp", group))
        return found

    def step(self) -> dict[str, float]:
        """Seconds of a step by kind, which add up to the whole. tp, cp, dp and pp include waiting for other
        processes."""
        strategy = self.strategy
        programs = {
            self.rank(tensor, context, replica, stage): self.program(tensor, context, replica, stage)
            for stage in range(strategy.pp)
            for replica in range(strategy.dp)
            for context in range(strategy.cp)
            for tensor in range(strategy.tp)
        }
        _, kinds = share_cores([programs[rank] for rank in sorted(programs)], self.host.cores, self.host.crowded)
        return kinds


def host_of(tree: Mapping[str, Any]) -> Host:
    """Reads the ``host`` section of a cluster description, as ``plan --calibrate`` writes it. Raises KeyError,
    ValueError or TypeError for a field that is missing or is no number."""
    links = {
        name: {
            int(members): Link(1e-6 * float(link["latency_us"]), 1e-9 / float(link["gb_per_s"]))
            for members, link in lines.items()
        }
        for name, lines in tree["links"].items()
    }
    for name in OPERATIONS:
        if not links.get(name):
            raise KeyError(f"host.links.{name}")
    return Host(
        cores=int(tree["cores"]),
        crowded=float(tree["crowded"]),
        product_s=1e-9 / float(tree["gflops_per_s"]),
        traffic_s=1e-9 * float(tree["traffic_s_per_gb"]),
        call_s=1e-6 * float(tree["layer_pass_us"]),
        micro_batch_s=1e-6 * float(tree["micro_batch_us"]),
        update_s=1e-9 * float(tree["update_ns_per_parameter"]),
        links=links,
    )


def host_step(shape: Shape, strategy: Strategy, host: Host) -> dict[str, float]:
    """Seconds of a step, under the names of ``steptime.StepTime``'s fields."""
    kinds = HostModel(shape, replace(strategy, zero=min(strategy.zero, 1)), host).step()
    kinds["bubble"] = kinds.pop(IDLE, 0.0)
    return {**dict.fromkeys(("elementwise", "recompute", "tp", "cp", "pp", "dp", "host", "waiting"), 0.0), **kinds}
