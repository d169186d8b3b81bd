"""AdamW with moments in 8 bits (Dettmers et al. 2021, arXiv 2110.02861), as bitsandbytes' AdamW8bit has them: two codes
and two 256th parts of a scale for each number instead of two fp32 moments.

Tensors of fewer than 4,096 numbers and the embedding keep fp32 moments, as bitsandbytes advises: the embedding's
gradients are those of few rows, whose moments differ by orders of magnitude within a block.

The state of a parameter that others see, ``exp_avg`` and ``exp_avg_sq`` in fp32, exists only within
``moments_in_fp32``: checkpoints and copies in memory hold fp32 numbers, which any layout and any optimizer can take.
Numbers that were made from codes become the same codes again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from llm_parallel.parallel.boxes import Box
from llm_parallel.parallel.low_bits import BLOCK, Blocks, Strip, nearest_codes, scales_for, values_of

LEAST_NUMBERS = 4096
EMBEDDING = "embedding."
MAXIMA = 3
"""Largest first moment, largest negative one, largest second moment."""


def in_8_bits(box: Box) -> bool:
    """Whether a tensor of the whole model has moments in 8 bits."""
    return prod(box.whole[box.stacked :]) >= LEAST_NUMBERS and not box.key.startswith(EMBEDDING)


@dataclass
class Moments:
    """Moments of one shard in 8 bits: codes uint8 [n] and scales fp32 [blocks], of the first and the second.

    incomplete: places of the blocks that other processes have a part of; shared: their places in what is exchanged."""

    blocks: Blocks
    codes: tuple[Tensor, Tensor]
    scales: tuple[Tensor, Tensor]
    incomplete: Tensor
    shared: Tensor

    def of(self, strip: Strip) -> tuple[Tensor, Tensor]:
        """Both moments of a strip, fp32 [rows, width]."""
        first, second = (
            values_of(strip.of(codes), signed).mul_(strip.spread(scales))
            for codes, scales, signed in zip(self.codes, self.scales, (True, False))
        )
        return first, second

    def take(self, strip: Strip, moments: Iterable[Tensor], scales: Sequence[Tensor]) -> None:
        """Rounds both moments of a strip to codes of blocks with these scales."""
        for number, (moment, scale) in enumerate(zip(moments, scales)):
            each = strip.spread(torch.where(scale == 0, 1.0, scale))
            strip.of(self.codes[number]).copy_(nearest_codes(moment / each, number == 0))

    def between(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        """fp32 moments of the shard's numbers ``low`` to ``high``, flat."""
        strips = [strip for strip in self.blocks.strips if strip.start < high and strip.stop > low]
        start = strips[0].start
        parts = [self.of(strip) for strip in strips]
        first, second = (torch.cat([part[n].flatten() for part in parts])[low - start : high - start] for n in (0, 1))
        return first, second


