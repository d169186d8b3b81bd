"""AdamW as a torch optimizer on our kernel; its state and options are those of torch.optim.AdamW."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llm_kernels.adamw.op import Addresses, adamw_
from llm_kernels.adamw.ref import AdamWStep


class FusedAdamW(torch.optim.Optimizer):
    """One launch per parameter group; state dicts load into torch.optim.AdamW and back.

    ``scale`` (fp32 scalar on the device, or None) multiplies every gradient in the step that follows and is then
    forgotten: gradient clipping and loss scaling cost no pass of their own. ``low`` maps a parameter to a bf16 or fp16
    tensor of as many elements that is written with every step.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.backend = backend
        self.scale: Tensor | None = None
        self.low: Mapping[Tensor, Tensor] = {}
        self._addresses: dict[tuple, Addresses] = defaultdict(Addresses)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What load_state_dict ends in. Raises ValueError for options of torch's AdamW that ours has not."""
        for group in state.get("param_groups", ()):
            for option in ("amsgrad", "maximize"):
                if group.get(option):
                    raise ValueError(f"the state was made with {option}=True, which FusedAdamW does not have")
        super().__setstate__(state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            for key, members in self._alike(group).items():
                self._step_alike((number, *key), group, members)
        self.scale = None
        return loss

    def _alike(self, group: dict[str, Any]) -> dict[tuple, list[Tensor]]:
        """Parameters with gradients, by what one launch must have in common: step number, dtypes, device."""
        found: dict[tuple, list[Tensor]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if "exp_avg" not in state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p) for _ in range(2))
            if state["step"].is_cuda:  # as torch's fused AdamW leaves it; read on the host at every step
                state["step"] = state["step"].cpu()
            low = self.low.get(p)
            key = (int(state["step"]), p.grad.dtype, None if low is None else low.dtype, p.device)
            found[key].append(p)
        return found

    def _step_alike(self, key: tuple, group: dict[str, Any], members: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        step = key[1] + 1
        adamw_(
            members,
            [p.grad for p in members if p.grad is not None],
            [self.state[p]["exp_avg"] for p in members],
            [self.state[p]["exp_avg_sq"] for p in members],
            AdamWStep(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], step),
            low=[self.low[p] for p in members] if key[3] is not None else (),
            scale=self.scale,
            addresses=self._addresses[key[:1] + key[2:]],
            backend=self.backend,
        )
        for p in members:
            self.state[p]["step"] += 1
