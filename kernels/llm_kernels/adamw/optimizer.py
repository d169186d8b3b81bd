"""AdamW as a torch optimizer that uses our kernel; its state and options are those of torch.optim.AdamW."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llm_kernels.adamw.op import Addresses, adamw_
from llm_kernels.adamw.ref import AdamWStep


class FusedAdamW(torch.optim.Optimizer):
    """AdamW with one launch per parameter group. torch.optim.AdamW loads its state dicts, and it loads those of
    torch.optim.AdamW.

    ``scale`` (fp32 scalar on the device, or None) multiplies every gradient in the next step, and is None again after
    it; so gradient clipping and loss scaling need no pass of their own over the gradients. ``low`` maps a parameter to
    a bf16 or fp16 tensor of as many elements, to which every step writes the rounded parameter.
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
        self._steps: dict[int, tuple[list[Tensor], Tensor]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called at the end of load_state_dict. Raises ValueError for an option of torch's AdamW that we lack."""
        for group in state.get("param_groups", ()):
            for option in ("amsgrad", "maximize"):
                if group.get(option):
                    raise ValueError(f"the state was made with {option}=True, which FusedAdamW does not have")
        super().__setstate__(state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(number, group, params)
        self.scale = None
        return loss

    def _step_group(self, number: int, group: dict[str, Any], params: list[Tensor]) -> None:
        """One launch for all parameters with the same step number, dtypes and device, as a rule the whole group."""
        states = [self._state_of(p) for p in params]
        steps = self._steps_of(number, states)
        grads = [p.grad for p in params]
        low = [self.low.get(p) for p in params] if self.low else [None] * len(params)
        kinds = list(
            zip(
                steps.tolist(),
                [g.dtype for g in grads if g is not None],
                [None if x is None else x.dtype for x in low],
                [p.get_device() for p in params],
            )
        )
        beta1, beta2 = group["betas"]
        for kind in dict.fromkeys(kinds):
            launch = (number, *kind[1:])
            rows = [i for i, other in enumerate(kinds) if other == kind]
            adamw_(
                [params[i] for i in rows],
                [grads[i] for i in rows],
                [states[i]["exp_avg"] for i in rows],
                [states[i]["exp_avg_sq"] for i in rows],
                AdamWStep(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], int(kind[0]) + 1),
                low=() if kind[2] is None else [low[i] for i in rows],
                scale=self.scale,
                addresses=self._addresses[launch],
                backend=self.backend,
            )
        steps += 1.0

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if "exp_avg" not in state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p) for _ in range(2))
        return state

    def _steps_of(self, number: int, states: list[dict[str, Any]]) -> Tensor:
        """The step numbers of a group in one tensor on the host. The states' ``step`` become views of it, because
        reading or increasing each by itself would cost a microsecond per parameter."""
        found = [state["step"] for state in states]
        views, steps = self._steps.get(number, ([], torch.empty(0)))
        if len(views) != len(found) or not all(map(operator.is_, views, found)):
            # torch's fused AdamW leaves its steps on the GPU, hence cpu().
            steps = torch.stack([x.detach().cpu().float().view(()) for x in found])
            views = list(steps.unbind())
            for state, view in zip(states, views):
                state["step"] = view
            self._steps[number] = views, steps
        return steps