def largest_of(strip: Strip, moments: tuple[Tensor, Tensor], found: Tensor) -> None:
    """Raises ``found`` [3, blocks] to the largest numbers of a strip."""
    for row, x in zip(found, (moments[0], -moments[0], moments[1])):
        strip.largest_into(row, x)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose shards of large tensors have moments in 8 bits; ``place`` says which they are. A step is collective
    over ``group``, the processes that hold parts of the same tensors."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.moments: dict[Tensor, Moments] = {}
        self._blocks: dict[Tensor, Blocks] = {}
        self._shared: dict[Tensor, Tensor] = {}
        self._group: dist.ProcessGroup | None = None
        self._num_shared = 0
        self._shown = False
        self.rounded = torch.zeros(2, 2, dtype=torch.float64)
        """Of both moments that were taken last: sums of squares of what rounding changed, and of the numbers."""

    def place(
        self, shards: Sequence[tuple[Tensor, Sequence[Box], int, int]], tensors: Sequence[Box], group: Any
    ) -> None:
        """Says where shards lie, before they have moments. shards: (main parameter, boxes of its parameter, numbers of
        this from … to …); tensors: one box of every tensor that processes of the group hold, in the same order on all
        of them. Collective over the group."""
        begins, total = {}, 0
        for box in tensors:
            begins[box.key, box.offset[: box.stacked]] = total
            total += -(-prod(box.whole[box.stacked :]) // BLOCK)
        device = next((main.device for main, *_ in shards), torch.device("cpu"))
        cut = torch.zeros(total, dtype=torch.int32, device=device)
        places: dict[Tensor, Tensor] = {}
        for main, boxes, start, stop in shards:
            if not in_8_bits(boxes[0]):
                continue
            blocks = self._blocks[main] = Blocks(boxes, start, stop, device)
            begin = begins[boxes[0].key, boxes[0].offset[: boxes[0].stacked]]
            places[main] = (begin + blocks.numbers[~blocks.complete]).to(device)
            cut[places[main]] = 1
        self._group = group if group.size() > 1 else None
        if self._group is not None:
            dist.all_reduce(cut, dist.ReduceOp.MAX, group=self._group)
        numbers = cut.cumsum(0) - 1
        self._num_shared = int(cut.sum())
        self._shared = {main: numbers[where] for main, where in places.items()}

    def allocate(self) -> None:
        """Gives every parameter without moments those that are zero."""
        for parameter in self._parameters():
            state = self.state[parameter]
            if "step" not in state:
                eight = parameter in self._blocks
                state["step"] = torch.zeros((), device="cpu" if eight else parameter.device)
            if parameter in self._blocks:
                if parameter not in self.moments:
                    self._allocate_codes(parameter)
            elif "exp_avg" not in state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)

    def _allocate_codes(self, parameter: Tensor) -> None:
        blocks, count = self._blocks[parameter], parameter.numel()
        zero = (int(nearest_codes(torch.zeros(1), signed)) for signed in (True, False))
        first, second = (torch.full((count,), code, dtype=torch.uint8, device=parameter.device) for code in zero)
        scales = [torch.zeros(len(blocks.numbers), device=parameter.device) for _ in range(2)]
        incomplete = (~blocks.complete).nonzero()[:, 0].to(parameter.device)
        self.moments[parameter] = Moments(
            blocks, (first, second), (scales[0], scales[1]), incomplete, self._shared[parameter]
        )

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Steps every parameter. Collective."""
        assert closure is None and not self._shown
        self.allocate()
        found: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            plain = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter in self.moments:
                    found[parameter] = self._update(parameter, group)
                else:
                    plain.append(parameter)
            _step_in_fp32(plain, [self.state[parameter] for parameter in plain], group)
        scales = self._agreed(found, fresh=True)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in found:
                    self._finish(parameter, group, scales[parameter])

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Updates a shard. Its moments of whole blocks are rounded at once; the maxima of others are returned, whose
        moments are made once more when the scales are known."""
        held, state = self.moments[parameter], self.state[parameter]
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"]), group["betas"]
        rate, root = group["lr"] / (1 - beta1**step), sqrt(1 - beta2**step)
        found = torch.zeros(MAXIMA, len(held.blocks.numbers), device=parameter.device)
        for strip in held.blocks.strips:
            moments = self._advanced(parameter, strip, group)
            x = strip.of(parameter.view(-1))
            x.mul_(1 - group["lr"] * group["weight_decay"])
            x.addcdiv_(moments[0], (moments[1].sqrt() / root).add_(group["eps"]), value=-rate)
            largest_of(strip, moments, found)
            if strip.where is None:
                here = slice(strip.at, strip.at + strip.rows)
                new = _scales(found[:, here], fresh=True)
                for scales, values in zip(held.scales, new):
                    scales[here] = values
                held.take(strip, moments, held.scales)
        return found

    def _advanced(self, parameter: Tensor, strip: Strip, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The moments of a strip after this step, in fp32."""
        assert parameter.grad is not None
        (first, second), (beta1, beta2) = self.moments[parameter].of(strip), group["betas"]
        gradient = strip.of(parameter.grad.view(-1)).float()
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        return first, second

    def _finish(self, parameter: Tensor, group: dict[str, Any], scales: tuple[Tensor, Tensor]) -> None:
        """Rounds the moments of blocks that are not whole strips, whose old scales stand until here."""
        held = self.moments[parameter]
        for strip in held.blocks.strips:
            if strip.where is not None:
                held.take(strip, self._advanced(parameter, strip, group), scales)
        held.scales = scales

    def _agreed(self, found: dict[Tensor, Tensor], fresh: bool) -> dict[Tensor, tuple[Tensor, Tensor]]:
        """Scales of all blocks from this process's maxima, and for blocks that are cut from those of all processes."""
        if self._group is not None and self._num_shared:
            device = next((maxima.device for maxima in found.values()), torch.device("cpu"))
            both = torch.zeros(MAXIMA, self._num_shared, device=device)
            for parameter, maxima in found.items():
                held = self.moments[parameter]
                both[:, held.shared] = torch.maximum(both[:, held.shared], maxima[:, held.incomplete])
            dist.all_reduce(both, dist.ReduceOp.MAX, group=self._group)
            for parameter, maxima in found.items():
                held = self.moments[parameter]
                maxima[:, held.incomplete] = both[:, held.shared]
        return {parameter: _scales(maxima, fresh) for parameter, maxima in found.items()}

    @contextmanager
    def moments_in_fp32(self, take: bool) -> Iterator[None]:
        """While inside, all moments stand in ``state`` in fp32. ``take``: they are rounded to 8 bits at the end, which
        is collective; else they are dropped. Nested uses do nothing."""
        if self._shown:
            yield
            return
        self.allocate()
        for parameter, held in self.moments.items():
            first, second = held.between(0, parameter.numel())
            self.state[parameter]["exp_avg"] = first.view(parameter.shape)
            self.state[parameter]["exp_avg_sq"] = second.view(parameter.shape)
        self._shown = True
        try:
            yield
            if take:
                self._take()
        finally:
            self._shown = False
            for parameter in self.moments:
                for name in ("exp_avg", "exp_avg_sq"):
                    self.state[parameter].pop(name, None)

    @torch.no_grad()
    def _take(self) -> None:
        found = {}
        for parameter, held in self.moments.items():
            state = self.state[parameter]
            state["step"] = state["step"].cpu()
            found[parameter] = torch.zeros(MAXIMA, len(held.blocks.numbers), device=parameter.device)
            for strip in held.blocks.strips:
                largest_of(strip, _given(state, strip), found[parameter])
        self.rounded.zero_()
        for parameter, scales in self._agreed(found, fresh=False).items():
            held = self.moments[parameter]
            held.scales = scales
            for strip in held.blocks.strips:
                given = _given(self.state[parameter], strip)
                held.take(strip, given, scales)
                sums = [[(x - y).square().sum(), x.square().sum()] for x, y in zip(given, held.of(strip))]
                self.rounded += torch.tensor(sums, dtype=torch.float64)


def _given(state: dict[str, Tensor], strip: Strip) -> tuple[Tensor, Tensor]:
    """The fp32 moments that a parameter's state has for a strip."""
    return strip.of(state["exp_avg"].view(-1)), strip.of(state["exp_avg_sq"].view(-1))


def _scales(maxima: Tensor, fresh: bool) -> tuple[Tensor, Tensor]:
    return scales_for(maxima[0], maxima[1], fresh), maxima[2].clone()


def _step_in_fp32(parameters: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> None:
    if not parameters:
        return
    beta1, beta2 = group["betas"]
    adamw(
        parameters,
        [parameter.grad for parameter in parameters],
        *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")),
        [],
        [state["step"] for state in states],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
