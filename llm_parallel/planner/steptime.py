"""Time of a training step: computation, memory traffic, and the communication that computation does not hide.

The time of a layer is that of its matrix products, attention, elementwise traffic and tensor-parallel communication. A
pipeline is as fast as its slowest stage. Data-parallel communication counts where backward does not hide it. The
constants are those of the chip (hardware.py), fitted to published rows (published/fit.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from llm_parallel.planner import adapters
from llm_parallel.planner.hardware import Cluster
from llm_parallel.planner.host import host_step
from llm_parallel.planner.memory import experts_of_stage, parameters_of_stage, stage_layers
from llm_parallel.planner.pipeline_simulation import Timeline, simulate
from llm_parallel.planner.shapes import Experts, Shape, Strategy
from llm_parallel.planner.step_parts import Pass, StepTime

BACKWARD_FLASH = 2.5 / 0.8
"""Backward over forward time of flash attention: five matrix products instead of two, at four fifths of the rate."""
FLASH_ROWS = 512
"""Sequence length at which flash attention reaches half its rate: the rows of two tiles."""
UNFUSED = 2.5
"""Memory traffic of norms, rotation and activation when each operator runs by itself, relative to fused ones."""
UNFUSED_KERNELS = 2.0
"""Kernels of a layer whose attention is not fused (copies into heads, two batched products, scale and mask, softmax,
dropout, and a copy back), relative to one whose attention is a single kernel."""
BUCKET, BUCKET_OF_RANK = 40e6, 1e6
"""Parameters in a gradient bucket of Megatron-Core's distributed optimizer: the larger of the first, and the second for
every replica."""
ADAM_BYTES = 30
"""Bytes that AdamW reads and writes for a parameter: fp32 weight, two moments and gradient, and a bf16 copy."""


class Model:
    """Times of one shape under one strategy on one cluster."""

    def __init__(self, shape: Shape, strategy: Strategy, cluster: Cluster) -> None:
        self.shape, self.strategy, self.cluster = shape, strategy, cluster
        self.chip, self.constants = cluster.chip, cluster.chip.constants

    def _matrices(self) -> dict[str, tuple[float, float]]:
        """(inputs, outputs) of a layer's matrices on one GPU."""
        shape, tp = self.shape, self.strategy.tp
        wide, gate = shape.heads * shape.channels / tp, 2 if shape.gated else 1
        return {
            "qkv": (shape.hidden, wide * (1 + 2 * shape.groups / shape.heads)),
            "out": (wide, shape.hidden),
            **(
                {"up": (shape.hidden, gate * shape.ffn / tp), "down": (shape.ffn / tp, shape.hidden)}
                if shape.ffn
                else {}
            ),
        }

    def _products(self, matrices: Iterable[tuple[float, float]], rows: float = 1.0, copies: float = 1.0) -> float:
        """Seconds of a micro batch's matrix products: arithmetic, and the traffic of operands and results, which the
        arithmetic of narrow matrices does not hide. ``rows``: how often each token is multiplied, by one of ``copies``
        matrices of the same dimensions."""
        strategy, size = self.strategy, 2.0
        rate = self._gemm_rate()
        if strategy.precision == "fp8":
            rate, size = self.chip.peak_fp8_flops * self.constants.gemm_fp8, 1.0
        elif strategy.precision == "fp32":
            rate, size = rate / 2.0, 4.0
        tokens, found = strategy.tokens * rows, 0.0
        for inputs, outputs in matrices:
            traffic = size * (tokens * inputs + copies * inputs * outputs) + max(size, 2.0) * tokens * outputs
            found += 2.0 * tokens * inputs * outputs / rate + self._move(traffic)
        return found

    def _gemm_rate(self) -> float:
        """FLOP/s of a product in 16 bits."""
        return self.chip.peak_flops * (self.constants.gemm_te if self.strategy.te else self.constants.gemm)

    def _move(self, size: float) -> float:
        return size / (self.chip.memory_bytes_per_s * self.constants.memory)

    def group_rate(self, members: int, span: int) -> tuple[float, float]:
        """Bytes per second of one GPU in a collective among ``members`` whose ranks are ``span`` apart, and the latency
        of a message.

        Members on one node communicate over NVLink; among several nodes, all members on a node use their own network
        cards at the same time.
        """
        if members * span <= self.cluster.gpus_per_node:
            return self.cluster.nvlink_bytes_per_s * self.constants.nvlink, self.cluster.nvlink_latency_s
        beside = max(1, self.cluster.gpus_per_node // span)
        nics = self.cluster.nic_bytes_per_s * self.constants.nic * beside
        return min(nics, self.cluster.nvlink_bytes_per_s * self.constants.nvlink), self.cluster.nic_latency_s

    def _collective(self, size: float, members: int, span: int, rounds: int = 1, count: int = 1) -> float:
        """Seconds of all-gathers or reduce-scatters (``rounds`` 1) or all-reduces (2) over rings, of ``size`` bytes in
        all, in ``count`` equal calls. NCCL may run an all-reduce among many nodes over a tree, whose latency is
        lower."""
        if members == 1:
            return 0.0
        rate, _ = self.group_rate(members, span)
        nodes = -(-members * span // self.cluster.gpus_per_node)
        near, far = self.cluster.nvlink_latency_s, self.cluster.nic_latency_s
        if members * span <= self.cluster.gpus_per_node:
            way = (members - 1) * near
        else:
            nodes = min(members, nodes)
            way = nodes * far + (members - nodes) * near
            if rounds == 2:
                way = min(way, math.log2(2 * nodes) * far + members / nodes * near)
        return rounds * ((members - 1) / members * size / rate + count * way)

    def layer(self, backward: bool) -> Pass:
        """Forward or backward of one layer for one micro batch."""
        shape, strategy = self.shape, self.strategy
        tokens, tp = strategy.tokens, strategy.tp
        # Frozen matrices have no gradient of their own.
        compute = self._products(self._matrices().values()) * (2 if backward and strategy.adapter is None else 1)
        attention, traffic = self._attention(backward)
        elementwise = self._move(traffic) + self._move(self._elementwise_bytes() * (2 if backward else 1))
        size = 2.0 * tokens * shape.hidden
        # Two all-reduces, or two pairs of all-gather and reduce-scatter, in each direction.
        sent = (2.0 if shape.ffn else 1.0) * self._collective(size, tp, 1, rounds=2)
        if backward:
            numbers = shape.layer_matrices + shape.expert_matrices / strategy.ep
            elementwise += self._move(self._accumulated_bytes(numbers))
        if strategy.adapter is not None:
            adapter = strategy.adapter
            compute += self._products(adapters.products(shape, strategy, adapter)) * (2 if backward else 1)
            elementwise += self._move(adapters.added_bytes(shape, strategy, adapter, backward))
            # What is as wide as the rank is gathered or summed instead of the hidden rows.
            sent += self._collective(2.0 * tokens * adapter.rank * adapters.projections(adapter), tp, 1, rounds=2)
        if strategy.overlap_tp:
            sent *= 1.0 - self.constants.tp_hidden
        if shape.experts is not None:
            compute += self._expert_products(shape.experts) * (2 if backward else 1)
            elementwise += self._move(self._expert_bytes(shape.experts)) * (2 if backward else 1)
            sent += self._expert_communication(shape.experts)
        return Pass(compute + attention, elementwise, sent, self._ring(attention, backward), self._host())

    def _host(self) -> float:
        """Seconds of one layer's pass that do not depend on its size: the begin and end of its kernels. Attention that
        is not fused runs about as many kernels as all the rest."""
        return self.constants.layer_us * 1e-6 * (1.0 if self.strategy.flash else UNFUSED_KERNELS)

    def _attention(self, backward: bool) -> tuple[float, float]:
        """Seconds of attention's matrix products, and bytes of scores that are moved."""
        shape, strategy = self.shape, self.strategy
        # Causal flash attention skips half of the pairs and all outside of a window, and context parallelism divides
        # the rest evenly.
        seen = min(strategy.document or strategy.seq, strategy.seq)
        pairs = strategy.tokens * (seen * shape.seen(seen) if strategy.flash else strategy.seq)
        flops = 4.0 * pairs * shape.heads * shape.channels / strategy.tp
        if strategy.flash:
            share = strategy.flash_rate * (self.constants.flash_te if strategy.te else self.constants.flash)
            # Context parallelism computes on pieces of the sequence, two for each rank.
            length = min(seen, strategy.seq if strategy.cp == 1 else strategy.seq / (2 * strategy.cp))
            rate = self.chip.peak_flops * share / (1.0 + FLASH_ROWS / length)
            return flops / rate * (BACKWARD_FLASH if backward else 1.0), 0.0
        scores = pairs * shape.heads / strategy.tp
        per_score = 13 if shape.dropout else 10
        rate = self._gemm_rate()
        return flops / rate * (2 if backward else 1), per_score * scores * (1.5 if backward else 1.0)

    def _elementwise_bytes(self) -> float:
        """Bytes that norms, residuals, rotation and activation move in one layer's forward."""
        shape, strategy = self.shape, self.strategy
        rows = (22 if shape.dropout else 16) * shape.hidden / (strategy.tp if strategy.sequence_parallel else 1)
        rotary = 4 * (shape.heads + shape.groups) * shape.channels if shape.rotary else 0
        if shape.qk_norm != "none":  # queries and keys are read and written once more
            rotary += 4 * (shape.heads + shape.groups) * shape.channels
        activation = (6 if shape.gated else 4) * shape.ffn
        factor = 1.0 if strategy.fused else UNFUSED
        cast = 0.0
        if strategy.precision == "fp8":  # every product's input is converted, in both memory orders
            cast = 4.0 * (2 * shape.hidden + (shape.heads * shape.channels + shape.ffn) / strategy.tp)
        return strategy.tokens * (factor * (rows + (rotary + activation) / strategy.tp) + cast)

    def _accumulated_bytes(self, matrices: float) -> float:
        """Bytes that are moved where a micro batch's gradients of ``matrices`` numbers of the model are added to those
        before it by an operator of its own: backward's own in 16 bits are read, the accumulated ones read and
        written."""
        strategy = self.strategy
        if not strategy.adds_gradients or strategy.adapter is not None:
            return 0.0
        return (2.0 + 2.0 * strategy.grad_bytes) * matrices / strategy.tp

    def _expert_products(self, experts: Experts) -> float:
        """Seconds of the products of a GPU's experts, which have as many tokens each, and of the router."""
        shape, tp = self.shape, self.strategy.tp
        matrices = (shape.hidden, (2 if shape.gated else 1) * experts.ffn / tp), (experts.ffn / tp, shape.hidden)
        share = tp if self.strategy.sequence_parallel else 1
        router = 2.0 * self.strategy.tokens / share * shape.router / self._gemm_rate()
        return router + self._products(matrices, experts.active, experts.count / self.strategy.ep)

    def _expert_bytes(self, experts: Experts) -> float:
        """Bytes that a layer's experts move in forward beside products: rows are sorted by rank and then by expert on
        the way there, and back on the way home (a read and a write each), and the activation."""
        shape, strategy = self.shape, self.strategy
        sorted_ = 4 * 2 * 2 * shape.hidden / (strategy.tp if strategy.sequence_parallel else 1)
        return strategy.tokens * experts.active * (sorted_ + (6 if shape.gated else 4) * experts.ffn / strategy.tp)

    def _expert_communication(self, experts: Experts) -> float:
        """Seconds of a layer's experts in one direction: all-to-alls that bring rows to their experts and back, of the
        tokens that sequence parallelism leaves each rank; and gathering and reducing those rows over tensor-parallel
        ranks, which divide each expert (Singh et al. 2023, arXiv 2303.06318)."""
        strategy, shape = self.strategy, self.shape
        rows = 2.0 * strategy.tokens * experts.active * shape.hidden
        found = self._collective(rows, strategy.tp, 1, rounds=2)
        own = rows / (strategy.tp if strategy.sequence_parallel else 1)
        return found + 2.0 * self._all_to_all(own, strategy.ep, strategy.tp)

    def _all_to_all(self, size: float, members: int, span: int) -> float:
        """Seconds in which each of ``members`` sends an equal part of ``size`` bytes to each, over NVLink to those on
        its node and by its own network card to the others."""
        if members == 1:
            return 0.0
        here = min(members, max(1, self.cluster.gpus_per_node // span))
        near = self.cluster.nvlink_bytes_per_s * self.constants.nvlink
        inside = (here - 1) / members * size / near + self.cluster.nvlink_latency_s
        if here == members:
            return inside
        outside = (members - here) / members * size / (self.cluster.nic_bytes_per_s * self.constants.nic)
        return max(inside, outside + self.cluster.nic_latency_s)

    def _ring(self, attention: float, backward: bool) -> float:
        """Seconds of sending keys and values around the context-parallel group that attention does not hide."""
        strategy, shape = self.strategy, self.shape
        if strategy.cp == 1:
            return 0.0
        size = 4.0 * strategy.tokens * shape.groups * shape.channels / strategy.tp * (2 if backward else 1)
        rate, latency = self.group_rate(strategy.cp, strategy.tp)
        return max(0.0, (strategy.cp - 1) * (size / rate + latency) - attention)

    def output(self, backward: bool) -> Pass:
        """Output projection and loss of one micro batch on the last stage."""
        flops = 2.0 * self.strategy.tokens * self.shape.vocab * self.shape.hidden / self.strategy.tp
        logits = self.strategy.tokens * self.shape.vocab / self.strategy.tp
        # The output projection stays in 16 bits where the layers run in 8.
        rate = self._gemm_rate()
        traffic = logits * 8 + (self._accumulated_bytes(self.shape.vocab * self.shape.hidden) if backward else 0.0)
        adapter = self.strategy.adapter
        trained = adapter is None or "lm_head" in adapter.modules_to_save
        compute = flops * (2 if backward and trained else 1) / rate
        if adapter is not None and "lm_head" in adapter.targets:
            sides = (self.shape.hidden, adapter.rank), (adapter.rank, self.shape.vocab / self.strategy.tp)
            compute += self._products(sides) * (2 if backward else 1)
        return Pass(compute, self._move(traffic))

    def stage(self, stage: int, backward: bool) -> Pass:
        """Forward or backward of all layers of a stage for one micro batch, without recomputation."""
        found = self.layer(backward).times(sum(stage_layers(self.shape, self.strategy)[stage]))
        return found + self.output(backward) if stage == self.strategy.pp - 1 else found

    def again(self) -> Pass:
        """What backward recomputes in one layer."""
        kept = self.strategy.recompute
        if kept in ("full", "qkv"):
            found, matrices = self.layer(False), self._matrices()
            spared = ["qkv"] if kept == "qkv" else []
            if self.strategy.early_stop:  # backward does not need the result of the last product
                spared.append("down")
                found = replace(found, tp=found.tp / 2)
            return replace(found, compute=found.compute - self._products(matrices[name] for name in spared))
        if kept == "ops":  # every second of q, k, v, out, gate, up and down; the result of the last is not needed
            shape, tp = self.shape, self.strategy.tp
            columns = (shape.hidden, shape.groups * shape.channels / tp), (shape.hidden, shape.ffn / tp)
            products = self._products([columns[0], self._matrices()["out"], *columns[1:][: int(shape.gated)]])
            return Pass(products, self._move(self._elementwise_bytes()))
        if kept == "selective":  # attention's forward, which Megatron-Core calls again where it is fused too
            products, traffic = self._attention(False)
            return Pass(products, self._move(traffic))
        return Pass()

    def _sharded_exposed(self, compute: float) -> float:
        """Seconds of the all-gathers and reduce-scatters of sharded gradients (ZeRO-2) and weights (ZeRO-3) in a step
        that ``compute`` does not hide."""
        strategy = self.strategy
        if strategy.zero < 2:
            return 0.0
        size = 2.0 * sum(stage_layers(self.shape, strategy)[0]) * self.shape.layer_parameters / strategy.tp
        members = strategy.dp * strategy.cp
        layers = sum(stage_layers(self.shape, strategy)[0])
        gather = self._collective(size, members, strategy.tp, count=layers)
        scatter = self._collective(size * strategy.grad_bytes / 2, members, strategy.tp, count=layers)
        if strategy.zero == 2:  # every micro batch's gradients are reduced; weights are gathered once, after the update
            sent = strategy.micro_batches * scatter
            return gather + max(sent - compute, sent * (1.0 - self.constants.dp_hidden))
        # In a pipeline the weights stay gathered for all micro batches of the step.
        times = strategy.micro_batches if strategy.pp == 1 else 1
        # Backward gathers again; recomputation uses the same gathered weights.
        alone, beside = (0.0, 2.0 * gather + scatter) if strategy.prefetches else (gather, gather + scatter)
        sent = times * beside
        return times * alone + max(sent - compute, sent * (1.0 - self.constants.dp_hidden))

    def _replicas_exposed(self, parameters: float, experts: float, backward: float) -> float:
        """Seconds of reducing gradients and gathering weights that the last backward and the first forward do not
        hide. ``experts`` of the ``parameters`` are held by fewer replicas."""
        strategy = self.strategy
        if strategy.zero >= 2:
            return 0.0
        members, span = strategy.dp * strategy.cp, strategy.tp
        sent = self._reduced(parameters - experts, members, span)
        if experts:
            sent += self._reduced(experts, members // strategy.ep, span * strategy.ep)
        if not strategy.overlap_dp:
            return sent
        return sent - min(self.constants.dp_hidden * sent, backward)

    def _reduced(self, parameters: float, members: int, span: int) -> float:
        """Seconds of reducing the gradients of ``parameters`` and, where the optimizer is sharded, gathering them."""
        strategy = self.strategy
        if members == 1:
            return 0.0
        if strategy.zero == 1:
            count = strategy.dp_collectives or max(1, round(parameters / max(BUCKET, BUCKET_OF_RANK * members)))
            sent = self._collective(strategy.grad_bytes * parameters, members, span, count=count)
            sent += self._collective(2.0 * parameters, members, span, count=count)
        else:
            sent = self._collective(strategy.grad_bytes * parameters, members, span, rounds=2)
        return sent

    def step(self) -> StepTime:
        """Seconds of a whole step."""
        if self.cluster.host is not None:
            return StepTime(**host_step(self.shape, self.strategy, self.cluster.host))
        strategy = self.strategy
        stages = range(strategy.pp)
        again = [self.again().times(sum(layers)) for layers in stage_layers(self.shape, strategy)]
        both = [self.stage(stage, False) + self.stage(stage, True) for stage in stages]
        totals = [one.total + other.total for one, other in zip(both, again)]
        slowest = max(stages, key=lambda stage: totals[stage])
        count = strategy.micro_batches
        send = self._send()
        # The slowest stage waits only while the pipeline fills and drains.
        bubble = (sum(totals) - totals[slowest]) / strategy.vpp + 2.0 * (strategy.pp - 1) * send
        steady = 0.0 if strategy.overlap_pp or strategy.pp == 1 else 2.0 * count * strategy.vpp * send
        parameters = self._trained()
        mine, second = both[slowest].times(count), again[slowest].times(count)
        backward = self.stage(slowest, True).total * count
        experts = max(experts_of_stage(self.shape, strategy, stage) for stage in {0, strategy.pp - 1})
        updated = (parameters - experts + experts * strategy.ep) / (strategy.dp * strategy.cp)
        updated = updated if strategy.zero else parameters
        found = StepTime(
            compute=mine.compute,
            elementwise=mine.elementwise,
            recompute=second.total,
            tp=mine.tp,
            cp=mine.cp,
            pp=steady,
            bubble=bubble,
            dp=self._replicas_exposed(parameters, experts, backward) + self._sharded_exposed(mine.total + second.total),
            optimizer=self._move(ADAM_BYTES * updated),
            host=mine.host,
            waiting=0.0,
        )
        # A step waits for the slowest replica; the stages of a pipeline wait for one another in any case.
        nodes = strategy.gpus / self.cluster.gpus_per_node
        doublings = math.log2(max(1.0, min(nodes, strategy.dp * strategy.cp)))
        return replace(found, waiting=found.total * self.constants.jitter * doublings)

    def _trained(self) -> float:
        """Weights that are trained, on the GPU that has most of them."""
        strategy = self.strategy
        if strategy.adapter is not None:
            return max(
                adapters.trained_parameters(self.shape, strategy, strategy.adapter, stage, sum(layers))
                for stage, layers in enumerate(stage_layers(self.shape, strategy))
            )
        return max(parameters_of_stage(self.shape, strategy, stage) for stage in {0, strategy.pp - 1})

    def _send(self) -> float:
        """Seconds of sending an activation to the next stage."""
        strategy = self.strategy
        if strategy.pp == 1:
            return 0.0
        size = 2.0 * strategy.tokens * self.shape.hidden / strategy.tp
        within = strategy.tp * strategy.cp * strategy.dp * 2 <= self.cluster.gpus_per_node
        rate = self.cluster.nvlink_bytes_per_s * self.constants.nvlink
        if not within:
            rate = self.cluster.nic_bytes_per_s * self.constants.nic
        return size / rate + (self.cluster.nvlink_latency_s if within else self.cluster.nic_latency_s)

    def timeline(self, micro_batches: int | None = None) -> Timeline:
        """The step's pipeline, simulated event by event."""
        strategy = self.strategy
        again = self.again()
        layers = stage_layers(self.shape, strategy)
        forward, backward = [], []
        for stage in range(strategy.pp):
            one, other = self.layer(False).total, self.layer(True).total + again.total
            forward.append([one * count for count in layers[stage]])
            backward.append([other * count for count in layers[stage]])
        forward[-1][-1] += self.output(False).total
        backward[-1][-1] += self.output(True).total
        return simulate(forward, backward, micro_batches or strategy.micro_batches, self._send())


def step_time(shape: Shape, strategy: Strategy, cluster: Cluster) -> StepTime:
    """Seconds of a step by cause."""
    return Model(shape, strategy, cluster).step()
