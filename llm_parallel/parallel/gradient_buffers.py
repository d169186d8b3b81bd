"""megatron-core's gradient buffers, without what a single replica and the distributed optimizer do not need."""

from __future__ import annotations

from typing import Any

from megatron.core.distributed import DistributedDataParallel


class Replica(DistributedDataParallel):
    """Scales only what the optimizer reads: with the distributed optimizer that is this replica's part of the gradient,
    and megatron-core passes over all of it."""

    def scale_gradients(self, scaling_factor: float) -> None:
        """Multiplies this replica's gradient by a factor."""
        if not self.ddp_config.use_distributed_optimizer:
            super().scale_gradients(scaling_factor)
            return
        group = self.intra_dp_cp_group
        for buffer in self.buffers:
            for bucket in buffer.buckets:
                bucket.grad_data.view(group.size(), -1)[group.rank()].mul_(scaling_factor)


class SoleReplica(Replica):
    """Gradient buffers of the only data-parallel replica: nothing to reduce and nothing to gather.

    megatron-core reduces and gathers with itself too, three copies of the model's size at every step (a tenth of the
    step of a 17 M parameter model on two CPU cores).
    """

    def start_grad_sync(self, *_: Any) -> None:
        """Nothing: the gradient is whole."""

    def finish_grad_sync(self, *_: Any, **__: Any) -> None:
        """Nothing: the gradient is whole."""

    def start_param_sync(self, *_: Any, **__: Any) -> None:
        """Nothing: the parameters are whole."""
